"""Where problems come from: generated arithmetic, or a file. Those that are held out are never trained on."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

from dsv3.data.chance import falls_below, hash_text
from dsv3.errors import ConfigError, DataError
from dsv3.evals.sandbox import OUTPUT_BYTES
from dsv3.posttrain.gym import GYM, gym_problems
from dsv3.posttrain.problem import Problem

HELD_OUT_RATE = 0.1
"""Of all problems of a task, by a hash of what is asked: so the same ones whatever the order, and however many."""


JUDGED_BY = ("answer", "tests", "cases", "instruction_id_list")


@dataclass(frozen=True, kw_only=True)
class Task:
    """Problems in two parts that have none in common."""

    name: str
    training: tuple[Problem, ...]
    held_out: tuple[Problem, ...]

    def problems_of(self, iteration: int, *, count: int, seed: int) -> list[Problem]:
        """Return the problems of an iteration: each pass over all of them is an order of its own."""
        chosen: list[Problem] = []
        first = iteration * count
        while len(chosen) < count:
            epoch, place = divmod(first + len(chosen), len(self.training))
            order = list(range(len(self.training)))
            Random(f"{seed} problems {epoch}").shuffle(order)
            chosen += [self.training[one] for one in order[place : place + count - len(chosen)]]
        return chosen


def task_named(name: str) -> Task:
    """Return a task by name, or that of a file of problems.

    Raises:
        ConfigError: there is no such task.
        MissingExtraError: it is one of reasoning-gym, which is not installed.
        DataError: the file cannot be read, or has too few problems.
    """
    if name in TASKS:
        return TASKS[name]()
    if name.startswith(GYM):
        return split(gym_problems(name.removeprefix(GYM)), name=name)
    if not name.endswith(".jsonl"):
        raise ConfigError(
            f"there is no task '{name}'; choose of {', '.join(TASKS)}, gym:NAME for a data set of reasoning-gym, or "
            "give a .jsonl file of problems"
        )
    return split(list(read_problems(Path(name))), name=Path(name).stem)


def split(problems: list[Problem], *, name: str) -> Task:
    """Hold out a tenth of some problems.

    Raises:
        DataError: one of the parts would be empty.
    """
    parts: tuple[list[Problem], list[Problem]] = ([], [])
    for problem in problems:
        asked = json.dumps(problem.messages, sort_keys=True)
        parts[falls_below(hash_text(asked), rate=HELD_OUT_RATE)].append(problem)
    training, held_out = map(tuple, parts)
    if not training or not held_out:
        raise DataError(f"{name} has {len(problems)} problems, too few to train on some and hold out others")
    return Task(name=name, training=training, held_out=held_out)


def read_problems(path: Path) -> Iterator[Problem]:
    """Yield the problems of a file: `prompt` or `messages`, and `answer`.

    Those for programs have `tests`, a list of assertions, or `cases`, a list of {"input": ..., "output": ...}.

    Raises:
        DataError: it cannot be read, or a line is no problem.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path} ({type(error).__name__}: {error})") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        name = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except ValueError as error:
            raise DataError(f"{name} is no JSON ({error})") from error
        if not isinstance(record, dict) or not ("prompt" in record or "messages" in record):
            raise DataError(f"{name} is no problem: it needs 'prompt' or 'messages', and one of {', '.join(JUDGED_BY)}")
        if not any(key in record for key in JUDGED_BY):
            raise DataError(f"{name} has none of {', '.join(JUDGED_BY)}: nothing can be said of an answer")
        messages = record.get("messages") or [{"role": "user", "content": record["prompt"]}]
        known = ("prompt", "messages", "answer", "tests", "cases")
        yield Problem(
            messages=tuple(messages),
            answer=str(record.get("answer", "")),
            tests=tuple(record.get("tests", ())),
            cases=_cases(record.get("cases", []), name=name),
            name=name,
            more={key: value for key, value in record.items() if key not in known},
        )


def _cases(given: Any, *, name: str) -> tuple[tuple[str, str], ...]:
    if not isinstance(given, list):
        raise DataError(f"{name} has 'cases' that are no list")
    cases = []
    for case in given:
        pair = (case.get("input"), case.get("output")) if isinstance(case, dict) else (None, None)
        if not (isinstance(pair[0], str) and isinstance(pair[1], str)):
            raise DataError(f"{name} has a case that is no object with an 'input' and an 'output' that are texts")
        if len(pair[1]) >= OUTPUT_BYTES:
            raise DataError(f"{name} has an output of {len(pair[1]):,} characters; {OUTPUT_BYTES - 1:,} can be kept")
        cases.append((pair[0], pair[1]))
    return tuple(cases)


def _arithmetic(*, thinking: bool) -> Task:
    """Three numbers of one digit, the second added or taken away; with `thinking`, asked to think first."""
    hint = "Think, then answer: " if thinking else ""
    asked = [
        (f"{a} {sign} {b} + {c}", a + b + c if sign == "+" else a - b + c)
        for sign in "+-"
        for a in range(10)
        for b in range(10)
        for c in range(10)
    ]
    problems = [
        Problem(messages=({"role": "user", "content": f"{hint}{text}"},), answer=str(answer), name=text)
        for text, answer in asked
    ]
    return split(problems, name="thinking" if thinking else "arithmetic")


TASKS = {"arithmetic": partial(_arithmetic, thinking=False), "thinking": partial(_arithmetic, thinking=True)}
