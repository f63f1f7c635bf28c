"""What a run writes down while it trains: metrics.jsonl for programs and the report, event files for TensorBoard.

The two say the same. A resumed run first forgets everything after the snapshot it goes on from, so that no step
stands there twice.
"""

import json
import math
import os
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

from dsv3.runtime.atomic import whole_file
from dsv3.train.step import StepMetrics
from dsv3.train.tensorboard import Board
from dsv3.train.validation import ValidationResult

LOAD_EVERY_STEPS = 10
"""Steps between two records of the load of every expert."""


class MetricsLog:
    """Appends to `metrics.jsonl`, `samples.jsonl` and `tensorboard/` of a run folder."""

    def __init__(self, folder: Path, *, resumed_step: int) -> None:
        """Open the files for a run that goes on after `resumed_step`, 0 for a new one."""
        self._files = [folder / "metrics.jsonl", folder / "samples.jsonl"]
        for file in self._files:
            forget_after(file, step=resumed_step)
        with ExitStack() as opened:
            self._metrics, self._samples = (
                opened.enter_context(file.open("a", encoding="utf-8")) for file in self._files
            )
            self._board = opened.enter_context(closing(Board(folder / "tensorboard", resumed_step=resumed_step)))
            self._opened = opened.pop_all()
        if resumed_step:
            self._write({"kind": "resume", "step": resumed_step})

    def step(self, metrics: StepMetrics, *, seconds: float, rank_seconds: Sequence[float] = ()) -> dict[str, Any]:
        """Record a step, and on some steps the load of every expert.

        Of several ranks, `rank_seconds` says how long each has computed, and not waited for others.
        """
        record = {
            "kind": "step",
            "step": metrics.step,
            "tokens": metrics.tokens,
            "loss": metrics.loss,
            "mtp_loss": list(metrics.mtp_loss),
            "mtp_weight": metrics.mtp_weight,
            "balance_loss": metrics.balance_loss,
            "grad_norm": metrics.gradient_norm,
            "learning_rate": metrics.learning_rate,
            "batch_sequences": metrics.batch_sequences,
            "bias_update_speed": metrics.bias_update_speed,
            "max_violation": metrics.max_violation,
            "wire_bytes": metrics.wire_bytes,
            "seconds": seconds,
            "tokens_per_second": metrics.batch_tokens / seconds,
        }
        if len(rank_seconds) > 1:
            record |= {
                "rank_seconds": list(rank_seconds),
                "rank_loss": list(metrics.rank_loss),
                "rank_grad_norm": list(metrics.rank_gradient_norm),
            }
        self._write(record)
        if metrics.step == 1 or metrics.step % LOAD_EVERY_STEPS == 0:
            self._write({"kind": "load", "step": metrics.step, "load": [load.tolist() for load in metrics.load]})
        self._draw("train", record, step=metrics.step)
        return record

    def validation(
        self, result: ValidationResult, *, step: int, tokens: int, average: ValidationResult | None
    ) -> dict[str, Any]:
        """Record a validation, and beside it the bits per byte of the averaged weights."""
        record = {
            "kind": "validation",
            "step": step,
            "tokens": tokens,
            "bits_per_byte": result.bits_per_byte,
            "loss": result.loss,
            "mtp_loss": list(result.mtp_loss),
            "by_source": result.by_source,
            "max_violation": result.max_violation,
            "ema_bits_per_byte": None if average is None else average.bits_per_byte,
        }
        self._write(record)
        self._draw("validation", record, step=step)
        return record

    def sample(self, *, step: int, prompt: str, text: str) -> dict[str, Any]:
        """Record what the model made of a prompt."""
        record = {"kind": "sample", "step": step, "prompt": prompt, "text": text}
        self._write(record)
        print(json.dumps(record, ensure_ascii=False), file=self._samples, flush=True)
        self._board.add_text(f"sample/{prompt.strip()}", text, step=step)
        return record

    def record(self, kind: str, *, step: int, values: dict[str, Any]) -> dict[str, Any]:
        """Record numbers of another kind."""
        record = {"kind": kind, "step": step, **values}
        self._write(record)
        self._draw(kind, record, step=step)
        return record

    def incident(self, kind: str, *, step: int, told: str) -> None:
        """Record something that is not as it should be."""
        self._write({"kind": kind, "step": step, "message": told})

    def force_to_disk(self) -> None:
        """Wait until all lines are on the disk: done before a snapshot, which promises that they are there."""
        self._board.force_to_disk()
        for file in (self._metrics, self._samples):
            file.flush()
            os.fsync(file.fileno())

    def close(self) -> None:
        """Close the files: all of them, even if a full disk lets one of them fail."""
        self._opened.close()

    def _write(self, record: dict[str, Any]) -> None:
        print(json.dumps(record, ensure_ascii=False, allow_nan=False), file=self._metrics, flush=True)

    def _draw(self, group: str, record: dict[str, Any], *, step: int) -> None:
        values: dict[str, float] = {}
        for name, value in record.items():
            if isinstance(value, dict):
                values |= {f"{group}/{name}/{key}": part for key, part in value.items()}
            elif isinstance(value, list):
                values |= {f"{group}/{name}/{index}": part for index, part in enumerate(value)}
            elif value is not None and name not in ("kind", "step"):
                values[f"{group}/{name}"] = value
        self._board.add_scalars({tag: float(value) for tag, value in values.items()}, step=step)


class UnwrittenLog(MetricsLog):
    """The log of a rank that leaves writing to the first: it makes the same records and keeps none."""

    def __init__(self) -> None:
        """Open nothing."""

    def sample(self, *, step: int, prompt: str, text: str) -> dict[str, Any]:
        """Return the record."""
        return {"kind": "sample", "step": step, "prompt": prompt, "text": text}

    def force_to_disk(self) -> None:
        """Nothing is on its way there."""

    def close(self) -> None:
        """Nothing is open."""

    def _write(self, record: dict[str, Any]) -> None:
        pass

    def _draw(self, group: str, record: dict[str, Any], *, step: int) -> None:
        pass


def forget_after(file: Path, *, step: int) -> None:
    """Remove from a file of JSON lines every record after `step`, and a last line that a kill has cut short."""
    if not file.exists():
        return
    lines = file.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if line.endswith(b"\n") and _step_of(line) <= step]
    if len(kept) < len(lines):
        with whole_file(file) as rewritten:
            rewritten.writelines(kept)


def _step_of(line: bytes) -> float:
    """Return the step of a line; a line that is no record belongs to no step that is kept."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf
