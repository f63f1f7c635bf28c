import json
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open

from dsv3.batch import TokenBatch
from dsv3.checkpoint.names import published_layout, published_shapes
from dsv3.checkpoint.published import convert_published, exchange_halves, load_published, save_published
from dsv3.checkpoint.writer import FP8
from dsv3.errors import CheckpointError
from dsv3.fp8.quantise import BLOCKS, Form, dequantise, quantise

BATCH = TokenBatch.from_sequences([[3, 1, 4, 1, 5, 9, 2, 6], [5, 35, 8, 9, 7]])


def states_equal(one, other):
    one, other = one.state_dict(), other.state_dict()
    assert one.keys() == other.keys()
    return all(one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"q_lora_rank": None, "n_shared_experts": 2},
        {"n_shared_experts": 0, "num_nextn_predict_layers": 3},
        {"num_nextn_predict_layers": 0, "first_k_dense_replace": 0},
        {"topk_method": "group_limited_greedy", "scoring_func": "softmax"},
    ],
)
def test_a_model_comes_back_from_its_files_bit_for_bit(tmp_path, make_model, change):
    model = make_model(**change)
    save_published(model, folder=tmp_path / "out", tokenizer_folder=None, dtype=torch.float32, max_shard_bytes=9_000)
    back = load_published(tmp_path / "out", dtype=torch.float32, device="cpu")
    assert back.config == model.config
    assert states_equal(back, model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_are_cast_on_loading_and_router_biases_are_not(folder, make_model, dtype):
    loaded = load_published(folder, dtype=dtype, device="cpu").state_dict()
    for name, tensor in make_model().state_dict().items():
        kept = torch.float32 if name.endswith("bias") else dtype
        assert loaded[name].dtype == kept, name
        assert torch.equal(loaded[name], tensor.to(kept)), name


def test_a_loaded_model_can_be_trained(folder):
    model = load_published(folder, dtype=torch.float32, device="cpu")
    output = model(BATCH, mtp=True)
    (model.logits(output.hidden).sum() + output.mtp[0].hidden.sum()).backward()
    assert all(parameter.requires_grad and parameter.grad is not None for parameter in model.parameters())


def test_one_file_without_an_index_is_read_too(folder, rewrite, make_model):
    rewrite(folder, lambda tensors: None)
    assert states_equal(load_published(folder, dtype=torch.float32, device="cpu"), make_model())


def test_a_model_that_reads_the_hidden_state_first_is_written_in_the_published_order(tmp_path, make_model):
    model = make_model(mtp_concat_order="hidden_first", num_nextn_predict_layers=2)
    save_published(model, folder=tmp_path / "out", tokenizer_folder=None, dtype=torch.float32)
    back = load_published(tmp_path / "out", dtype=torch.float32, device="cpu")
    assert back.config.mtp_concat_order == "embedding_first"
    assert torch.equal(back.mtp[1].eh_proj.weight, torch.roll(model.mtp[1].eh_proj.weight, 24, dims=1))
    model.double(), back.double()
    for ours, theirs in zip(model(BATCH, mtp=True).mtp, back(BATCH, mtp=True).mtp, strict=True):
        assert torch.allclose(ours.hidden, theirs.hidden, rtol=1e-9, atol=1e-9)


def test_loading_without_the_exchange_would_be_noticed(make_model):
    model = make_model()
    before = model(BATCH, mtp=True).mtp[0].hidden
    model.mtp[0].eh_proj.weight.data = exchange_halves(model.mtp[0].eh_proj.weight.data)
    assert not torch.allclose(before, model(BATCH, mtp=True).mtp[0].hidden, rtol=0.1)


def test_a_copy_that_differs_from_the_main_models_tensor_is_said_and_not_used(folder, rewrite, make_model, caplog):
    rewrite(folder, lambda tensors: tensors["model.layers.2.embed_tokens.weight"].add_(1))
    model = load_published(folder, dtype=torch.float32, device="cpu")
    assert ["model.layers.2.embed_tokens.weight differs" in message for message in caplog.messages] == [True]
    assert states_equal(model, make_model())


def test_equal_copies_are_not_worth_a_word(folder, caplog):
    load_published(folder, dtype=torch.float32, device="cpu")
    assert caplog.messages == []


def test_what_had_to_be_assumed_is_logged(folder, edit_config, caplog):
    edit_config(folder, scoring_func=None)
    load_published(folder, dtype=torch.float32, device="cpu")
    assert ["scoring_func" in message and "'sigmoid'" in message for message in caplog.messages] == [True]


def test_an_fp8_checkpoint_with_ragged_blocks_loads_as_the_model_it_stands_for(
    tmp_path, make_model, rewrite, edit_config
):
    model = make_model(hidden_size=200, intermediate_size=300, kv_lora_rank=130, moe_intermediate_size=140)
    folder = tmp_path / "out"
    save_published(model, folder=folder, tokenizer_folder=None, dtype=torch.float32)
    expected = {}

    def put_in_fp8(tensors):
        for tensor in published_layout(model.config):
            value = tensors[tensor.name]
            if tensor.in_fp8:
                stored = quantise(value, form=BLOCKS)
                tensors |= {tensor.name: stored.values, f"{tensor.name}_scale_inv": stored.scales}
                value = stored.values.float()
                for i, row in enumerate(stored.scales):
                    for j, factor in enumerate(row):  # the definition, block by block
                        value[128 * i : 128 * (i + 1), 128 * j : 128 * (j + 1)] *= factor
            expected[tensor.name] = value

    rewrite(folder, put_in_fp8)
    block = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    edit_config(folder, quantization_config=block)
    loaded = load_published(folder, dtype=torch.float32, device="cpu")
    state = loaded.state_dict()
    for tensor in published_layout(model.config):
        assert torch.equal(tensor.part_of(state[tensor.source]), expected[tensor.name]), tensor.name
    convert_published(folder, folder=tmp_path / "plain", dtype=torch.float32)
    assert states_equal(load_published(tmp_path / "plain", dtype=torch.float32, device="cpu"), loaded)
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())


