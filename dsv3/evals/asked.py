"""What a benchmark asks, without what surrounds it: the texts that a training corpus must not have."""

import re
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

from dsv3.data.curation.evaluation_items import EvaluationItem
from dsv3.errors import DataError
from dsv3.evals.question import EvalTask
from dsv3.evals.tasks import TASKS

LABEL = re.compile(r"[^\s:：]{1,12}[:：]\s*")
"""What a prompt sets before a question: "Q:", "Question:", in any language."""
PARTS_OF_OTHERS = frozenset({"humaneval_infilling"})
"""Benchmarks whose prompts are lines of another's, such as any program has."""


def asked_items(data: Path, *, absent: list[str]) -> Iterator[EvaluationItem]:
    """Yield every question of the benchmarks whose files lie in a folder; `absent` takes the names of the others."""
    for name, task in TASKS.items():
        if name in PARTS_OF_OTHERS:
            continue
        try:
            texts = list(asked_texts(task, data=data))
        except DataError:
            absent.append(name)
            continue
        for text in texts:
            yield EvaluationItem(set=name, text=text)


def asked_texts(task: EvalTask, *, data: Path) -> Iterator[str]:
    """Yield the questions of one benchmark, without worked examples and the words that all its prompts have.

    Raises:
        DataError: its files are missing or damaged.
    """
    prompts: list[list[str]] = []
    for question in task.questions(data):
        # Where the options differ before what is scored, each is a prompt; the first has what all have.
        prompts.append((question.contexts[0] if question.contexts else question.prompt).split("\n"))
    begins = [_shared(first, second) for first, second in pairwise(prompts)]
    ends = [_shared(first[::-1], second[::-1]) for first, second in pairwise(prompts)]
    for place, lines in enumerate(prompts):
        # Worked examples are those of a subject: the neighbour of the same subject shows how far they go.
        begin = max(begins[max(place - 1, 0) : place + 1], default=0)
        end = max(ends[max(place - 1, 0) : place + 1], default=0)
        text = "\n".join(lines[begin : len(lines) - end] if begin + end < len(lines) else lines)
        label = LABEL.match(text)
        text = text[label.end() :] if label else text
        if text.strip():
            yield text


def _shared(first: Sequence[str], second: Sequence[str]) -> int:
    """Return how many lines two prompts have in common from their beginning."""
    count = 0
    for one, other in zip(first, second, strict=False):
        if one != other:
            break
        count += 1
    return count
