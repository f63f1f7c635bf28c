"""What an answer is worth: rules that read it (report 5.2.1). A reward is a function of a problem and an answer.

def short(problem: Problem, answer: str) -> float:
    return 1.0 if len(answer) < 80 else 0.0

grpo(..., rewards=[Reward(name="short", weight=0.1, score=short)])
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation

from dsv3.errors import ConfigError, MissingExtraError
from dsv3.posttrain.problem import Problem
from dsv3.posttrain.sandbox import code_passes

THINK = re.compile(r"\A\s*<think>(?P<thought>.+?)</think>(?P<answer>.+)\Z", re.DOTALL)
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:/\d+)?")


Score = Callable[[Problem, str], float]


@dataclass(frozen=True, kw_only=True)
class Reward:
    """A rule and how much it counts."""

    name: str
    score: Score
    weight: float = 1.0


def final_answer(text: str) -> str | None:
    r"""Return what a text gives as its answer: the last `\boxed{...}`, what follows `####`, else its last number.

    What is thought between <think> and </think> is no answer.
    """
    thought = THINK.match(text)
    said = thought["answer"] if thought else text
    if (box := _last_box(said)) is not None:
        return box
    if "####" in said:
        return said.rsplit("####", 1)[1].strip().split("\n")[0].strip()
    numbers = NUMBER.findall(said)
    return numbers[-1] if numbers else None


def answer_is_right(problem: Problem, answer: str) -> float:
    """1 if the final answer of the text is that of the problem: the same text, or the same number."""
    found = final_answer(answer)
    return float(found is not None and same_answer(found, problem.answer))


def same_answer(found: str, wanted: str) -> bool:
    """Tell whether two answers are the same text, but for space and a full stop, or the same number."""
    a, b = (one.strip().rstrip(".").strip() for one in (found, wanted))
    if a == b:
        return True
    numbers = [as_number(one) for one in (a, b)]
    return None not in numbers and numbers[0] == numbers[1]


def as_number(text: str) -> Decimal | None:
    """Return a number written with or without commas, a currency, a percent sign or as a fraction; else None."""
    plain = text.replace(",", "").replace("$", "").replace("%", "").strip()
    try:
        if "/" in plain:
            above, below = (Decimal(part) for part in plain.split("/"))
            return above / below if below else None
        number = Decimal(plain)
    except (InvalidOperation, ValueError):
        return None
    return number if number.is_finite() else None


def answer_is_exact(problem: Problem, answer: str) -> float:
    """1 if the whole text is the answer, but for space around it."""
    return float(answer.strip() == problem.answer.strip())


def answer_is_equivalent(problem: Problem, answer: str) -> float:
    """1 if math-verify takes the final answer and that of the problem for the same: LaTeX, sets, intervals, fractions.

    Raises:
        MissingExtraError: math-verify is not installed.
    """
    try:
        from math_verify import parse, verify
    except ImportError as error:
        raise MissingExtraError(package="math-verify", extra="rl", purpose="comparing mathematics") from error
    found = final_answer(answer)
    if found is None:
        return 0.0
    if same_answer(found, problem.answer):
        return 1.0
    # Without its time-outs, which are signals and of the main thread alone; what is compared is one answer long.
    wanted, given = (parse(f"${one}$", parsing_timeout=None) for one in (problem.answer, found))
    return float(verify(wanted, given, timeout_seconds=None))


def thinks_first(problem: Problem, answer: str) -> float:  # noqa: ARG001
    """1 if the text is a thought between <think> and </think>, once each, and then an answer."""
    tags = answer.count("<think>"), answer.count("</think>")
    found = THINK.match(answer)
    return float(
        found is not None and tags == (1, 1) and bool(found["answer"].strip()) and bool(found["thought"].strip())
    )


SCORES: dict[str, Score] = {
    "answer": answer_is_right,
    "exact": answer_is_exact,
    "math": answer_is_equivalent,
    "format": thinks_first,
    "code": code_passes,
}


def rewards_named(wanted: Sequence[str]) -> list[Reward]:
    """Return the rewards of settings such as ('answer=1', 'format=0.2').

    Raises:
        ConfigError: none, an unknown name, or a weight that is no number.
    """
    if not wanted:
        raise ConfigError(f"no reward; choose of {', '.join(SCORES)}")
    rewards = []
    for one in wanted:
        name, _, weight = one.partition("=")
        if name not in SCORES:
            raise ConfigError(f"there is no reward '{name}'; choose of {', '.join(SCORES)}")
        try:
            rewards.append(Reward(name=name, score=SCORES[name], weight=float(weight or 1)))
        except ValueError:
            raise ConfigError(f"the reward {one!r} has no weight; write it as {name}=1") from None
    return rewards


def _last_box(text: str) -> str | None:
    r"""Return what is in the last `\boxed{...}`, braces within it balanced; None where there is none whole."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth, begin = 0, start + len("\\boxed{")
    for place in range(begin - 1, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[begin:place].strip()
    return None
