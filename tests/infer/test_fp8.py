"""`load(folder, weights="fp8")`: one byte a weight in memory, whatever the folder holds."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dsv3.checkpoint.names import published_layout
from dsv3.checkpoint.published import load_published, save_published
from dsv3.checkpoint.snapshot import save_snapshot
from dsv3.checkpoint.writer import FP8
from dsv3.config import SnapshotConfig
from dsv3.config.files import read_config, write_config
from dsv3.errors import CheckpointError, ConfigError
from dsv3.infer.conversation import Conversation
from dsv3.infer.loaded import load
from dsv3.model.transformer import Transformer
from dsv3.plan.memory import weight_bytes
from dsv3.plan.published_tensors import quantised_size
from dsv3.runtime.log import say_once

CPU = {"device": "cpu", "plain": True}
IDS = [0, 5, 9, 260, 17, 17, 3]


@pytest.fixture(scope="module")
def model_config(model_config):
    """Matrices of several blocks; those of experts begin and end within one."""
    return replace(
        model_config, hidden_size=200, intermediate_size=300, moe_intermediate_size=136, kv_lora_rank=40, v_head_dim=70
    )


@pytest.fixture(scope="module")
def model(model_config):
    """Here again, so that the one of other tests is not taken."""
    model = Transformer(model_config)
    model.init_weights(generator=torch.Generator().manual_seed(3))
    return model.requires_grad_(False)


@pytest.fixture
def in_fp8(tmp_path, model, published):
    """The folder `published` again, as it would be released."""
    tokenizer = published.parent / "tokenizer"
    save_published(model, folder=tmp_path / "fp8", tokenizer_folder=tokenizer, dtype=FP8)
    return tmp_path / "fp8"


def num_bytes(model: Transformer) -> int:
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def fp8_state(model: Transformer) -> dict[str, torch.Tensor]:
    """Return numbers in FP8, as bytes, and their scales."""
    state = model.state_dict()
    names = [name for name, tensor in state.items() if tensor.dtype == FP8]
    assert set(names) == {tensor.source for tensor in published_layout(model.config) if tensor.in_fp8}
    return {name: state[name].view(torch.uint8) for name in names} | {
        f"{name}_scale_inv": state[f"{name}_scale_inv"] for name in names
    }


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_logits_are_those_of_the_same_checkpoint_dequantised(in_fp8):
    ours, plain = load(in_fp8, weights="fp8", **CPU), load(in_fp8, weights="fp32", **CPU)
    expected = plain.logits(IDS)
    assert (ours.logits(IDS) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_text_is_that_of_the_same_checkpoint_dequantised(in_fp8):
    ours, plain = load(in_fp8, weights="fp8", **CPU), load(in_fp8, weights="fp32", **CPU)
    for settings in ({"temperature": 0.0}, {"temperature": 1.0, "seed": 3}):
        text = ours.generate("In the beginning", max_tokens=16, **settings)
        assert text == plain.generate("In the beginning", max_tokens=16, **settings)


def test_a_conversation_goes_on_over_the_cache(in_fp8):
    loaded = load(in_fp8, weights="fp8", **CPU)
    talk = Conversation(loaded, as_text=True)
    first = "".join(talk.ask("In", max_tokens=4, temperature=0.0))
    talk.remember("In", answer=first)
    again = "".join(talk.ask("the", max_tokens=4, temperature=0.0))
    assert again == loaded.generate(f"In\n{first}\nthe", max_tokens=4, temperature=0.0)


def test_weights_take_the_predicted_bytes(in_fp8):
    """The plan is for BF16 beside FP8; here the rest is in FP32, but for router biases, which always are."""
    model = load(in_fp8, weights="fp8", **CPU).model
    config = model.config
    biases = (config.num_moe_layers + config.num_nextn_predict_layers) * config.n_routed_experts
    rest = weight_bytes(config, precision="float32") // 4 - biases - quantised_size(config).values
    assert num_bytes(model) == weight_bytes(config, precision="fp8") + 2 * rest
    assert num_bytes(model.to(torch.bfloat16)) == weight_bytes(config, precision="fp8")


def test_everything_else_is_in_the_type_that_is_computed_in(in_fp8):
    model = load(in_fp8, weights="fp8", **CPU).model
    kinds = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    assert {kind for name, kind in kinds.items() if kind != FP8} == {torch.float32}
    assert (
        kinds["lm_head.weight"] == kinds["mtp.0.eh_proj.weight"] == kinds["layers.1.mlp.gate.weight"] == torch.float32
    )


def test_a_checkpoint_of_another_type_is_rounded_as_its_fp8_export_is(published, in_fp8):
    assert same(
        fp8_state(load(published, weights="fp8", **CPU).model), fp8_state(load(in_fp8, weights="fp8", **CPU).model)
    )


def test_a_snapshot_is_rounded_as_its_fp8_export_is(run_with_snapshots, in_fp8):
    ours, exported = load(run_with_snapshots, weights="fp8", **CPU).model, load(in_fp8, weights="fp8", **CPU).model
    assert same(fp8_state(ours), fp8_state(exported))
    for name, tensor in ours.state_dict().items():  # all else went through BF16 in the file
        if tensor.dtype == torch.float32 and not name.endswith(("_scale_inv", "correction_bias")):
            assert torch.equal(tensor.bfloat16().float(), exported.state_dict()[name]), name


def test_the_average_of_a_run_can_be_used_in_fp8(run_with_snapshots, average):
    ours = load(run_with_snapshots, weights="fp8", average=True, **CPU).model
    assert torch.equal(ours.lm_head.weight, average["lm_head.weight"])
    assert len(fp8_state(ours)) == 2 * len(ours.weights_in_fp8())


def test_a_snapshot_that_reads_the_hidden_state_first_keeps_its_order(new_run, model_config):
    """Unlike an export, which exchanges the halves of eh_proj."""
    config = replace(model_config, mtp_concat_order="hidden_first")
    model = Transformer(config)
    model.init_weights(generator=torch.Generator().manual_seed(5))
    run = read_config(new_run / "config.json")
    write_config(replace(run, model=config), path=new_run / "config.json")
    tensors = {"model": model.state_dict()}
    save_snapshot(new_run / "snapshots", step=1, tensors=tensors, state={}, policy=SnapshotConfig())
    for weights in ("fp32", "fp8"):
        assert torch.equal(
            load(new_run, weights=weights, **CPU).model.mtp[0].eh_proj.weight, model.mtp[0].eh_proj.weight
        )


def test_a_weight_that_is_not_finite_is_refused_by_name(run_with_snapshots, model, new_run):
    broken = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    broken["layers.1.mlp.experts.gate_up_proj"][3, 140, 7] = float("nan")
    policy = SnapshotConfig(keep_last=5)
    save_snapshot(new_run / "snapshots", step=30, tensors={"model": broken}, state={}, policy=policy)
    with pytest.raises(
        CheckpointError, match=r"layers.1.mlp.experts.3.up_proj.weight cannot be in FP8: 1 of its values"
    ):
        load(run_with_snapshots, weights="fp8", **CPU)
    load(run_with_snapshots, weights="fp32", **CPU)


def test_a_format_of_the_engine_alone_is_refused_where_that_is_not_used(in_fp8):
    with pytest.raises(ConfigError, match=r"weights = 'int4' are for the engine's own C\+\+"):
        load(in_fp8, weights="int4", **CPU)


def test_what_is_computed_in_is_said_in_the_log_once(in_fp8, log):
    say_once.cache_clear()
    loaded = load(in_fp8, weights="fp8", **CPU)
    loaded.logits(IDS)
    said = log.text
    assert "weights stay in FP8 in memory; products on cpu are computed as if they were dequantised" in said
    loaded.logits(IDS)
    assert log.text == said


def test_saved_again_it_is_the_same_checkpoint(in_fp8, tmp_path):
    stored = load(in_fp8, weights="fp8", **CPU).model
    save_published(stored, folder=tmp_path / "again", tokenizer_folder=None, dtype=FP8)
    again = load_published(tmp_path / "again", dtype=FP8, device="cpu")
    assert same(fp8_state(again), fp8_state(stored))
    save_published(stored, folder=tmp_path / "plain", tokenizer_folder=None, dtype=torch.float32)
    plain = load_published(tmp_path / "plain", dtype=torch.float32, device="cpu").state_dict()
    expected = load_published(in_fp8, dtype=torch.float32, device="cpu").state_dict()
    assert all(torch.equal(plain[name], expected[name]) for name in expected)


PEAK = """
import torch
from dsv3.batch import TokenBatch
from dsv3.config import ModelConfig
from dsv3.model.transformer import Transformer

