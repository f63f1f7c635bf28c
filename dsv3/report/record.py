"""A run folder as the report reads it: whatever is there, with a sentence for whatever is not.

A run may be going on, stopped, or copied in parts from another machine. So nothing here refuses: a file that is
missing or cut off becomes an entry of `notes`, and the page is made from the rest.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsv3.data.prepared import PreparedCorpus, load_prepared
from dsv3.errors import Dsv3Error

Entry = dict[str, Any]
"""One line of metrics.jsonl."""


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """What a run left behind."""

    folder: Path
    config: dict[str, Any]
    """The resolved configuration, as written; empty when config.json cannot be read."""
    steps: list[Entry]
    loads: list[Entry]
    validations: list[Entry]
    resumes: list[Entry]
    iterations: list[Entry]
    """Of GRPO: what each rollout was worth and what was learned from it."""
    trials: list[Entry]
    """Of GRPO: how held-out problems were answered."""
    samples: list[Entry]
    """Continuations made while training and, last, those drawn at the end."""
    corpus: PreparedCorpus | None
    evaluation: dict[str, Any]
    """What `dsv3 evaluate` or the quickstart wrote to evaluation.json; empty when it has not run."""
    extension: dict[str, Any]
    """What `dsv3 extend` or the quickstart wrote to extension.json; empty when the context has not been lengthened."""
    benchmarks: dict[str, Any]
    """What `dsv3 eval run` wrote to evaluation/results.json; empty when it has not run."""
    lesson: str
    """'sft', 'reward' or 'grpo' of a run that was taught, else empty."""
    taught: "RunRecord | None"
    """The GRPO run that began with this one, where the quickstart or `dsv3 grpo` has left it."""
    notes: tuple[str, ...]
    """Sentences on what is missing or unreadable."""

    @property
    def tokens(self) -> int:
        """Tokens trained on so far."""
        return int(self.steps[-1].get("tokens", 0)) if self.steps else 0

    @property
    def total_tokens(self) -> int:
        """Tokens the run was to be trained on; 0 when unknown."""
        total = self.config.get("total_tokens", 0)
        return total if isinstance(total, int) else 0

    @property
    def is_finished(self) -> bool:
        """Whether training reached the tokens it was to reach."""
        return 0 < self.total_tokens <= self.tokens

    @property
    def seconds(self) -> float:
        """Time spent in training steps, over all sittings; validation and snapshots not counted."""
        spent = [number(step.get("seconds")) for step in self.steps]
        return math.fsum(value for value in spent if math.isfinite(value))

    @property
    def baselines(self) -> list[Entry]:
        """The baselines of the evaluation that have a number."""
        rows = self.evaluation.get("baselines")
        rows = rows if isinstance(rows, list) else []
        return [row for row in rows if isinstance(row, dict) and math.isfinite(number(row.get("bits_per_byte")))]

    @property
    def trained_baselines(self) -> list[Entry]:
        """Those that have read what the model has read: xz on the held-out text alone is none of them."""
        return [row for row in self.baselines if row.get("training_tokens")]


def read_run(folder: Path) -> RunRecord:
    """Read a run folder; whatever is missing or cut off is told in `notes`, and nothing is raised for it."""
    notes: list[str] = []
    config = read_object(folder / "config.json", notes=notes, what="the resolved configuration")
    entries = read_lines(folder / "metrics.jsonl", notes=notes)
    if not any(entry.get("kind") in ("step", "grpo") for entry in entries):
        notes.append("No training step has been recorded yet (metrics.jsonl).")
    lesson = next((name for name in ("sft", "reward", "grpo") if (folder / f"{name}.json").exists()), "")
    evaluation: dict[str, Any] = {}
    if (folder / "evaluation.json").exists():
        evaluation = read_object(folder / "evaluation.json", notes=notes, what="the evaluation")
    elif not lesson:
        notes.append("The model has not been compared with the baselines yet (evaluation.json).")
    extension: dict[str, Any] = {}
    if (folder / "extension.json").exists():
        extension = read_object(folder / "extension.json", notes=notes, what="the extension of the context")
    benchmarks: dict[str, Any] = {}
    if (folder / "evaluation" / "results.json").exists():
        benchmarks = read_object(folder / "evaluation" / "results.json", notes=notes, what="the benchmarks")
    closing = read_lines(folder / "samples.jsonl", notes=None)
    by_kind: dict[str, list[Entry]] = {}
    for entry in entries:
        by_kind.setdefault(str(entry.get("kind")), []).append(entry)
    later = next((path for path in (folder / "sft" / "grpo", folder / "grpo") if (path / "grpo.json").exists()), None)
    return RunRecord(
        folder=folder,
        config=config,
        steps=by_kind.get("step", []),
        loads=by_kind.get("load", []),
        validations=by_kind.get("validation", []),
        resumes=by_kind.get("resume", []),
        iterations=by_kind.get("grpo", []),
        trials=by_kind.get("grpo_validation", []),
        lesson=lesson,
        samples=distinct(by_kind.get("sample", []) + [entry for entry in closing if "text" in entry]),
        corpus=read_corpus(folder / "corpus", notes=[] if lesson else notes),
        evaluation=evaluation,
        extension=extension,
        benchmarks=benchmarks,
        taught=None if later is None else read_run(later),
        notes=tuple(notes),
    )


def read_object(path: Path, *, notes: list[str], what: str) -> dict[str, Any]:
    """Read a JSON object; an unreadable one becomes a note and an empty result."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        notes.append(f"{path.name} is not there, so {what} cannot be shown.")
        return {}
    except (OSError, ValueError) as error:
        notes.append(f"{path.name} cannot be read ({error}), so {what} is not shown.")
        return {}
    return value if isinstance(value, dict) else {}


def read_lines(path: Path, *, notes: list[str] | None) -> list[Entry]:
    """Read JSON lines; a line that is cut off (a run killed while writing) is left out and counted in a note."""
    entries: list[Entry] = []
    unreadable = 0
    try:
        with path.open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                try:
                    entry = json.loads(line)
                except ValueError:
                    unreadable += 1
                    continue
                if isinstance(entry, dict):
                    entries.append(entry)
    except OSError:
        if notes is not None:
            notes.append(f"{path.name} is not there.")
    if unreadable and notes is not None:
        notes.append(f"{unreadable} line(s) of {path.name} are cut off or damaged, and left out.")
    return entries


def distinct(samples: list[Entry]) -> list[Entry]:
    """Return each sample once: training writes its samples to both files."""
    found: dict[str, Entry] = {}
    for entry in samples:
        key = json.dumps([entry.get(name) for name in ("step", "prompt", "text", "temperature")], default=str)
        found.setdefault(key, entry)
    return list(found.values())


def read_corpus(folder: Path, *, notes: list[str]) -> PreparedCorpus | None:
    """Return what the corpus says of itself, or nothing and a note."""
    try:
        return load_prepared(folder)
    except Dsv3Error as error:
        notes.append(f"The composition of the corpus is not known: {error}.")
        return None


def number(value: object) -> float:
    """Return a finite number as float and anything else (null, text, absent) as NaN, which charts leave out."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    return float(value)


def numbers(value: object) -> list[float]:
    """Return a list of numbers as floats; anything but a list has none."""
    return [number(item) for item in value] if isinstance(value, list) else []
