"""Tasks put to a model, item by item, so that a run that is killed goes on where it was.

Each outcome is a line of `items.jsonl`, kept by its task, its item, and a hash of all that was asked.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from dsv3.errors import ConfigError, DataError, Dsv3Error, EngineError, MissingExtraError
from dsv3.evals.answerer import Answerer
from dsv3.evals.question import EvalTask, Question
from dsv3.runtime.log import get_logger

log = get_logger(__name__)

ITEMS = "items.jsonl"
BATCH = 32
"""Questions that a model is given at once, at most; as many are lost when a run is killed."""
TROUBLES_IN_A_ROW = 16
"""Items that a model could not be asked, after which a task is given up."""
UNSCORED = "the model gives no finite probability"


class CannotAnswerError(ConfigError):
    """A model cannot be asked questions of a kind at all; those of other kinds are asked all the same."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one item."""

    task: str
    id: str
    prompt_hash: str
    """Of all that is asked of the model, and the answer that is right."""
    scores: Mapping[str, float]
    """By name, the task's metric first; of 'rolling' the bits and the bytes."""
    answer: str | int | None = None
    """What the model said, or the place of its choice."""
    logprobs: tuple[float, ...] = ()
    """Of each choice, undivided."""
    group: str = ""
    num_cut: int = 0
    """Tokens left out at the beginning of a prompt that was too long, most of any choice."""


@dataclass(frozen=True, kw_only=True)
class Trouble:
    """An item that was not scored, or a task that could not go on."""

    item: str
    """Empty where it is the task's."""
    reason: str


@dataclass(kw_only=True)
class TaskRun:
    """A task as far as it came."""

    task: EvalTask
    outcomes: list[Outcome] = field(default_factory=list)
    troubles: list[Trouble] = field(default_factory=list)
    first_prompt: str = ""
    """Exactly as the first item was asked."""
    num_kept: int = 0
    """Outcomes of an earlier sitting."""


