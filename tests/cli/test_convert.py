import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dsv3.checkpoint.names import published_layout, published_shapes
from dsv3.checkpoint.published import load_published, save_published
from dsv3.checkpoint.snapshot import save_snapshot
from dsv3.cli.convert import parse_size
from dsv3.cli.main import main
from dsv3.config import BatchConfig, ModelConfig, PretrainConfig, SnapshotConfig
from dsv3.config.files import write_config
from dsv3.data.tokenizer import Tokenizer
from dsv3.errors import ConfigError
from dsv3.fp8.quantise import BLOCKS, quantise
from dsv3.infer.loaded import load
from dsv3.model.transformer import Transformer


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(["In the beginning there was a word."] * 3, vocab_size=300)


@pytest.fixture(scope="module")
def model(tokenizer):
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=16,
        num_hidden_layers=2,
        initializer_range=0.2,
        max_position_embeddings=64,
        num_attention_heads=2,
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_nope_head_dim=4,
        qk_rope_head_dim=4,
        v_head_dim=4,
        intermediate_size=16,
        moe_intermediate_size=8,
        first_k_dense_replace=1,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
    )
    model = Transformer(config)
    model.init_weights(generator=torch.Generator().manual_seed(0))
    return model


@pytest.fixture
def published(tmp_path, model, tokenizer):
    tokenizer.save(tmp_path / "tokenizer")
    folder = tmp_path / "published"
    save_published(model, folder=folder, tokenizer_folder=tmp_path / "tokenizer", dtype=torch.float32)
    return folder


@pytest.fixture
def run_folder(tmp_path, model, tokenizer):
    """A run that has written one snapshot and no export."""
    folder = tmp_path / "run"
    tokenizer.save(folder / "corpus" / "tokenizer")
    config = PretrainConfig(model=model.config, batch=BatchConfig(sequence_length=32))
    write_config(config, path=folder / "config.json")
    tensors = {"model": model.state_dict()}
    save_snapshot(folder / "snapshots", step=3, tensors=tensors, state={}, policy=SnapshotConfig())
    return folder


def run(*arguments) -> int:
    with pytest.raises(SystemExit) as caught:
        main(["--quiet", "convert", *map(str, arguments)])
    return caught.value.code


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    tensors = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return tensors


@pytest.mark.parametrize(
    ("option", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16), (None, torch.bfloat16)]
)
def test_published_weights_are_written_in_the_type_asked_for(tmp_path, published, option, dtype, capsys):
    assert run(published, tmp_path / "out", *([] if option is None else ["--dtype", option])) == 0
    before, after = weights_of(published), weights_of(tmp_path / "out")
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert torch.equal(after[name], value if name.endswith("bias") else value.to(dtype)), name
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (published / "tokenizer.json").read_bytes()
    assert str(tmp_path / "out") in capsys.readouterr().out


def test_fp8_weights_come_out_dequantised(tmp_path, published, model):
    path = next(published.glob("*.safetensors"))
    tensors = load_file(path)
    expected = {}
    for tensor in published_layout(model.config):
        if tensor.in_fp8:
            stored = quantise(tensors[tensor.name], form=BLOCKS)
            tensors |= {tensor.name: stored.values, f"{tensor.name}_scale_inv": stored.scales}
            expected[tensor.name] = stored.values.float() * stored.scales  # every matrix here is a single block
    (published / "model.safetensors.index.json").unlink()
    path.unlink()
    save_file(tensors, published / "model.safetensors")
    config = json.loads((published / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    (published / "config.json").write_text(json.dumps(config))

    assert run(published, tmp_path / "out", "--dtype", "fp32") == 0
    written = weights_of(tmp_path / "out")
    assert {name: tuple(value.shape) for name, value in written.items()} == published_shapes(model.config)
    assert all(torch.equal(written[name], value) for name, value in expected.items())


def fp8_of(model: Transformer) -> dict[str, torch.Tensor]:
    """The weights of the released FP8 format, by its definition: values, multipliers, and the rest in BF16."""
    tensors, state = {}, model.state_dict()
    for tensor in published_layout(model.config):
        value = tensor.part_of(state[tensor.source])
        if tensor.in_fp8:
            stored = quantise(value, form=BLOCKS)
            tensors |= {tensor.name: stored.values, f"{tensor.name}_scale_inv": stored.scales}
        else:
            tensors[tensor.name] = value if tensor.stays_float32 else value.bfloat16()
    return tensors


@pytest.mark.parametrize("kind", ["snapshot", "export", "published"])
def test_fp8_is_written_from_runs_exports_and_published_folders(tmp_path, run_folder, published, model, kind, capsys):
    source = published if kind == "published" else run_folder
    if kind == "export":
        published.rename(run_folder / "export")
    assert run(source, tmp_path / "out", "--dtype", "fp8") == 0
    written, expected = weights_of(tmp_path / "out"), fp8_of(model)
    assert {name: value.dtype for name, value in written.items()} == {n: v.dtype for n, v in expected.items()}
    assert all(torch.equal(written[name].float(), value.float()) for name, value in expected.items())
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    size = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    assert f"out: {size / 1e6:,.1f} MB of float8_e4m3fn weights in 1 files, from " in capsys.readouterr().out


def test_fp8_written_again_as_fp8_is_the_same_to_the_byte(tmp_path, published):
    assert run(published, tmp_path / "once", "--dtype", "fp8") == 0
    assert run(tmp_path / "once", tmp_path / "twice", "--dtype", "fp8") == 0
    files = {path.name: path.read_bytes() for path in (tmp_path / "once").iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "twice").iterdir()} == files


def test_a_run_without_an_export_gives_its_newest_snapshot(tmp_path, run_folder, model):
    assert run(run_folder, tmp_path / "out", "--dtype", "fp32") == 0
    state = load_published(tmp_path / "out", dtype=torch.float32, device="cpu").state_dict()
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_a_run_with_an_export_gives_the_export(tmp_path, run_folder, published):
    published.rename(run_folder / "export")
    (run_folder / "export" / "generation_config.json").write_text('{"from": "export"}')
    assert run(run_folder, tmp_path / "out") == 0
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == {"from": "export"}


def test_what_was_converted_is_a_model_for_every_other_verb(tmp_path, run_folder):
    assert run(run_folder, tmp_path / "out", "--dtype", "fp32") == 0
    ids = [5, 17, 30]
    expected = load(run_folder, weights="fp32", device="cpu").logits(ids)
    assert torch.equal(load(tmp_path / "out", weights="fp32", device="cpu").logits(ids), expected)


def test_shards_stay_below_the_size_asked_for(tmp_path, published):
    assert run(published, tmp_path / "out", "--max-shard-size", "20KB") == 0
    files = list((tmp_path / "out").glob("model-*.safetensors"))
    assert len(files) > 1
    assert all(sum(value.nbytes for value in load_file(file).values()) <= 20_000 for file in files)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--dtype", "int4"), "bf16, fp32 or fp8"),
        (("--max-shard-size", "big"), "5GB"),
        (("--max-shard-size", "0"), "above zero"),
    ],
)
def test_an_option_that_cannot_be_obeyed_is_refused_and_nothing_written(tmp_path, published, options, said, capsys):
    assert run(published, tmp_path / "out", *options) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_destination_in_use_is_left_alone_unless_asked(tmp_path, published, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "diary.txt").write_text("mine")
    assert run(published, tmp_path / "out") == 2
    assert "diary.txt" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["diary.txt"]
    assert run(published, tmp_path / "out", "--overwrite") == 0
    assert not (tmp_path / "out" / "diary.txt").exists()


def test_a_source_that_is_no_model_is_an_error_of_the_user(tmp_path, capsys):
    assert run(tmp_path / "absent", tmp_path / "out") == 2
    assert "absent" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5_000_000_000), ("500mb", 500_000_000), ("1.5 KiB", 1536), ("2GiB", 2**31), ("12345", 12345), ("7B", 7)],
)
def test_sizes_are_read_with_their_units(text, size):
    assert parse_size(text) == size


@given(st.text(alphabet="GBKMix.-+ ", max_size=6))
def test_any_other_size_is_refused_with_an_example(text):
    with pytest.raises(ConfigError, match="5GB"):
        parse_size(text)


@pytest.mark.parametrize("kind", ["snapshot", "published"])
def test_gguf_is_written_from_runs_and_published_folders(tmp_path, run_folder, published, tokenizer, kind, capsys):
    gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")
    source = published if kind == "published" else run_folder
    assert run(source, tmp_path / "m.gguf", "--to", "gguf", "--dtype", "fp32") == 0
    assert "m.gguf" in capsys.readouterr().out
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    assert reader.fields["tokenizer.ggml.tokens"].contents()[: tokenizer.vocab_size].count("<think>") == 1
    head = next(tensor for tensor in reader.tensors if tensor.name == "output.weight")
    assert torch.equal(
        torch.from_numpy(head.data.copy()), load(source, weights="fp32", plain=True).model.lm_head.weight
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--to", "onnx"], "published or gguf"),
        (["--to", "gguf", "--dtype", "fp8"], "bf16, q8_0"),
        (["--to", "gguf", "--max-shard-size", "1GB"], "one file"),
        (["--to", "gguf"], "ends in .gguf"),
    ],
)
def test_what_cannot_be_written_is_told(tmp_path, published, options, message, capsys):
    assert run(published, tmp_path / "out", *options) != 0
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
