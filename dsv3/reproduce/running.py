"""One experiment from the asking to the verdict on disk; a run that was stopped goes on where it was."""

import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from dsv3.errors import ConfigError
from dsv3.reproduce.experiment import Ask, Experiment
from dsv3.reproduce.record import commit, earlier_seconds, is_of, keep_seconds, read_record, write_record


def reproduce(
    experiment: Experiment,
    *,
    root: Path,
    seeds: int | None = None,
    tokens: int | None = None,
    tell: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Run an experiment in `root/NAME` and return its record; one that is finished is not run again.

    Raises:
        ConfigError: seeds for what draws nothing, tokens for what trains nothing.
    """
    ask = Ask(
        folder=root / experiment.name,
        seeds=tuple(range(_seeds(experiment, asked=seeds))),
        tokens=_tokens(experiment, asked=tokens),
        tell=tell,
    )
    finished = read_record(ask.folder)
    if finished is not None and is_of(finished, seeds=ask.seeds, tokens=ask.tokens):
        tell(f"{experiment.name} was made on {finished['date']}; remove {ask.folder} to make it again")
        return finished
    ask.folder.mkdir(parents=True, exist_ok=True)
    before, began = earlier_seconds(ask.folder, tokens=ask.tokens), time.monotonic()
    code = commit()  # before it can change while the run goes on
    try:
        outcome = import_module(f"dsv3.reproduce.{experiment.name}").run(ask)
    except BaseException:
        keep_seconds(ask.folder, seconds=before + time.monotonic() - began)
        raise
    return write_record(experiment, ask=ask, outcome=outcome, seconds=before + time.monotonic() - began, code=code)


def _seeds(experiment: Experiment, *, asked: int | None) -> int:
    if asked is not None and not experiment.seeds:
        raise ConfigError(f"--seeds {asked}: nothing is drawn in '{experiment.name}', or one run of it takes too long")
    return experiment.seeds if asked is None else asked


def _tokens(experiment: Experiment, *, asked: int | None) -> int:
    if asked is not None and not experiment.tokens:
        raise ConfigError(f"--tokens {asked}: '{experiment.name}' has no training runs of a length to choose")
    return experiment.tokens if asked is None else asked


def verdict_text(record: dict[str, Any]) -> str:
    """Return what was concluded, a finding a paragraph, for a terminal."""
    lines = [f"{record['title']} ({record['source']})"]
    for finding in record["findings"]:
        lines += [
            f"  {finding['verdict']:<18} {finding['claim']}",
            f"  {'':<18} report: {finding['report']}",
            f"  {'':<18} seen:   {finding['seen']}",
        ]
    if record["remark"]:
        lines.append(f"  {record['remark']}")
    lines.append(f"  {record['machine']}; {duration(record['seconds'])}; commit {record['commit']}")
    return "\n".join(lines)


def duration(seconds: float) -> str:
    """Write a time as one says it."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min"