class ItemsFile:
    """The outcomes of one model, appended as they come."""

    def __init__(self, folder: Path, *, model: Mapping[str, Any]) -> None:
        """Open what there is; a last line that was half written is dropped.

        Raises:
            ConfigError: it holds the answers of another model, or is damaged before its end.
        """
        self.path = folder / ITEMS
        folder.mkdir(parents=True, exist_ok=True)
        lines = _whole_lines(self.path)
        self._known: dict[tuple[str, str, str], Outcome] = {}
        header = {"model": json.loads(json.dumps(model))}
        if not lines:
            self._append(header)
        elif lines[0] != header:
            raise ConfigError(
                f"{self.path} holds the answers of {lines[0].get('model')}, and {header['model']} is asked now; choose "
                "another folder with --output"
            )
        for line in lines[1:]:
            outcome = _outcome(line)
            self._known[outcome.task, outcome.id, outcome.prompt_hash] = outcome

    def find(self, key: tuple[str, str, str]) -> Outcome | None:
        """Return the outcome of (task, item, hash) if there is one."""
        return self._known.get(key)

    def add(self, outcome: Outcome) -> None:
        """Append an outcome; it is with the operating system when this returns."""
        self._append(asdict(outcome))
        self._known[outcome.task, outcome.id, outcome.prompt_hash] = outcome

    def _append(self, line: Mapping[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def read_outcomes(folder: Path) -> tuple[Mapping[str, Any], list[Outcome]]:
    """Return the model whose answers a folder holds, and their outcomes.

    Raises:
        DataError: there are none.
    """
    lines = _whole_lines(folder / ITEMS, mend=False)
    if not lines:
        raise DataError(f"there are no outcomes in {folder / ITEMS}; `dsv3 eval run --output FOLDER` writes them")
    latest = {(outcome.task, outcome.id, outcome.prompt_hash): outcome for outcome in map(_outcome, lines[1:])}
    return lines[0].get("model", {}), list(latest.values())


def run_task(
    task: EvalTask,
    *,
    answerer: Answerer,
    data: Path,
    items: ItemsFile,
    limit: int | None = None,
    max_tokens: int | None = None,
) -> TaskRun:
    """Ask a model the first `limit` items of a task, or all, but those that it has answered already.

    With `max_tokens` no answer may be longer, whatever the task allows, as a small context may need it.

    What is wrong with an item, or with the data from an item on, is told in `troubles`, and the rest is scored.
    """
    run = TaskRun(task=task)
    questions = _read(run, data=data, limit=limit, max_tokens=max_tokens)
    keys = {question.id: (task.name, question.id, prompt_hash(task, question)) for question in questions}
    found = {id: kept for id, key in keys.items() if (kept := items.find(key)) is not None}
    run.num_kept = len(found)
    todo = [question for question in questions if question.id not in found]
    try:
        failed = 0
        for start in range(0, len(todo), BATCH):
            for outcome in _ask(task, todo[start : start + BATCH], answerer=answerer):
                if isinstance(outcome, Outcome):
                    items.add(outcome)
                    found[outcome.id] = outcome
                    failed = 0
                    continue
                run.troubles.append(outcome)
                failed += 1
                if failed == TROUBLES_IN_A_ROW:
                    raise CannotAnswerError(f"given up: {failed} items in a row could not be scored")
            log.info("%s: %d of %d items", task.name, len(found), len(questions))
    except (CannotAnswerError, MissingExtraError) as error:
        run.troubles.append(Trouble(item="", reason=str(error)))
    run.outcomes = [found[id] for id in keys if id in found]
    return run


def prompt_hash(task: EvalTask, question: Question) -> str:
    """Return a short hash of what a model is asked and of what is right."""
    asked = (
        task.protocol,
        task.normalise,
        question.prompt,
        question.choices,
        question.contexts,
        question.stop,
        question.max_tokens,
        question.answer,
    )
    return hashlib.sha256(json.dumps(asked, ensure_ascii=False, default=str).encode()).hexdigest()[:16]


def _read(run: TaskRun, *, data: Path, limit: int | None, max_tokens: int | None) -> list[Question]:
    """Read the items of a task that can be asked."""
    questions: dict[str, Question] = {}
    try:
        for question in islice(run.task.questions(data), limit):
            run.first_prompt = run.first_prompt or _shown(question)
            wrong = _what_is_wrong(run.task, question)
            if question.id in questions:
                wrong = "another item has the same id"
            if wrong:
                run.troubles.append(Trouble(item=question.id, reason=wrong))
            else:
                most = min(question.max_tokens, max_tokens or question.max_tokens)
                questions[question.id] = replace(question, max_tokens=most)
    except DataError as error:
        read = f"; the {len(questions)} items before it are scored" if questions else ""
        run.troubles.append(Trouble(item="", reason=f"{error}{read}"))
    return list(questions.values())


def _shown(question: Question) -> str:
    if question.contexts:
        return question.contexts[0] + question.choices[0] if question.choices else question.contexts[0]
    return question.prompt


def _what_is_wrong(task: EvalTask, question: Question) -> str:
    """Return why an item cannot be asked, or nothing."""
    if task.protocol != "choices":
        return "" if question.prompt else "the prompt is empty"
    options = len(question.choices)
    if options < 2 or any(not choice.strip() for choice in question.choices):
        return f"two choices with text are wanted, and they are {list(question.choices)}"
    if question.contexts and len(question.contexts) != options:
        return f"there are {len(question.contexts)} contexts for {options} choices"
    if not isinstance(question.answer, int) or not 0 <= question.answer < options:
        return f"the answer is {question.answer!r}, and should be a choice's place, 0 to {options - 1}"
    return ""


def _ask(task: EvalTask, questions: Sequence[Question], *, answerer: Answerer) -> Iterator[Outcome | Trouble]:
    """Ask several questions at once; where one of them cannot be asked, each half of them, to find out which."""
    try:
        outcomes = PROTOCOLS[task.protocol](task, questions, answerer)
    except (CannotAnswerError, MissingExtraError, EngineError):
        raise
    except Dsv3Error as error:
        if len(questions) == 1:
            yield Trouble(item=questions[0].id, reason=str(error))
            return
        middle = len(questions) // 2
        yield from _ask(task, questions[:middle], answerer=answerer)
        yield from _ask(task, questions[middle:], answerer=answerer)
        return
    for outcome in outcomes:
        if isinstance(outcome, Outcome) and not all(map(math.isfinite, (*outcome.scores.values(), *outcome.logprobs))):
            yield Trouble(item=outcome.id, reason=UNSCORED)
        else:
            yield outcome


def _choose(task: EvalTask, questions: Sequence[Question], answerer: Answerer) -> list[Outcome | Trouble]:
    """Score each choice after its context; the likeliest, by its length where the task says so, is the answer."""
    pairs = [
        (context, choice)
        for question in questions
        for context, choice in zip(
            question.contexts or (question.prompt,) * len(question.choices), question.choices, strict=True
        )
    ]
    scored = iter(answerer.continuations(pairs))
    outcomes: list[Outcome | Trouble] = []
    for question in questions:
        found = list(islice(scored, len(question.choices)))
        lengths = {
            "none": [1] * len(found),
            # As lm-eval counts: the space before a choice is none of its text.
            "bytes": [len(choice.strip().encode()) for choice in question.choices],
            "tokens": [continuation.num_tokens for continuation in found],
        }[task.normalise]
        values = [continuation.logprob / length for continuation, length in zip(found, lengths, strict=True)]
        picked = max(range(len(values)), key=values.__getitem__)
        outcomes.append(
            _scored(
                task,
                question,
                scores={task.metric: float(picked == question.answer)},
                answer=picked,
                logprobs=tuple(continuation.logprob for continuation in found),
                num_cut=max(continuation.num_cut for continuation in found),
            )
        )
    return outcomes


def _generate(task: EvalTask, questions: Sequence[Question], answerer: Answerer) -> Iterator[Outcome | Trouble]:
    """Draw greedy answers, and judge each by the task's rule as it is asked for."""
    answers = answerer.generate(
        [question.prompt for question in questions],
        stops=[question.stop for question in questions],
        max_tokens=[question.max_tokens for question in questions],
    )
    return (_judged(task, question, answer) for question, answer in zip(questions, answers, strict=True))


def _judged(task: EvalTask, question: Question, answer: str) -> Outcome | Trouble:
    assert task.grade is not None, f"{task.name} has no rule for its answers"
    try:
        return _scored(task, question, scores=dict(task.grade(question, answer)), answer=answer)
    except MissingExtraError:
        raise
    except Dsv3Error as error:
        return Trouble(item=question.id, reason=f"the answer could not be judged: {error}")


def _roll(task: EvalTask, questions: Sequence[Question], answerer: Answerer) -> list[Outcome | Trouble]:
    """Count the bits that whole texts take, and their bytes."""
    logprobs = answerer.rolling([question.prompt for question in questions])
    return [
        _scored(
            task,
            question,
            scores={"bits": -logprob / math.log(2), "bytes": float(len(question.prompt.encode()))},
        )
        for question, logprob in zip(questions, logprobs, strict=True)
    ]


def _scored(task: EvalTask, question: Question, *, scores: Mapping[str, float], **more: Any) -> Outcome:
    group = str(question.more.get(task.group_by, "")) if task.group_by else ""
    return Outcome(
        task=task.name, id=question.id, prompt_hash=prompt_hash(task, question), scores=scores, group=group, **more
    )


PROTOCOLS: Mapping[str, Callable[[EvalTask, Sequence[Question], Answerer], Iterable[Outcome | Trouble]]] = {
    "choices": _choose,
    "generate": _generate,
    "rolling": _roll,
}


def _whole_lines(path: Path, *, mend: bool = True) -> list[dict[str, Any]]:
    """Read JSON lines; with `mend` a last one that was half written is cut off the file.

    Raises:
        DataError: a line before the last is damaged.
    """
    if not path.exists():
        return []
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if mend and len(whole) < len(content):
        with path.open("r+b") as file:
            file.truncate(len(whole))
    lines = []
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            lines.append(json.loads(line))
        except ValueError as error:
            raise DataError(
                f"{path}, line {number}: not JSON ({error}); delete that line and its item is asked again"
            ) from error
    return lines


def _outcome(line: Mapping[str, Any]) -> Outcome:
    return Outcome(**{**line, "logprobs": tuple(line["logprobs"])})
