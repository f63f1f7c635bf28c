"""A run stopped and resumed equals a run left alone, bit for bit, however it was stopped."""

import json
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dsv3.config import (
    BalanceConfig,
    BatchConfig,
    DataConfig,
    EvaluationConfig,
    LearningRateConfig,
    ModelConfig,
    MtpLossConfig,
    OptimConfig,
    PrecisionConfig,
    PretrainConfig,
    RuntimeConfig,
    SnapshotConfig,
    SourceConfig,
)
from dsv3.config.files import write_config
from dsv3.train.loop import pretrain

TRAIN = """
import sys
from pathlib import Path
from dsv3.config.files import read_config
from dsv3.train.loop import pretrain

def tell(event):
    print(event.kind, event.step, flush=True)

pretrain(read_config(Path(sys.argv[1])), folder=Path(sys.argv[2]), on_event=tell)
"""


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    chance = random.Random(0)
    words = ["sea", "moon", "river", "stone", "light", "walks", "sleeps", "sings"]
    for number in range(50):
        lines = [" ".join(chance.choices(words, k=6)) + ".\n" for _ in range(15)]
        (folder / f"{number}.txt").write_text("".join(lines), encoding="utf-8")
    return folder


@pytest.fixture
def config(text: Path) -> PretrainConfig:
    """Twenty-two steps through every schedule: growing batch, two MTP modules, every phase of learning rate."""
    return PretrainConfig(
        total_tokens=2400,
        precision=PrecisionConfig(recipe="original"),  # in FP8: tests/train/test_precision.py
        model=ModelConfig(
            vocab_size=310,
            hidden_size=32,
            num_hidden_layers=2,
            initializer_range=0.02,
            max_position_embeddings=64,
            num_attention_heads=2,
            q_lora_rank=16,
            kv_lora_rank=8,
            qk_nope_head_dim=8,
            qk_rope_head_dim=4,
            v_head_dim=8,
            intermediate_size=48,
            moe_intermediate_size=16,
            first_k_dense_replace=1,
            n_routed_experts=8,
            num_experts_per_tok=2,
            n_group=2,
            topk_group=1,
            num_nextn_predict_layers=2,
        ),
        data=DataConfig(sources=(SourceConfig(path=str(text)),), held_out_rate=0.1),
        batch=BatchConfig(
            sequence_length=24,
            start_sequences=3,
            final_sequences=6,
            ramp_tokens=1200,
            multiple_of=1,
            micro_batch_sequences=2,
        ),
        optim=OptimConfig(
            learning_rate=LearningRateConfig(
                peak=1e-2,
                warmup_steps=3,
                constant_until_tokens=800,
                cosine_until_tokens=1800,
                hold_until_tokens=2100,
                cosine_floor=1e-3,
                final=5e-4,
            ),
            ema_decay=0.9,
        ),
        mtp=MtpLossConfig(switch_tokens=1000),
        balance=BalanceConfig(bias_update_speed=0.01, bias_freeze_tokens=1900),
        snapshot=SnapshotConfig(every_steps=3),
        evaluation=EvaluationConfig(every_steps=8, max_tokens=300),
        runtime=RuntimeConfig(device="cpu", threads=1),
    )


def remains(folder: Path) -> dict[str, Any]:
    """Everything a finished run leaves that a reader could tell apart, but for times."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    timeless = [
        {name: value for name, value in record.items() if name not in ("seconds", "tokens_per_second")}
        for record in lines
        if record["kind"] != "resume"
    ]
    files = [
        path for place in ("snapshots", "export") for path in sorted((folder / place).rglob("*")) if path.is_file()
    ]
    last = [path for path in files if "step-" not in str(path) or path.parent.name == newest(folder)]
    return {"metrics": timeless} | {str(path.relative_to(folder)): path.read_bytes() for path in last}


def newest(folder: Path) -> str:
    return max(path.name for path in (folder / "snapshots").iterdir())


def require_same(one: Path, other: Path) -> None:
    ours, theirs = remains(one), remains(other)
    assert ours["metrics"] == theirs["metrics"]
    assert ours.keys() == theirs.keys()
    assert any(name.endswith("step-000022/model.safetensors") for name in ours)
    assert any(name.startswith("export/model") for name in ours)
    for name in ours:
        assert ours[name] == theirs[name], f"{name} differs"


@pytest.mark.parametrize(
    ("method", "dtype"), [("bias", "float32"), pytest.param("batch_loss", "bfloat16", marks=pytest.mark.slow)]
)
def test_a_run_stopped_after_every_few_steps_equals_one_left_alone(
    config: PretrainConfig, tmp_path: Path, method: str, dtype: str
):
    config = replace(
        config, balance=replace(config.balance, method=method), runtime=replace(config.runtime, dtype=dtype)
    )
    assert pretrain(config, folder=tmp_path / "alone").step == 22
    for steps in (1, 4, 5, 1, 7, None):
        pretrain(config, folder=tmp_path / "stopped", stop_after_steps=steps)
    require_same(tmp_path / "alone", tmp_path / "stopped")


@pytest.mark.slow  # not for its work: on a machine busy with other things, two threads mostly wait for each other
def test_on_two_threads_too(config: PretrainConfig, tmp_path: Path):
    config = replace(config, runtime=replace(config.runtime, threads=2))
    threads = torch.get_num_threads()
    try:
        pretrain(config, folder=tmp_path / "alone")
        for steps in (10, None):
            pretrain(config, folder=tmp_path / "stopped", stop_after_steps=steps)
    finally:
        torch.set_num_threads(threads)
    require_same(tmp_path / "alone", tmp_path / "stopped")


@pytest.mark.slow
def test_a_run_killed_at_random_moments_equals_one_left_alone(config: PretrainConfig, tmp_path: Path):
    pretrain(config, folder=tmp_path / "alone")
    settings = tmp_path / "settings.json"
    write_config(config, path=settings)
    chance = random.Random(7)
    starts = []
    for _ in range(3):
        command = [sys.executable, "-c", TRAIN, str(settings), str(tmp_path / "killed")]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None
        with child.stdout as told:
            steps = 0
            for line in told:
                kind, step = line.split()
                if kind == "step":
                    steps += 1
                    if steps == 1:
                        starts.append(int(step))
                if steps == 3 + 2 * len(starts):
                    time.sleep(chance.uniform(0, 0.06))  # into the next steps, a validation or a snapshot
                    child.send_signal(signal.SIGKILL)
                    break
        assert child.wait() == -signal.SIGKILL
    assert starts[0] == 1
    assert starts[1] >= 4, "the second process went on from a snapshot"
    assert starts[2] > starts[1]
    assert pretrain(config, folder=tmp_path / "killed").step == 22
    require_same(tmp_path / "alone", tmp_path / "killed")
