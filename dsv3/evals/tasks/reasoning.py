"""BIG-Bench Hard: 27 tasks, each after three worked chains of thought that come with them."""

import gzip
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from dsv3.errors import DataError
from dsv3.evals.question import EvalTask, Question
from dsv3.evals.tasks.answers import cut_at
from dsv3.evals.tasks.items import read_items

CANARY_ENDS = "\n-----\n"
"""What stands before it in a published prompt asks that the prompt be kept out of training; a model is not shown it."""


def bbh(folder: Path) -> Iterator[Question]:
    """Read the questions, each after the published prompt of its task."""
    path = folder / "bbh" / "cot_prompts.json.gz"
    prompts = published_prompts(path)
    for item in read_items(folder / "bbh" / "bbh.jsonl.gz"):
        task = item.text("task")
        if task not in prompts:
            raise item.broken(f"there is no prompt for '{task}' in {path}")
        yield Question(
            id=f"{task}/{item.id}",
            prompt=f"{prompts[task]}\n\nQ: {item.text('input')}\nA: Let's think step by step.",
            answer=item.text("target"),
            stop=("\n\n", "\nQ:"),
            max_tokens=1024,
            more={"task": task},
        )


def published_prompts(path: Path) -> dict[str, str]:
    """Return the worked examples of every task.

    Raises:
        DataError: the file is not there, or holds no table of texts.
    """
    try:
        found = json.loads(gzip.decompress(path.read_bytes()))
    except (OSError, EOFError, ValueError) as error:
        raise DataError(f"{path} should be a gzipped JSON table of prompts: {error}") from error
    if not isinstance(found, dict) or not all(isinstance(text, str) for text in found.values()):
        raise DataError(f"{path} should be a JSON table from task to prompt")
    return {task: text.split(CANARY_ENDS, 1)[-1].strip() for task, text in found.items()}


def answer_said(text: str) -> str | None:
    """Return what follows the last "the answer is" of a line, without a full stop."""
    _, found, said = text.rpartition("the answer is ")
    said = said.split("\n")[0].strip()
    return said.removesuffix(".").strip() if found else None


def grade(question: Question, answer: str) -> Mapping[str, float]:
    """1 if the answer is the target, letter by letter."""
    return {"EM": float(answer_said(cut_at(answer.lstrip("\n"), question.stop)) == question.answer.strip())}


REASONING = (
    EvalTask(name="bbh", protocol="generate", metric="EM", shots=3, questions=bbh, grade=grade, group_by="task"),
)