RAGGED = {"hidden_size": 200, "intermediate_size": 300, "kv_lora_rank": 130, "moe_intermediate_size": 140}
"""Matrices of two and three blocks a side, the last of each cut off by the edge."""


def stored_in(folder):
    tensors = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return tensors


def bits_equal(one, other):
    return one.dtype == other.dtype and torch.equal(one.view(torch.uint8), other.view(torch.uint8))


@pytest.mark.parametrize("change", [{}, RAGGED, RAGGED | {"q_lora_rank": None, "mtp_concat_order": "hidden_first"}])
def test_an_fp8_export_loads_as_exactly_the_weights_it_stands_for(tmp_path, make_model, change):
    model = make_model(**change)
    save_published(model, folder=tmp_path / "out", tokenizer_folder=None, dtype=FP8, max_shard_bytes=100_000)
    loaded = load_published(tmp_path / "out", dtype=torch.float32, device="cpu")
    assert loaded.config == replace(model.config, mtp_concat_order="embedding_first")
    ours, back = model.state_dict(), loaded.state_dict()
    for tensor in published_layout(model.config):
        value = tensor.part_of(ours[tensor.source])
        if tensor.in_fp8:
            value = dequantise(quantise(value, form=BLOCKS))
        elif not tensor.stays_float32:
            value = (exchange_halves(value) if tensor.swapped_halves else value).bfloat16().float()
        assert torch.equal(tensor.part_of(back[tensor.source]), value), tensor.name


@pytest.mark.parametrize("plain", [torch.float32, torch.bfloat16])
def test_fp8_to_plain_and_back_gives_the_same_bytes(tmp_path, make_model, plain):
    """In FP32 nothing is rounded on the way. BF16 rounds by at most 2^-8 of a value, and of the largest of its block:
    that cannot carry a value over half a step of E4M3, which is 2^-5 of it or more, so only multipliers move.
    """
    save_published(make_model(**RAGGED), folder=tmp_path / "fp8", tokenizer_folder=None, dtype=FP8)
    convert_published(tmp_path / "fp8", folder=tmp_path / "plain", dtype=plain)
    convert_published(tmp_path / "plain", folder=tmp_path / "back", dtype=FP8)
    before, after = stored_in(tmp_path / "fp8"), stored_in(tmp_path / "back")
    assert before.keys() == after.keys()
    for name, value in before.items():
        if plain == torch.bfloat16 and name.endswith("_scale_inv"):
            assert torch.allclose(after[name], value, rtol=2**-8 + 2**-18, atol=0.0), name
        elif not name.endswith("correction_bias"):  # in FP32 in all three
            assert bits_equal(after[name], value), name


