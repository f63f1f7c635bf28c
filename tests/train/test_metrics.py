import json
import math
from pathlib import Path

import pytest
import torch

from dsv3.train.metrics import MetricsLog, forget_after
from dsv3.train.step import StepMetrics
from dsv3.train.validation import ValidationResult


def metrics_of(step: int, *, loss: float = 3.5) -> StepMetrics:
    return StepMetrics(
        step=step,
        tokens=step * 64,
        loss=loss,
        mtp_loss=(4.5,),
        mtp_weight=0.3,
        balance_loss=1e-4,
        gradient_norm=0.7,
        learning_rate=1e-3,
        batch_sequences=2,
        batch_tokens=64,
        bias_update_speed=0.001,
        wire_bytes=0,
        load=(torch.tensor([6, 2]), torch.tensor([4, 4])),
        rank_loss=(loss,),
        rank_gradient_norm=(0.0,),
    )


VALIDATION = ValidationResult(
    bits_per_byte=2.0, loss=3.0, mtp_loss=(3.5,), by_source={"prose": 2.0}, load=(torch.tensor([3, 1]),)
)


def read(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def write_run(folder: Path, *, first: int, last: int, resumed_step: int = 0) -> None:
    folder.mkdir(exist_ok=True)
    log = MetricsLog(folder, resumed_step=resumed_step)
    for step in range(first, last + 1):
        log.step(metrics_of(step), seconds=0.5)
    log.validation(VALIDATION, step=last, tokens=last * 64, average=None)
    log.sample(step=last, prompt="Once", text=" upon\na time ✓")
    log.force_to_disk()
    log.close()


def test_every_kind_of_record_has_its_fields(tmp_path: Path):
    write_run(tmp_path, first=1, last=2)
    records = read(tmp_path / "metrics.jsonl")
    assert [record["kind"] for record in records] == ["step", "load", "step", "validation", "sample"]
    assert records[0] == {
        "kind": "step",
        "step": 1,
        "tokens": 64,
        "loss": 3.5,
        "mtp_loss": [4.5],
        "mtp_weight": 0.3,
        "balance_loss": 1e-4,
        "grad_norm": 0.7,
        "learning_rate": 1e-3,
        "batch_sequences": 2,
        "bias_update_speed": 0.001,
        "max_violation": [0.5, 0.0],
        "wire_bytes": 0,
        "seconds": 0.5,
        "tokens_per_second": 128.0,
    }
    assert records[1] == {"kind": "load", "step": 1, "load": [[6, 2], [4, 4]]}
    assert records[3] == {
        "kind": "validation",
        "step": 2,
        "tokens": 128,
        "bits_per_byte": 2.0,
        "loss": 3.0,
        "mtp_loss": [3.5],
        "by_source": {"prose": 2.0},
        "max_violation": [0.5],
        "ema_bits_per_byte": None,
    }
    assert read(tmp_path / "samples.jsonl") == [
        {"kind": "sample", "step": 2, "prompt": "Once", "text": " upon\na time ✓"}
    ]


def test_a_resumed_run_has_every_step_once(tmp_path: Path):
    write_run(tmp_path, first=1, last=14)
    write_run(tmp_path, first=9, last=16, resumed_step=8)
    records = read(tmp_path / "metrics.jsonl")
    assert [record["step"] for record in records if record["kind"] == "step"] == list(range(1, 17))
    assert [record["step"] for record in records if record["kind"] == "load"] == [1, 10]
    assert [record for record in records if record["kind"] == "resume"] == [{"kind": "resume", "step": 8}]
    assert [record["step"] for record in read(tmp_path / "samples.jsonl")] == [16]


def test_a_run_that_starts_over_forgets_the_steps_of_one_that_never_saved(tmp_path: Path):
    write_run(tmp_path, first=1, last=3)
    write_run(tmp_path, first=1, last=2)
    steps = [record["step"] for record in read(tmp_path / "metrics.jsonl") if record["kind"] == "step"]
    assert steps == [1, 2]


@pytest.mark.parametrize(
    "tail", [b'{"kind": "step", "st', b'{"kind": "step", "step": 2', b"\x00\x00\x00\n", b"[]\n", b"\xff\n"]
)
def test_a_line_that_a_kill_has_cut_short_is_dropped(tmp_path: Path, tail: bytes):
    file = tmp_path / "metrics.jsonl"
    good = b'{"kind": "step", "step": 1}\n'
    file.write_bytes(good + tail)
    forget_after(file, step=5)
    assert file.read_bytes() == good


def test_a_file_with_nothing_to_forget_is_not_touched(tmp_path: Path):
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b'{"kind": "step", "step": 1}\n')
    before = file.stat().st_ino
    forget_after(file, step=1)
    forget_after(tmp_path / "absent.jsonl", step=1)
    assert file.stat().st_ino == before


def test_a_number_that_json_cannot_hold_is_our_bug_and_not_written(tmp_path: Path):
    log = MetricsLog(tmp_path, resumed_step=0)
    with pytest.raises(ValueError, match="JSON"):
        log.step(metrics_of(1, loss=math.nan), seconds=1.0)
    log.close()


def test_tensorboard_reads_what_was_written(tmp_path: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write_run(tmp_path, first=1, last=5)
    write_run(tmp_path, first=4, last=6, resumed_step=3)
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert {"train/loss", "train/max_violation/0", "train/max_violation/1", "validation/by_source/prose"} <= set(
        board.Tags()["scalars"]
    )
    assert [event.step for event in board.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]
    assert board.Scalars("train/loss")[0].value == 3.5
    [sample] = board.Tensors("sample/Once")[-1:]
    assert sample.tensor_proto.string_val[0].decode() == " upon\na time ✓"
