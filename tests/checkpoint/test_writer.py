import json
import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from dsv3.checkpoint.names import PublishedTensor, published_shapes
from dsv3.checkpoint.published import save_published
from dsv3.checkpoint.writer import FP8, shards_of
from dsv3.config.published import model_config_from_published
from dsv3.errors import CheckpointError, ConfigError, TokenizerError
from dsv3.plan.memory import weight_bytes
from dsv3.plan.published_tensors import checkpoint_size, published_tensors


def contents(folder: Path) -> dict[str, tuple[str, torch.Tensor]]:
    """Name of every tensor in the folder, with its file and value."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}
            found |= {name: (path.name, file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
    return found


def test_the_files_hold_every_published_tensor_where_the_index_says(folder, make_model):
    found = contents(folder)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert {name: tuple(value.shape) for name, (_, value) in found.items()} == published_shapes(make_model().config)
    assert index["weight_map"] == {name: file for name, (file, _) in found.items()}
    assert index["metadata"]["total_size"] == sum(value.nbytes for _, value in found.values())


def test_shards_stay_below_the_limit_and_are_numbered(folder):
    sizes = {}
    for file, value in contents(folder).values():
        sizes[file] = sizes.get(file, 0) + value.nbytes
    assert sorted(sizes) == [f"model-{n:05d}-of-{len(sizes):05d}.safetensors" for n in range(1, len(sizes) + 1)]
    assert len(sizes) > 1
    assert max(sizes.values()) <= 8_000


@given(sizes=st.lists(st.integers(1, 50), min_size=1, max_size=40), limit=st.integers(1, 120))
def test_sharding_keeps_the_order_and_breaks_only_where_it_must(sizes, limit):
    layout = [PublishedTensor(name=str(n), shape=(size,), source=str(n)) for n, size in enumerate(sizes)]
    shards = shards_of(layout, dtype=torch.float32, max_shard_bytes=limit * 4)
    totals = [sum(tensor.shape[0] for tensor in shard) for shard in shards]
    assert [tensor for shard in shards for tensor in shard] == layout
    assert all(total <= limit or len(shard) == 1 for total, shard in zip(totals, shards, strict=True))
    for total, following in zip(totals, shards[1:], strict=False):
        assert total + following[0].shape[0] > limit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_take_the_type_asked_for_and_router_biases_stay_in_fp32(tmp_path, make_model, dtype):
    model = make_model()
    save_published(model, folder=tmp_path / "out", tokenizer_folder=None, dtype=dtype, max_shard_bytes=10**9)
    for name, (_, value) in contents(tmp_path / "out").items():
        assert value.dtype == (torch.float32 if name.endswith("e_score_correction_bias") else dtype), name
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["torch_dtype"] == str(dtype).removeprefix("torch.")


def test_a_type_that_weights_are_not_written_in_is_refused(tmp_path, make_model):
    with pytest.raises(ConfigError, match="float8_e5m2"):
        save_published(make_model(), folder=tmp_path / "out", tokenizer_folder=None, dtype=torch.float8_e5m2)


RAGGED = {"hidden_size": 200, "intermediate_size": 300, "kv_lora_rank": 130, "moe_intermediate_size": 140}
"""Matrices of two and three blocks a side, the last of each cut off by the edge."""


@pytest.mark.parametrize("change", [{}, RAGGED, RAGGED | {"q_lora_rank": None, "num_nextn_predict_layers": 2}])
def test_fp8_files_have_the_names_shapes_and_types_of_the_released_ones(tmp_path, make_model, change):
    model = make_model(**change)
    save_published(model, folder=tmp_path / "out", tokenizer_folder=None, dtype=FP8, max_shard_bytes=10**9)
    found = {name: value for name, (_, value) in contents(tmp_path / "out").items()}
    assert {name: tuple(value.shape) for name, value in found.items()} == published_shapes(model.config, quantized=True)
    kinds = {"FP8": FP8, "BF16": torch.bfloat16, "FP32": torch.float32}
    listed = {tensor.name: kinds[tensor.dtype] for tensor in published_tensors(model.config, fp8=True)}
    assert {name: value.dtype for name, value in found.items()} == listed


def test_the_config_of_fp8_files_is_that_of_the_released_ones_and_reads_back_as_the_same_model(tmp_path, make_model):
    model = make_model()
    save_published(model, folder=tmp_path / "out", tokenizer_folder=None, dtype=FP8)
    values = json.loads((tmp_path / "out" / "config.json").read_text())
    assert values["quantization_config"] == {  # fact sheet 1.6
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    }
    assert values["torch_dtype"] == "bfloat16"
    assert model_config_from_published(values) == (model.config, [])


def test_an_fp8_weight_and_its_multipliers_lie_in_one_shard_below_the_limit(tmp_path, make_model):
    save_published(
        make_model(**RAGGED), folder=tmp_path / "out", tokenizer_folder=None, dtype=FP8, max_shard_bytes=170_000
    )
    found = contents(tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: file for name, (file, _) in found.items()}
    assert index["metadata"]["total_size"] == sum(value.nbytes for _, value in found.values())
    scaled = {name: file for name, (file, value) in found.items() if value.dtype == FP8}
    assert {name: found[f"{name}_scale_inv"][0] for name in scaled} == scaled
    sizes: dict[str, int] = {}
    for file, value in found.values():
        sizes[file] = sizes.get(file, 0) + value.nbytes
    assert len(sizes) > 5
    assert max(sizes.values()) <= 170_000


@pytest.mark.parametrize("change", [{}, RAGGED, RAGGED | {"num_nextn_predict_layers": 2}])
@pytest.mark.parametrize("dtype", [FP8, torch.bfloat16])
def test_the_files_have_as_many_bytes_as_the_plan_says(tmp_path, make_model, change, dtype):
    model = make_model(**change)
    save_published(model, folder=tmp_path / "out", tokenizer_folder=None, dtype=dtype)
    [file] = (tmp_path / "out").glob("*.safetensors")
    planned = checkpoint_size(model.config, fp8=dtype == FP8)
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    assert file.stat().st_size - header == planned.num_bytes
    assert len(contents(tmp_path / "out")) == planned.tensors
    in_memory = sum(value.nbytes for name, (_, value) in contents(tmp_path / "out").items() if not is_copy(name, model))
    assert in_memory == weight_bytes(model.config, precision="fp8" if dtype == FP8 else "bfloat16")


def is_copy(name, model):
    layers = model.config.num_hidden_layers
    modules = [f"model.layers.{layers + k}." for k in range(model.config.num_nextn_predict_layers)]
    return name in {f"{module}{part}.weight" for module in modules for part in ("embed_tokens", "shared_head.head")}


def test_too_small_a_disk_for_fp8_is_told_by_the_bytes_of_values_and_multipliers(tmp_path, make_model, monkeypatch):
    model = make_model(**RAGGED)
    needed = checkpoint_size(model.config, fp8=True).num_bytes
    for free, refused in ((needed - 1, True), (needed, False)):
        usage = shutil.disk_usage(tmp_path)._replace(free=free)
        monkeypatch.setattr("dsv3.checkpoint.writer.shutil.disk_usage", lambda path, usage=usage: usage)
        with pytest.raises(CheckpointError, match="the disk is full") if refused else nullcontext():
            save_published(model, folder=tmp_path / "out", tokenizer_folder=None, dtype=FP8)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_not_finite_is_refused_in_fp8_and_kept_in_bf16(folder, make_model, bad):
    model = make_model()
    model.layers[1].mlp.experts.down_proj.data[3, 2, 5] = bad
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.experts\.3\.down_proj\.weight .* 1 of its values"):
        save_published(model, folder=folder, tokenizer_folder=None, dtype=FP8)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    save_published(model, folder=folder, tokenizer_folder=None, dtype=torch.bfloat16)
    value = contents(folder)["model.layers.1.mlp.experts.3.down_proj.weight"][1]
    assert torch.equal(value[2, 5].float(), torch.tensor(bad)) or value[2, 5].isnan()


@pytest.mark.parametrize(("change", "matrices"), [({}, 0), (RAGGED, 3 * 4 + 3 + 2 * 21), ({"hidden_size": 256}, 0)])
def test_matrices_that_transformers_would_misread_without_a_gpu_are_told_once(
    tmp_path, make_model, caplog, change, matrices
):
    save_published(make_model(**change), folder=tmp_path / "out", tokenizer_folder=None, dtype=FP8)
    told = [message for message in caplog.messages if "misread" in message]
    assert len(told) == (1 if matrices else 0)
    assert all(f"misread {matrices} matrices" in message and "write bf16" in message for message in told)


def test_tokenizer_files_come_along_and_other_files_do_not(tmp_path, make_model):
    source = tmp_path / "tokenizer"
    source.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "notes.txt"):
        (source / name).write_text(f"this is {name}")
    save_published(make_model(), folder=tmp_path / "out", tokenizer_folder=source)
    copied = {path.name: path.read_text() for path in (tmp_path / "out").iterdir() if (source / path.name).exists()}
    assert copied == {
        name: f"this is {name}" for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    }
    tokens = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert tokens == {"bos_token_id": 0, "eos_token_id": 1}


def test_a_tokenizer_folder_without_a_tokenizer_is_refused_before_anything_is_written(tmp_path, make_model):
    with pytest.raises(TokenizerError, match=r"tokenizer\.json"):
        save_published(make_model(), folder=tmp_path / "out", tokenizer_folder=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_earlier_export_is_replaced_whole(folder, make_model):
    save_published(make_model(n_routed_experts=8), folder=folder, tokenizer_folder=None, max_shard_bytes=10**9)
    assert {path.name for path in folder.glob("*.safetensors")} == {"model-00001-of-00001.safetensors"}
    assert {path.name for path in folder.parent.iterdir()} == {folder.name}
    assert json.loads((folder / "config.json").read_text())["n_routed_experts"] == 8


@pytest.mark.parametrize("foreign", ["notes.txt", "pytorch_model.bin"])
def test_a_folder_with_something_else_in_it_is_refused_unless_asked(folder, make_model, foreign):
    (folder / foreign).write_text("mine")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(CheckpointError, match="already holds"):
        save_published(make_model(), folder=folder, tokenizer_folder=None)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    save_published(make_model(), folder=folder, tokenizer_folder=None, overwrite=True)
    assert not (folder / foreign).exists()


def test_weights_of_another_program_are_not_overwritten(folder, make_model):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    del index["metadata"]["producer"]
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="did not write"):
        save_published(make_model(), folder=folder, tokenizer_folder=None)


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path, make_model):
    (tmp_path / "out").write_text("")
    with pytest.raises(CheckpointError, match="is a file"):
        save_published(make_model(), folder=tmp_path / "out", tokenizer_folder=None, overwrite=True)


@pytest.mark.parametrize(
    ("failure", "said"),
    [(KeyboardInterrupt("Ctrl-C"), "Ctrl-C"), (OSError(28, "No space left on device"), "the disk is full")],
)
def test_a_write_that_breaks_off_leaves_the_earlier_export_and_nothing_else(
    folder, make_model, monkeypatch, failure, said
):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    written = []

    def fail_at_the_third(tensors, path, metadata):
        written.append(path)
        if len(written) == 3:
            raise failure
        path.write_bytes(b"half")

    monkeypatch.setattr("dsv3.checkpoint.writer.save_file", fail_at_the_third)
    with pytest.raises((KeyboardInterrupt, CheckpointError), match=said):
        save_published(make_model(), folder=folder, tokenizer_folder=None, max_shard_bytes=8_000)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_what_a_killed_write_left_is_not_in_the_next_export(folder, make_model):
    leftover = folder.parent / f".{folder.name}.partial"
    leftover.mkdir()
    (leftover / "model-00009-of-00009.safetensors").write_bytes(b"half")
    save_published(make_model(), folder=folder, tokenizer_folder=None)
    assert not (folder / "model-00009-of-00009.safetensors").exists()
    assert not leftover.exists()


def test_too_small_a_disk_is_told_before_writing(tmp_path, make_model, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr("dsv3.checkpoint.writer.shutil.disk_usage", lambda path: usage)
    with pytest.raises(CheckpointError, match=r"the disk is full: .*out was not written \(0\.0 MB are needed"):
        save_published(make_model(), folder=tmp_path / "out", tokenizer_folder=None)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_an_error_of_the_user(tmp_path, make_model):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="was not written"):
        save_published(make_model(), folder=tmp_path / "file" / "out", tokenizer_folder=None)


def test_what_other_programs_would_compute_differently_is_logged(tmp_path, make_model, caplog):
    save_published(make_model(n_shared_experts=0), folder=tmp_path / "out", tokenizer_folder=None)
    assert any("shared expert" in message for message in caplog.messages)
