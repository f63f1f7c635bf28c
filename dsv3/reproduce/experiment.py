"""What an experiment is asked for, and what it gives."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dsv3.reproduce.finding import Finding


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A table or figure of the report, and how it is made again here. `dsv3.reproduce.NAME` has a function `run`."""

    name: str
    """Of the command, and of the file in this folder."""
    title: str
    source: str
    """Where the report has it."""
    how: str
    """What is done here, in a sentence or two."""
    seeds: int = 0
    """Repetitions with other initial weights, rows and tokenizer; 0 where nothing is drawn."""
    tokens: int = 0
    """Of each training run; 0 where nothing is trained, or its length is part of the experiment."""
    minutes: float = 0.1
    """About so many on one core."""

    @property
    def command(self) -> str:
        """What makes it."""
        return f"dsv3 reproduce {self.name}"


@dataclass(frozen=True, kw_only=True)
class Ask:
    """How an experiment is to be run."""

    folder: Path
    """For everything it makes: `runs/reproduce/NAME`."""
    seeds: tuple[int, ...] = ()
    tokens: int = 0
    """Of each training run."""
    tell: Callable[[str], None] = print
    """Called with a line of progress."""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A PNG in the folder of an experiment."""

    file: str
    caption: str


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What an experiment gives."""

    findings: tuple[Finding, ...]
    pictures: tuple[Picture, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What was run, as far as the catalogue does not say it."""
    data: Mapping[str, Any] = field(default_factory=dict)
    """All numbers, for JSON."""
    remark: str = ""
    """What a reader should know before believing it."""