def released(tensors, *, generator, scale_dtype=torch.float32):
    """Put random bytes for all FP8 weights, NaN among them, and multipliers with all the bits of their type."""
    for name, value in tensors.items():
        if value.dtype == FP8:
            tensors[name] = torch.randint(0, 256, value.shape, dtype=torch.uint8, generator=generator).view(FP8)
        elif name.endswith("_scale_inv"):
            # Up to 2^120 apart: far from what quantising anew would choose.
            exponent = torch.randint(-60, 60, value.shape, generator=generator)
            tensors[name] = (torch.rand(value.shape, generator=generator) * exponent.float().exp2()).to(scale_dtype)


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16, torch.float8_e8m0fnu])
def test_fp8_bytes_of_other_programs_are_passed_on_as_they_are(tmp_path, make_model, rewrite, scale_dtype):
    folder, generator = tmp_path / "fp8", torch.Generator().manual_seed(1)
    save_published(make_model(**RAGGED), folder=folder, tokenizer_folder=None, dtype=FP8)
    rewrite(folder, lambda tensors: released(tensors, generator=generator, scale_dtype=scale_dtype))
    convert_published(folder, folder=tmp_path / "again", dtype=FP8, max_shard_bytes=100_000)
    before, after = stored_in(folder), stored_in(tmp_path / "again")
    assert before.keys() == after.keys()
    assert any(value.float().isnan().any() for value in before.values())
    for name, value in before.items():
        # A multiplier in a narrower type becomes FP32, which has all its values.
        expected = value.float() if name.endswith("_scale_inv") else value
        assert bits_equal(after[name], expected), name


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16, torch.float8_e8m0fnu])
def test_fp8_bytes_stay_as_they_are_in_a_model_that_is_loaded_in_fp8(tmp_path, make_model, rewrite, scale_dtype):
    folder, generator = tmp_path / "fp8", torch.Generator().manual_seed(1)
    save_published(make_model(**RAGGED), folder=folder, tokenizer_folder=None, dtype=FP8)
    rewrite(folder, lambda tensors: released(tensors, generator=generator, scale_dtype=scale_dtype))
    model = load_published(folder, dtype=FP8, device="cpu")
    state, stored = model.state_dict(), stored_in(folder)
    for tensor in published_layout(model.config):
        if tensor.in_fp8:
            assert bits_equal(tensor.part_of(state[tensor.source]).contiguous(), stored[tensor.name])
            scales = tensor.part_of_scales(state[f"{tensor.source}_scale_inv"])
            assert torch.equal(scales, stored[f"{tensor.name}_scale_inv"].float())
        elif not tensor.is_copy:
            assert torch.equal(state[tensor.source], stored[tensor.name].float())
    assert {tensor.dtype for tensor in state.values()} == {FP8, torch.float32}


