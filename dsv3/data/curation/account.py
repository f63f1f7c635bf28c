"""What became of every document: counted by each step of each task, added up at the end."""

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dsv3.data.chance import hash_text
from dsv3.runtime.atomic import write_json

EXCERPT = 400
"""Characters of a dropped document that are kept to be looked at."""

Sample = tuple[int, str, str]
"""Hash of a document's name, its name, how it begins. The lowest hashes are kept, whatever the number of tasks."""


@dataclass(kw_only=True)
class StepAccount:
    """What one step did to the documents of one task, or of all."""

    name: str
    documents: int = 0
    bytes: int = 0
    """Of what came in."""
    kept_documents: int = 0
    kept_bytes: int = 0
    dropped: dict[str, list[int]] = field(default_factory=dict)
    """Reason -> documents, bytes."""
    samples: dict[str, list[Sample]] = field(default_factory=dict)
    """Reason -> some of those dropped."""
    noted: Counter[str] = field(default_factory=Counter)
    """Whatever else the step counts: how often it changed what."""
    seconds: float = 0.0
    """Spent in this step, of one core."""

    def drop(self, name: str, *, text: str, size: int, reason: str, keep: int) -> None:
        """Count a document that is dropped; of each reason `keep` are shown."""
        entry = self.dropped.setdefault(reason, [0, 0])
        entry[0] += 1
        entry[1] += size
        samples = self.samples.setdefault(reason, [])
        hashed = hash_text(name)
        if len(samples) < keep or hashed < samples[-1][0]:
            samples.append((hashed, name, text[:EXCERPT]))
            samples.sort()
            del samples[keep:]

    def keep(self, size: int) -> None:
        """Count a document that goes on."""
        self.kept_documents += 1
        self.kept_bytes += size

    def add(self, other: "StepAccount", *, keep: int) -> None:
        """Add the account of another task."""
        self.documents += other.documents
        self.bytes += other.bytes
        self.kept_documents += other.kept_documents
        self.kept_bytes += other.kept_bytes
        self.seconds += other.seconds
        self.noted.update(other.noted)
        for reason, (documents, size) in other.dropped.items():
            entry = self.dropped.setdefault(reason, [0, 0])
            entry[0] += documents
            entry[1] += size
        for reason, samples in other.samples.items():
            self.samples[reason] = sorted([*self.samples.get(reason, []), *samples])[:keep]


def write_account(accounts: Iterable[StepAccount], *, path: Path, **more: Any) -> None:
    """Write what one task did, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json({"steps": [vars(account) for account in accounts], **more}, path=path)


def read_account(path: Path) -> tuple[list[StepAccount], dict[str, Any]]:
    """Return what a task wrote: its steps, and whatever else."""
    values = json.loads(path.read_text(encoding="utf-8"))
    steps = [
        StepAccount(
            **{
                **step,
                "noted": Counter(step["noted"]),
                "samples": {reason: [tuple(one) for one in some] for reason, some in step["samples"].items()},
            }
        )
        for step in values.pop("steps")
    ]
    return steps, values


def add_up(parts: Iterable[list[StepAccount]], *, keep: int) -> list[StepAccount]:
    """Return the accounts of all tasks as one for each step."""
    total: dict[str, StepAccount] = {}
    for part in parts:
        for account in part:
            total.setdefault(account.name, StepAccount(name=account.name)).add(account, keep=keep)
    return list(total.values())
