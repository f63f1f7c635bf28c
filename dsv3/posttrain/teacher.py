"""Who answers in distillation: a model of ours, drawn from by the engine. An endpoint is in `endpoint.py`."""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Protocol, runtime_checkable

from dsv3.config.teaching import DistillConfig
from dsv3.data.chat_template import render_chat
from dsv3.data.special_tokens import THINK_BEGIN
from dsv3.errors import TokenizerError
from dsv3.infer.loaded import LoadedModel, load
from dsv3.infer.model_folder import ModelFolder, find_model
from dsv3.posttrain.problem import Message, Problem
from dsv3.posttrain.rollout import answer_seed, draw_answers

ANSWERS_AT_ONCE = 256
"""As many as the engine computes side by side."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """A problem as the teacher is asked it."""

    place: int
    """Of the problem in its task."""
    problem: Problem
    messages: tuple[Message, ...]


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One answer of a teacher, and what it is worth."""

    number: int
    seed: int
    text: str
    num_tokens: int
    finished: bool
    """Whether the teacher ended it, and not a limit."""
    scores: Mapping[str, float] = field(default_factory=dict)
    reward: float = 0.0


@runtime_checkable
class Teacher(Protocol):
    """What distillation asks of one."""

    @property
    def identity(self) -> dict[str, str]:
        """Who it is: what stands on every line of the set."""

    def answers(
        self, questions: Sequence[Question], *, stopping: Callable[[], bool]
    ) -> Iterator[tuple[Question, list[Candidate]]]:
        """Yield questions with all their answers, in any order; once `stopping`, only those that are under way."""


class ModelTeacher:
    """A run, an export or a published folder."""

    def __init__(self, config: DistillConfig) -> None:
        self.config = config
        found = find_model(config.teacher)
        if found.tokenizer is None:
            raise TokenizerError(f"{found.weights} has no tokenizer.json, so the teacher can neither read nor answer")
        self.identity = {"teacher": config.teacher, "weights": weights_hash(found)}

    @cached_property
    def _model(self) -> LoadedModel:
        return load(self.config.teacher)

    def answers(
        self, questions: Sequence[Question], *, stopping: Callable[[], bool]
    ) -> Iterator[tuple[Question, list[Candidate]]]:
        """Draw as many answers side by side as the engine takes; each hangs on the seed and its place alone."""
        config, at_once, model = self.config, max(1, ANSWERS_AT_ONCE // self.config.candidates), self._model
        for first in range(0, len(questions), at_once):
            if stopping():
                return
            asked = questions[first : first + at_once]
            drawn = draw_answers(
                model.runner,
                tokenizer=model.tokenizer,
                problems=[replace(one.problem, messages=one.messages) for one in asked],
                group_size=config.candidates,
                temperature=config.temperature,
                max_tokens=config.max_answer_tokens,
                seed=config.seed,
                with_logprobs=False,
                places=[one.place for one in asked],
            )
            for place, question in enumerate(asked):
                prompt = render_chat(
                    model.tokenizer, messages=list(question.messages), add_generation_prompt=True
                ).rstrip()
                # R1's template has begun the thought; without its tag nobody could tell it from the answer.
                opening = THINK_BEGIN if prompt.endswith(THINK_BEGIN) else ""
                own = drawn[place * config.candidates : (place + 1) * config.candidates]
                yield (
                    question,
                    [
                        Candidate(
                            number=number,
                            seed=answer_seed(config.seed, place=question.place, number=number),
                            text=opening + answer.text,
                            num_tokens=len(answer.ids) - answer.finished,
                            finished=answer.finished,
                        )
                        for number, answer in enumerate(own)
                    ],
                )


def weights_hash(found: ModelFolder) -> str:
    """Return a hash of all files that a model's answers hang on, by their names and bytes."""
    files = {file for file in found.weights.rglob("*") if file.is_file()}
    if found.tokenizer is not None:
        files |= set(found.tokenizer.parent.glob("tokenizer*.json"))
    digest = hashlib.sha256()
    for name, same in groupby(sorted(files, key=lambda file: file.name), key=lambda file: file.name):
        for file in same:
            digest.update(f"{name}\n{file_hash(file)}\n".encode())
    return digest.hexdigest()


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
