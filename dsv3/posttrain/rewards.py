"""What an answer is worth: rules that read it (report 5.2.1). A reward is a function of a problem and an answer.

def short(problem: Problem, answer: str) -> float:
    return 1.0 if len(answer) < 80 else 0.0

grpo(..., rewards=[Reward(name="short", weight=0.1, score=short)])
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dsv3.errors import ConfigError
from dsv3.evals.final_answer import THINK, final_answer, same_answer
from dsv3.evals.sandbox import program_in, run_tests
from dsv3.evals.tasks.math_answer import equivalent
from dsv3.posttrain.problem import Problem

Score = Callable[[Problem, str], float]


@dataclass(frozen=True, kw_only=True)
class Reward:
    """A rule and how much it counts."""

    name: str
    score: Score
    weight: float = 1.0


def answer_is_right(problem: Problem, answer: str) -> float:
    """1 if the final answer of the text is that of the problem: the same text, or the same number."""
    found = final_answer(answer)
    return float(found is not None and same_answer(found, problem.answer))


def answer_is_exact(problem: Problem, answer: str) -> float:
    """1 if the whole text is the answer, but for space around it."""
    return float(answer.strip() == problem.answer.strip())


def answer_is_equivalent(problem: Problem, answer: str) -> float:
    """1 if math-verify takes the final answer and that of the problem for the same: LaTeX, sets, intervals, fractions.

    Raises:
        MissingExtraError: math-verify is not installed.
    """
    found = final_answer(answer)
    return float(found is not None and (same_answer(found, problem.answer) or equivalent(found, problem.answer)))


def thinks_first(problem: Problem, answer: str) -> float:  # noqa: ARG001
    """1 if the text is a thought between <think> and </think>, once each, and then an answer."""
    tags = answer.count("<think>"), answer.count("</think>")
    found = THINK.match(answer)
    return float(
        found is not None and tags == (1, 1) and bool(found["answer"].strip()) and bool(found["thought"].strip())
    )


def code_passes(problem: Problem, answer: str) -> float:
    """1 if the program in an answer passes the tests of the problem."""
    return float(bool(problem.tests) and run_tests(program_in(answer), tests=problem.tests).passed)


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
