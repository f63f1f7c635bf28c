"""Distillation (report 5.1): a teacher's answers to problems, the right and concise ones, as data for fine-tuning.

    problems -> those of no evaluation -> answers of the teacher -> rewards -> the best of each problem -> set and card

A set FILE.jsonl has its card FILE.json beside it, which counts what became of everything, and FILE.candidates.jsonl,
all that the teacher said. From that a call that was stopped goes on.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from dsv3.config.files import to_dict
from dsv3.config.teaching import DistillConfig
from dsv3.errors import ConfigError, DataError
from dsv3.posttrain.candidates import CandidateFile
from dsv3.posttrain.contamination import IN_A_ROW, WHOLE, Exclusions
from dsv3.posttrain.problem import Message, Problem
from dsv3.posttrain.rewards import Reward, rewards_named
from dsv3.posttrain.selection import REASONS, select
from dsv3.posttrain.tasks import Task, task_named
from dsv3.posttrain.teacher import Candidate, ModelTeacher, Question, Teacher, file_hash
from dsv3.runtime.atomic import whole_file, write_json
from dsv3.runtime.hold import hold_folder
from dsv3.runtime.rank import num_ranks
from dsv3.train.stop import stop_on_signals

ORIGINAL, BY_TEACHER = "original", "teacher"
"""Kinds of samples: <problem, original response>, and <system prompt, problem, response of the teacher>."""
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


@dataclass(kw_only=True)
class Counts:
    """What became of everything."""

    problems: int = 0
    questions: dict[str, Counter[str]] = field(default_factory=dict)
    """Evaluation file -> how many questions it has, whole or in a row."""
    contaminated: int = 0
    answers: Counter[str] = field(default_factory=Counter)
    """Evaluation file -> how many answers it shares words with."""
    originals: Counter[str] = field(default_factory=Counter)
    drawn: list[int] = field(default_factory=list)
    """Tokens of each."""
    kept: list[int] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    """Of those kept."""
    rejected: Counter[str] = field(default_factory=Counter)
    solved: int = 0
    """Problems of which an answer was kept."""


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
    rules, exclusions = list(rewards) or rewards_named(config.rewards), Exclusions(config.exclude)
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
            said = {**teacher.identity, "task": task.name, "dsv3": answers.version}
            lines = samples(questions, answers=answers, config=config, exclusions=exclusions, counts=counts, said=said)
            _write(lines, output=output, counts=counts)
            card = _card(counts, output=output, settings=drawn, version=answers.version)
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
    return {name: value for name, value in to_dict(config).items() if name not in FREE_TO_CHANGE}


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


def with_system(messages: Sequence[Message], *, prompt: str) -> tuple[Message, ...]:
    """Return messages that begin with a system prompt; one that is there comes after it."""
    if not prompt:
        return tuple(messages)
    if messages and messages[0].get("role") == "system":
        own = messages[0]["content"]
        return ({"role": "system", "content": f"{prompt}\n\n{own}"}, *messages[1:])
    return ({"role": "system", "content": prompt}, *messages)


def samples(
    questions: Sequence[Question],
    *,
    answers: CandidateFile,
    config: DistillConfig,
    exclusions: Exclusions,
    counts: Counts,
    said: dict[str, str],
) -> Iterator[dict[str, Any]]:
    """Yield the lines of the set, in the order of the problems; `said` is what those of the teacher have in common."""
    seen: set[bytes] = set()

    def is_contaminated(text: str) -> bool:
        found = exclusions.with_answer(text)
        counts.answers.update(found)
        return bool(found)

    for question in questions:
        problem = question.problem
        about = {"name": problem.name, "problem": question.place}
        if config.originals and (text := original_of(problem)):
            messages = [*problem.messages, {"role": "assistant", "content": text}]
            verdict = "contaminated" if is_contaminated(text) else "copy" if _hash(messages) in seen else "kept"
            counts.originals[verdict] += 1
            if verdict == "kept":
                seen.add(_hash(messages))
                known = {name: said[name] for name in ("task", "dsv3")}
                yield {"messages": messages, "provenance": {"kind": ORIGINAL, **known, **about}}
        prompt = with_system(problem.messages, prompt=config.system_prompt if config.write_system else "")

        def said_by(text: str, *, prompt: tuple[Message, ...] = prompt) -> list[Message]:
            return [*prompt, {"role": "assistant", "content": text}]

        candidates = answers.candidates_of(question.place)
        selection = select(
            candidates,
            config=config,
            is_contaminated=is_contaminated,
            is_known=lambda text, said_by=said_by: _hash(said_by(text)) in seen,  # type: ignore[misc]
        )
        counts.drawn += [one.num_tokens for one in candidates]
        counts.rejected.update(selection.rejected.values())
        counts.solved += bool(selection.kept)
        for one in selection.kept:
            messages = said_by(one.text)
            seen.add(_hash(messages))
            counts.kept.append(one.num_tokens)
            counts.rewards.append(one.reward)
            yield {
                "messages": messages,
                "provenance": {
                    "kind": BY_TEACHER,
                    **said,
                    **about,
                    "temperature": config.temperature,
                    "seed": one.seed,
                    "candidate": one.number,
                    "scores": dict(one.scores),
                    "reward": one.reward,
                    "tokens": one.num_tokens,
                },
            }


def original_of(problem: Problem) -> str:
    """Return the response that came with a problem, or else its answer; empty where it has neither."""
    return str(problem.more.get("response") or problem.answer).strip()


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
            judged = [judge(one, problem=question.problem, rules=rules) for one in candidates]
            answers.add(question.place, candidates=judged)
            done += 1
            right += any(one.finished and one.reward > 0 for one in judged)
            notify({"answered": len(answers), "now": done, "rewarded": right, "length": _mean(judged)})


def judge(candidate: Candidate, *, problem: Problem, rules: Sequence[Reward]) -> Candidate:
    """Return an answer with what it is worth."""
    scores = {rule.name: rule.score(problem, candidate.text) for rule in rules}
    return replace(candidate, scores=scores, reward=sum(rule.weight * scores[rule.name] for rule in rules))


def _write(lines: Iterator[dict[str, Any]], *, output: Path, counts: Counts) -> None:
    with whole_file(output) as file:
        for line in lines:
            file.write(json.dumps(line, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n")
        if not counts.kept and not counts.originals["kept"]:
            reasons = ", ".join(f"{reason}: {count:,}" for reason, count in counts.rejected.most_common())
            raise DataError(
                f"nothing is left to write to {output}: of {counts.problems:,} problems {counts.contaminated:,} are in "
                f"an evaluation; answers rejected: {reasons or 'none'}"
            )


def _card(counts: Counts, *, output: Path, settings: dict[str, Any], version: str) -> dict[str, Any]:
    return {
        "file": output.name,
        "sha256": file_hash(output),
        "dsv3": version,
        "lines": {ORIGINAL: counts.originals["kept"], BY_TEACHER: len(counts.kept)},
        "problems": {
            "given": counts.problems,
            "contaminated": counts.contaminated,
            "asked": counts.problems - counts.contaminated,
            "with an answer kept": counts.solved,
        },
        "contaminated": {
            file: {WHOLE: met[WHOLE], IN_A_ROW: met[IN_A_ROW], "answers": counts.answers[file]}
            for file, met in counts.questions.items()
        },
        "answers": {
            "drawn": len(counts.drawn),
            "kept": len(counts.kept),
            "rejected": {reason: counts.rejected[reason] for reason in REASONS},
            "mean tokens drawn": fmean(counts.drawn) if counts.drawn else 0.0,
            "mean tokens kept": fmean(counts.kept) if counts.kept else 0.0,
            "mean reward kept": fmean(counts.rewards) if counts.rewards else 0.0,
        },
        "originals": dict(sorted(counts.originals.items())),
        "settings": settings,
    }


def _hash(messages: Sequence[Message]) -> bytes:
    stripped = [{**one, "content": str(one.get("content")).strip()} for one in messages]
    return hashlib.sha256(json.dumps(stripped, sort_keys=True).encode()).digest()


def _mean(candidates: Sequence[Candidate]) -> float:
    return fmean(one.num_tokens for one in candidates)


def _ignore(record: dict[str, Any]) -> None:
    pass
