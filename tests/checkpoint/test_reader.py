import json
import re

import pytest
import torch

from dsv3.checkpoint.names import published_layout
from dsv3.checkpoint.reader import PublishedReader
from dsv3.errors import CheckpointError, ConfigError
from dsv3.fp8.quantise import BLOCKS, dequantise, quantise

ROUTER = "model.layers.1.mlp.gate.weight"
EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"


def test_missing_unexpected_and_misshapen_tensors_are_told_in_one_error(folder, rewrite):
    def damage(tensors):
        del tensors[ROUTER], tensors[EXPERT]
        tensors["model.wings.weight"] = torch.zeros(2)
        tensors["lm_head.weight"] = torch.zeros(41, 24)

    rewrite(folder, damage)
    with pytest.raises(CheckpointError) as caught:
        PublishedReader(folder)
    said = str(caught.value)
    assert f"2 missing: {ROUTER}, {EXPERT}" in said
    assert "1 unexpected: model.wings.weight" in said
    assert "lm_head.weight has shape [41, 24] instead of [40, 24]" in said


def test_only_the_first_few_of_many_missing_tensors_are_named(folder, rewrite):
    def damage(tensors):
        for name in [name for name in tensors if ".experts." in name and ".layers.1." in name]:
            del tensors[name]

    rewrite(folder, damage)
    with pytest.raises(CheckpointError, match=r"18 missing: .* and more") as caught:
        PublishedReader(folder)
    assert str(caught.value).count(".experts.") == 5


def test_a_missing_shard_is_named(folder):
    shards = sorted(folder.glob("*.safetensors"))
    shards[1].unlink()
    with pytest.raises(CheckpointError, match=rf"lacks 1 of {len(shards)} weight files: {re.escape(shards[1].name)}"):
        PublishedReader(folder)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_file_that_is_cut_short_is_named(folder, keep):
    path = sorted(folder.glob("*.safetensors"))[2]
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=rf"{re.escape(path.name)} .*cut short"):
        PublishedReader(folder)


def test_an_index_that_belongs_to_other_weights_is_refused(folder):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["lm_head.weight"] = index["weight_map"]["model.embed_tokens.weight"]
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"1 tensors where they are not: lm_head\.weight"):
        PublishedReader(folder)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"weight_map": {"a": 3}}', '{"weight_map": {"a": "../x.safetensors"}}']
)
def test_an_index_that_is_none_is_refused(folder, text):
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match="is no index"):
        PublishedReader(folder)


def test_a_folder_without_weights_config_or_existence_is_said_to_be_so(folder, tmp_path):
    with pytest.raises(CheckpointError, match="no folder"):
        PublishedReader(tmp_path / "absent")
    (folder / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor"):
        PublishedReader(folder)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        PublishedReader(folder)


def test_a_config_that_is_not_implemented_is_refused_with_the_folder(folder, edit_config):
    edit_config(folder, hidden_act="gelu")
    with pytest.raises(ConfigError, match=f"{re.escape(str(folder))}.*hidden_act"):
        PublishedReader(folder)


def test_absent_mtp_modules_are_left_out_of_the_model_and_said(folder, rewrite):
    rewrite(folder, lambda tensors: [tensors.pop(name) for name in list(tensors) if ".layers.2." in name])
    reader = PublishedReader(folder)
    assert reader.config.num_nextn_predict_layers == 0
    assert len(reader.notes) == 1
    assert "without MTP" in reader.notes[0]


def test_an_mtp_module_of_which_a_part_is_absent_is_refused(folder, rewrite):
    rewrite(folder, lambda tensors: tensors.pop("model.layers.2.eh_proj.weight"))
    with pytest.raises(CheckpointError, match=r"1 missing: model\.layers\.2\.eh_proj\.weight"):
        PublishedReader(folder)


def test_mtp_modules_that_the_config_denies_are_unexpected(folder, edit_config):
    edit_config(folder, num_nextn_predict_layers=0)
    with pytest.raises(CheckpointError, match=r"unexpected: model\.layers\.2\."):
        PublishedReader(folder)


def test_copies_of_embedding_and_head_may_be_absent(folder, rewrite):
    copies = ("model.layers.2.embed_tokens.weight", "model.layers.2.shared_head.head.weight")
    rewrite(folder, lambda tensors: [tensors.pop(name) for name in copies])
    reader = PublishedReader(folder)
    assert reader.config.num_nextn_predict_layers == 1
    assert {tensor.name for tensor in reader.layout}.isdisjoint(copies)


def test_frequencies_that_old_programs_saved_are_passed_over(folder, rewrite):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    rewrite(folder, lambda tensors: tensors.update({name: torch.ones(2)}))
    assert name not in {tensor.name for tensor in PublishedReader(folder).layout}


def test_fp8_weights_come_back_times_their_multipliers(folder, rewrite):
    expected = {}

    def put_in_fp8(tensors):
        for tensor in published_layout(config):
            if tensor.in_fp8:
                stored = quantise(tensors[tensor.name], form=BLOCKS)
                tensors |= {tensor.name: stored.values, f"{tensor.name}_scale_inv": stored.scales}
                expected[tensor.name] = dequantise(stored)

    config = PublishedReader(folder).config
    rewrite(folder, put_in_fp8)
    reader = PublishedReader(folder)
    read = {tensor.name: reader.read(tensor) for tensor in reader.layout if tensor.in_fp8}
    assert len(read) == len(expected) == 8 + 21 * 2 + 5 * 2
    assert all(torch.equal(read[name], value) for name, value in expected.items())


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda t: t.pop(f"{EXPERT}_scale_inv"), f"{EXPERT} is stored in FP8 without {EXPERT}_scale_inv"),
        (
            lambda t: t.update({f"{EXPERT}_scale_inv": torch.ones(2, 1)}),
            r"_scale_inv has shape \[2, 1\] instead of \[1, 1\]",
        ),
        (
            lambda t: t.update({f"{EXPERT}_scale_inv": torch.ones(1, 1, dtype=torch.int32)}),
            "_scale_inv is stored as I32",
        ),
        (lambda t: t.update({EXPERT: torch.ones(9, 24, dtype=torch.int8)}), f"{EXPERT} is stored as I8"),
        (lambda t: t.update({EXPERT: torch.ones(9, 24)}), f"1 unexpected: {EXPERT}_scale_inv"),
    ],
)
def test_weights_and_multipliers_that_do_not_belong_together_are_refused(folder, rewrite, damage, said):
    def quantise_one(tensors):
        stored = quantise(tensors[EXPERT], form=BLOCKS)
        tensors |= {EXPERT: stored.values, f"{EXPERT}_scale_inv": stored.scales}
        damage(tensors)

    rewrite(folder, quantise_one)
    with pytest.raises(CheckpointError, match=said):
        PublishedReader(folder)
