"""What an evaluation asks: one question of one task, and how its answer is judged.

A task is read from a folder of files into questions; the runner asks a model for what each protocol needs and hands the
answer to the task's own rule.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Question:
    """One item, as the model is asked it."""

    id: str
    """Unique within its task; a broken run goes on by it."""
    prompt: str
    """Everything before the answer, shots included; for a conversation, its last user message."""
    choices: tuple[str, ...] = ()
    """For protocol 'choices': continuations of `prompt`, of which the likeliest is the answer."""
    contexts: tuple[str, ...] = ()
    """For protocol 'choices' where the options differ before what is scored (WinoGrande): one prompt each."""
    answer: Any = None
    """What is right: the place of a choice, or what the task's rule compares with."""
    stop: tuple[str, ...] = ()
    """For protocol 'generate': texts that end an answer."""
    max_tokens: int = 512
    more: Mapping[str, Any] = field(default_factory=dict)
    """Whatever else the task's rule reads (tests of a program, instructions, a language)."""


@dataclass(frozen=True, kw_only=True)
class EvalTask:
    """A benchmark: where its questions come from, and what an answer is worth."""

    name: str
    """As on the command line: 'gsm8k'."""
    protocol: str
    """'choices' (report: perplexity-based), 'generate', or 'rolling' (bits per byte of `prompt`)."""
    metric: str
    """As published: 'EM', 'F1', 'pass@1', 'BPB'."""
    shots: int
    """Worked examples before a question, as published."""
    questions: Callable[[Path], Iterator[Question]]
    """Reads a folder as the data lie there. Raises DataError that names the file and item."""
    grade: Callable[[Question, str], Mapping[str, float]] | None = None
    """For 'generate': scores of an answer by name, the task's metric first. 'choices' are scored by the runner."""
    normalise: str = "none"
    """For 'choices', what a log-likelihood is divided by: 'none', 'bytes' or 'tokens' (6.1: length, but for ARC)."""
    chat: bool = False
    """For chat models: the prompt is a user's message."""
    group_by: str = ""
    """Key of `Question.more` by which scores are also told apart (subject, language)."""
    ratios: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    """Scores that are a sum over a sum, and no mean over questions: name -> the scores above and below."""
    note: str = ""
    """Where this differs from the published protocol."""
