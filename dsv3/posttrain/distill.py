"""Distillation (report 5.1): a teacher's answers to problems, the right and concise ones, as data for fine-tuning.

    problems -> those of no evaluation -> answers of the teacher -> rewards -> the best of each problem -> set and card

A set FILE.jsonl has its card FILE.json beside it, which counts what became of everything, and FILE.candidates.jsonl,
all that the teacher said. From that a call that was stopped goes on.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dsv3.config.files import to_dict
from dsv3.config.teaching import DistillConfig
from dsv3.data.contamination import Exclusions
from dsv3.errors import ConfigError
from dsv3.posttrain.candidates import CandidateFile
from dsv3.posttrain.distilled_set import Counts, Samples, card_of, with_system, write_set
from dsv3.posttrain.problem import Problem
from dsv3.posttrain.rewards import Reward, rewards_named
from dsv3.posttrain.tasks import Task, task_named
from dsv3.posttrain.teacher import Candidate, ModelTeacher, Question, Teacher, file_hash
from dsv3.runtime.atomic import write_json
from dsv3.runtime.hold import hold_folder
from dsv3.runtime.rank import num_ranks
from dsv3.train.stop import stop_on_signals

FREE_TO_CHANGE = ("concurrency", "timeout_seconds", "retries", "key_variable")
"""Settings that change nothing of the set."""

Progress = Callable[[dict[str, Any]], None]
"""Told after each problem what has been answered."""


@dataclass(frozen=True, kw_only=True)
class DistillResult:
    """Where a call of `distill` has left the set."""

    output: Path
    answered: int
    """Problems that the teacher has answered, by this call or one before it."""
    total: int
    """Problems that it is to answer."""
    card: dict[str, Any] | None
    """What stands beside the set; None before it is whole."""

    @property
    def finished(self) -> bool:
        """Whether the set is written."""
        return self.card is not None


def distill(
    config: DistillConfig,
    *,
    output: Path,
    task: Task | None = None,
    rewards: Sequence[Reward] = (),
    teacher: Teacher | None = None,
    on_record: Progress | None = None,
    stop_after_problems: int | None = None,
) -> DistillResult:
    """Write a set of conversations to `output`, or go on with one that was stopped.

    `task`, `rewards` and `teacher` stand in the place of those that `config` names. With a model of ours for teacher, a
    set that was stopped becomes the same bytes as one left alone.

    Raises:
        ConfigError, DataError, EngineError, CheckpointError, TrainingError, MissingExtraError: as their texts say.
    """
    if num_ranks() > 1:
        raise ConfigError(f"dsv3 distill asks from one process, and torchrun has started {num_ranks()}")
    if output.suffix != ".jsonl":
        raise ConfigError(f"the set is written as JSON lines; name it {output.with_suffix('.jsonl')}, not {output}")
    rules, exclusions = list(rewards) or rewards_named(config.rewards, judge=config.judge), Exclusions(config.exclude)
    task = task or task_named(config.task)
    problems = task.training[: config.problems or None]
    teacher = teacher or open_teacher(config)
    drawn = settled(config) | {
        "task": task.name,
        "data": problems_hash(problems),
        "rewards": [f"{rule.name}={rule.weight:g}" for rule in rules],
        "exclude": {file: file_hash(Path(file)) for file in config.exclude},
        **teacher.identity,
    }
    counts = Counts(problems=len(problems), questions={file: Counter() for file in config.exclude})
    questions = clean_questions(problems, config=config, exclusions=exclusions, counts=counts)
    with (
        hold_folder(output.parent, lock=f".{output.name}.lock", doing="distilling", option="--output"),
        CandidateFile(output.with_suffix(".candidates.jsonl"), drawn=drawn) as answers,
    ):
        _ask(
            [one for one in questions if one.place not in answers],
            teacher=teacher,
            answers=answers,
            rules=rules,
            notify=lambda record: (on_record or _ignore)(record | {"total": len(questions)}),
            limit=stop_after_problems,
        )
        card = None
        if all(one.place in answers for one in questions):
            known = {"task": task.name, "dsv3": answers.version}
            made = Samples(config=config, exclusions=exclusions, counts=counts, known=known, teacher=teacher.identity)
            write_set(made.of(questions, answers=answers), output=output, counts=counts)
            card = card_of(counts, output=output, settings=drawn, version=answers.version)
            write_json(card, path=output.with_suffix(".json"))
        return DistillResult(output=output, answered=len(answers), total=len(questions), card=card)


def open_teacher(config: DistillConfig) -> Teacher:
    """Return the teacher that a config names.

    Raises:
        CheckpointError, TokenizerError: there is no model in its folder.
        ConfigError: its key is missing.
        MissingExtraError: it is asked over HTTP, and httpx is not installed.
    """
    if not config.is_endpoint:
        return ModelTeacher(config)
    from dsv3.posttrain.endpoint import EndpointTeacher

    return EndpointTeacher(config)


def settled(config: DistillConfig) -> dict[str, Any]:
    """Return the settings that a set hangs on."""
    judges = any(reward.startswith("judge:") for reward in config.rewards)
    unread = FREE_TO_CHANGE if judges else (*FREE_TO_CHANGE, "judge")
    return {name: value for name, value in to_dict(config).items() if name not in unread}


def clean_questions(
    problems: Sequence[Problem], *, config: DistillConfig, exclusions: Exclusions, counts: Counts
) -> list[Question]:
    """Return what the teacher is asked: the problems that no evaluation has."""
    asked = []
    for place, problem in enumerate(problems):
        found = exclusions.with_question([str(message.get("content") or "") for message in problem.messages])
        for file, how in found.items():
            counts.questions[file][how] += 1
        counts.contaminated += bool(found)
        if not found:
            system = config.system_prompt if config.ask_with_system else ""
            asked.append(Question(place=place, problem=problem, messages=with_system(problem.messages, prompt=system)))
    return asked


def problems_hash(problems: Sequence[Problem]) -> str:
    """Return a hash of all that problems are."""
    digest = hashlib.sha256()
    for one in problems:
        known = [one.messages, one.answer, one.tests, one.name, one.more]
        digest.update(json.dumps(known, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def _ask(
    questions: Sequence[Question],
    *,
    teacher: Teacher,
    answers: CandidateFile,
    rules: Sequence[Reward],
    notify: Progress,
    limit: int | None,
) -> None:
    """Have questions answered, judge the answers and keep all of them, until a signal comes or `limit` are."""
    if not questions:
        return
    done = right = 0
    with stop_on_signals() as stop:

        def stopping() -> bool:
            return stop.requested or (limit is not None and done >= limit)

        for question, candidates in teacher.answers(questions, stopping=stopping):
            judged = judge(candidates, problem=question.problem, rules=rules)
            answers.add(question.place, candidates=judged)
            done += 1
            right += any(one.finished and one.reward > 0 for one in judged)
            notify({"answered": len(answers), "now": done, "rewarded": right})


def judge(candidates: Sequence[Candidate], *, problem: Problem, rules: Sequence[Reward]) -> list[Candidate]:
    """Return answers to a problem with what they are worth."""
    texts = [one.text for one in candidates]
    columns = [rule.scores([problem] * len(texts), texts) for rule in rules]
    judged = []
    for place, candidate in enumerate(candidates):
        scores = {rule.name: column[place] for rule, column in zip(rules, columns, strict=True)}
        reward = sum(rule.weight * scores[rule.name] for rule in rules)
        judged.append(replace(candidate, scores=scores, reward=reward))
    return judged


def _ignore(record: dict[str, Any]) -> None:
    pass