def test_fp8_in_other_blocks_is_rounded_again_for_a_model_in_fp8(tmp_path, make_model, rewrite, edit_config):
    folder = tmp_path / "fp8"
    save_published(make_model(**RAGGED), folder=folder, tokenizer_folder=None, dtype=torch.float32)
    form = Form(tile=(64, 32))

    def put_in_fp8(tensors):
        for tensor in published_layout(make_model(**RAGGED).config):
            if tensor.in_fp8:
                stored = quantise(tensors[tensor.name], form=form)
                tensors |= {tensor.name: stored.values, f"{tensor.name}_scale_inv": stored.scales}

    rewrite(folder, put_in_fp8)
    edit_config(folder, quantization_config={"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [64, 32]})
    convert_published(folder, folder=tmp_path / "again", dtype=FP8)
    ours, theirs = (load_published(path, dtype=FP8, device="cpu").state_dict() for path in (folder, tmp_path / "again"))
    names = [name for name, tensor in ours.items() if tensor.dtype == FP8]
    assert all(bits_equal(ours[name], theirs[name]) for name in names)
    assert all(torch.equal(ours[f"{name}_scale_inv"], theirs[f"{name}_scale_inv"]) for name in names)


def test_fp8_in_other_blocks_is_read_and_written_again_in_blocks_of_128(tmp_path, make_model, rewrite, edit_config):
    model, folder, expected = make_model(**RAGGED), tmp_path / "fp8", {}
    save_published(model, folder=folder, tokenizer_folder=None, dtype=torch.float32)

    def put_in_fp8(tensors):
        for tensor in published_layout(model.config):
            if tensor.in_fp8:
                stored = quantise(tensors[tensor.name], form=Form(tile=(64, 32)))
                tensors |= {tensor.name: stored.values, f"{tensor.name}_scale_inv": stored.scales}
                expected[tensor.name] = dequantise(stored)

    rewrite(folder, put_in_fp8)
    edit_config(folder, quantization_config={"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [64, 32]})
    convert_published(folder, folder=tmp_path / "again", dtype=FP8)
    after = stored_in(tmp_path / "again")
    assert {name: tuple(value.shape) for name, value in after.items()} == published_shapes(model.config, quantized=True)
    for name, value in expected.items():
        stored = quantise(value, form=BLOCKS)
        assert bits_equal(after[name], stored.values)
        assert bits_equal(after[f"{name}_scale_inv"], stored.scales)


def test_a_matrix_that_only_others_store_in_fp8_is_written_in_bf16(tmp_path, make_model, rewrite):
    name, folder = "model.layers.2.eh_proj.weight", tmp_path / "fp8"
    save_published(make_model(**RAGGED), folder=folder, tokenizer_folder=None, dtype=FP8)
    stored = quantise(stored_in(folder)[name].float(), form=BLOCKS)
    rewrite(folder, lambda tensors: tensors.update({name: stored.values, f"{name}_scale_inv": stored.scales}))
    convert_published(folder, folder=tmp_path / "again", dtype=FP8)
    after = stored_in(tmp_path / "again")
    assert torch.equal(after[name], dequantise(stored).bfloat16())
    assert f"{name}_scale_inv" not in after


def test_converting_restores_the_copies_and_the_fields_that_the_source_has_lost(folder, tmp_path, rewrite, edit_config):
    names = ("model.layers.2.embed_tokens.weight", "model.layers.2.shared_head.head.weight")
    rewrite(folder, lambda tensors: [tensors.pop(name) for name in names])
    edit_config(folder, scoring_func=None, topk_method=None, moe_layer_freq=None)
    convert_published(folder, folder=tmp_path / "whole", dtype=torch.float32)
    config = json.loads((tmp_path / "whole" / "config.json").read_text())
    assert [config[name] for name in ("scoring_func", "topk_method", "moe_layer_freq")] == ["sigmoid", "noaux_tc", 1]
    with safe_open(tmp_path / "whole" / "model-00001-of-00001.safetensors", framework="pt") as file:
        assert torch.equal(file.get_tensor(names[0]), file.get_tensor("model.embed_tokens.weight"))
        assert torch.equal(file.get_tensor(names[1]), file.get_tensor("lm_head.weight"))


def test_converting_takes_tokenizer_and_generation_settings_along(folder, tmp_path):
    (folder / "tokenizer.json").write_text("{}")
    (folder / "generation_config.json").write_text('{"temperature": 0.6}')
    convert_published(folder, folder=tmp_path / "copy", dtype=torch.bfloat16)
    assert (tmp_path / "copy" / "tokenizer.json").read_text() == "{}"
    assert json.loads((tmp_path / "copy" / "generation_config.json").read_text()) == {"temperature": 0.6}


def test_a_folder_is_not_converted_onto_itself(folder):
    with pytest.raises(CheckpointError, match="onto itself"):
        convert_published(folder, folder=folder.parent / "x" / ".." / folder.name, dtype=torch.float32)
