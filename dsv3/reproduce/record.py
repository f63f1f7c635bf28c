"""The record of a reproduction on disk: what was asked, seen and concluded, on which machine, from which code."""

import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dsv3.config.files import read_json
from dsv3.reproduce.experiment import Ask, Experiment, Outcome
from dsv3.runtime.atomic import write_json

RESULT = "result.json"
CLOCK = "clock.json"
"""Seconds of earlier sittings of a run that was stopped."""


def write_record(experiment: Experiment, *, ask: Ask, outcome: Outcome, seconds: float, code: str) -> dict[str, Any]:
    """Write `result.json` into the folder of the experiment and return what is in it; `code` is the commit."""
    record = {
        **{key: value for key, value in asdict(experiment).items() if key in ("name", "title", "source", "how")},
        "command": command_of(experiment, ask=ask),
        "seeds": list(ask.seeds),
        "tokens": ask.tokens,
        "settings": dict(outcome.settings),
        "findings": [finding.as_dict() for finding in outcome.findings],
        "remark": outcome.remark,
        "pictures": [asdict(one) for one in outcome.pictures],
        "machine": machine(),
        "seconds": round(seconds, 1),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commit": code,
        "versions": {name: version(name) for name in ("torch", "numpy")},
        "data": dict(outcome.data),
    }
    write_json(record, path=ask.folder / RESULT)
    (ask.folder / CLOCK).unlink(missing_ok=True)
    return read_json(ask.folder / RESULT)


def read_record(folder: Path) -> dict[str, Any] | None:
    """Return the record of a finished experiment, None where there is none."""
    path = folder / RESULT
    return read_json(path) if path.is_file() else None


def is_of(record: Mapping[str, Any], *, seeds: Sequence[int], tokens: int) -> bool:
    """Whether a record is of these seeds and this length, so that nothing is left to do."""
    return record.get("seeds") == list(seeds) and record.get("tokens") == tokens


def command_of(experiment: Experiment, *, ask: Ask) -> str:
    """Return the command that gives this record."""
    words = [experiment.command]
    if len(ask.seeds) != experiment.seeds:
        words.append(f"--seeds {len(ask.seeds)}")
    if ask.tokens != experiment.tokens:
        words.append(f"--tokens {ask.tokens}")
    return " ".join(words)


def earlier_seconds(folder: Path, *, tokens: int) -> float:
    """Return how long earlier sittings have taken, whose runs are used again: stopped ones, or those of fewer seeds."""
    path = folder / CLOCK
    if path.is_file():
        return float(read_json(path)["seconds"])
    finished = read_record(folder)
    return float(finished["seconds"]) if finished and finished["tokens"] == tokens else 0.0


def keep_seconds(folder: Path, *, seconds: float) -> None:
    """Remember how long a sitting took that has not come to its end."""
    write_json({"seconds": seconds}, path=folder / CLOCK)


def machine() -> str:
    """Return the processor and how many of its cores this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return f"{_processor()}, {cores} core{'s' if cores > 1 else ''}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def commit() -> str:
    """Return the commit of this code, '-dirty' where it was changed since; 'unknown' of an installed package."""
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            capture_output=True,
            text=True,
            check=False,
            cwd=Path(__file__).parent,
        )
    except OSError:
        return "unknown"
    return found.stdout.strip() or "unknown"