torch.set_num_threads(1)
with torch.device("meta"):
    model = Transformer(ModelConfig(**{config!r}))
    model.make_room_in_fp8()
model.to_empty(device="cpu")
for tensor in (*model.parameters(), *model.buffers()):
    tensor.view(torch.uint8).zero_()

def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024

def run(length):
    with torch.no_grad():
        model(TokenBatch.from_sequences([list(range(length))]))

run(1)
before = peak()
run({length})
print(sum(tensor.nbytes for tensor in model.parameters()), peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads the peak of memory from Linux's /proc")
@pytest.mark.parametrize("length", [2, 100], ids=["few rows", "many rows"])
def test_no_large_matrix_is_ever_held_wide(length):
    """Three matrices of 34 MB, which would be 134 MB each in FP32; at most 256 rows of them are wide, 8 MB.

    The library behind torch.mm takes memory of its own, about as much as a panel.
    """
    config = {
        "vocab_size": 256,
        "hidden_size": 4096,
        "intermediate_size": 8192,
        "num_hidden_layers": 1,
        "first_k_dense_replace": 1,
        "num_nextn_predict_layers": 0,
        "num_attention_heads": 2,
        "q_lora_rank": 64,
        "kv_lora_rank": 64,
    }
    script = PEAK.format(config=config, length=length)
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    weights, more = map(int, run.stdout.split())
    assert weights > 3 * 33e6
    assert more < 67e6  # half of one
