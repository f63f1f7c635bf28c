"""Answers drawn for the next iteration while this one is learned from, by weights that are one rollout old at most.

They are drawn in a thread beside the updates: the engine computes outside Python. Their log-probabilities are those of
the weights that drew them, so the clipped ratio sees how far the policy has moved since. What is drawn ahead belongs to
the run: it is written beside each snapshot, and a run that goes on learns from the same answers.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from dsv3.data.tokenizer import Tokenizer
from dsv3.errors import SnapshotError
from dsv3.posttrain.problem import Problem
from dsv3.posttrain.rollout import Answer, prompt_of

FOLDER = "drawn_ahead"


class Ahead:
    """The answers of one iteration to come, being drawn or there already."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="rollout")
        self._number = -1
        self._answers: Future[list[Answer]] | None = None

    def begin(self, number: int, draw: Callable[[], list[Answer]]) -> None:
        """Draw the answers of iteration `number` beside what follows."""
        assert self._answers is None, "one rollout at a time, or weights would be older than said"
        self._number, self._answers = number, self._thread.submit(draw)

    def take(self, number: int) -> list[Answer] | None:
        """Return this rank's answers of iteration `number`, once they are there; None if nobody draws them."""
        if self._answers is None or self._number != number:
            return None
        answers, self._answers = self._answers.result(), None
        return answers

    def waiting(self) -> tuple[int, list[Answer]] | None:
        """Return what is drawn and not taken yet, and for which iteration, once it is there."""
        return None if self._answers is None else (self._number, self._answers.result())

    def restore(self, number: int, answers: list[Answer]) -> None:
        """Have answers that an earlier sitting has drawn."""
        self._number, self._answers = number, Future()
        self._answers.set_result(answers)

    def close(self) -> None:
        """Wait for the thread to end."""
        self._thread.shutdown(wait=True)


def write_answers(folder: Path, *, step: int, number: int, answers: Sequence[Answer]) -> None:
    """Write the answers of iteration `number`, of all ranks, that belong to the snapshot of `step`.

    Comes before the snapshot, so that none is without them.
    """
    place = folder / FOLDER
    place.mkdir(exist_ok=True)
    rows = [
        {
            "ids": answer.ids,
            "logprobs": answer.logprobs,
            "experts": answer.experts,
            "text": answer.text,
            "finished": answer.finished,
        }
        for answer in answers
    ]
    partial = place / "partial.pt"
    torch.save({"number": number, "answers": rows}, partial)
    partial.rename(_file(folder, step=step))


def forget_answers(folder: Path) -> None:
    """Remove the answers that belonged to snapshots that are gone."""
    for file in (folder / FOLDER).glob("step-*.pt"):
        if not (folder / "snapshots" / file.stem).exists():
            file.unlink()


def read_answers(
    folder: Path, *, step: int, problems_of: Callable[[int], Sequence[Problem]], group_size: int, tokenizer: Tokenizer
) -> tuple[int, list[Answer]] | None:
    """Return the answers beside the snapshot of `step`, and which iteration they are for; None if there are none.

    Raises:
        SnapshotError: they cannot be read, or are not `group_size` to each problem.
    """
    file = _file(folder, step=step)
    if not file.exists():
        return None
    try:
        saved: dict[str, Any] = torch.load(file, weights_only=True)
        number, rows = saved["number"], saved["answers"]
    except Exception as error:  # torch names no classes of its own for a damaged file
        raise SnapshotError(f"{file} cannot be read ({error}); remove it to draw its answers anew") from error
    problems = problems_of(number)
    if len(rows) != len(problems) * group_size:
        raise SnapshotError(f"{file} has {len(rows)} answers; {len(problems)} problems have {group_size} each")
    answers = []
    for place, problem in enumerate(problems):
        prompt = prompt_of(problem, tokenizer=tokenizer)
        for row in rows[place * group_size : (place + 1) * group_size]:
            answers.append(Answer(problem=problem, prompt_ids=prompt, **row))
    return number, answers


def _file(folder: Path, *, step: int) -> Path:
    return folder / FOLDER / f"step-{step:06d}.pt"
