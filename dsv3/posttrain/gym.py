"""Problems of reasoning-gym, judged as it judges them itself."""

from functools import cache
from typing import Any

from dsv3.errors import ConfigError, MissingExtraError
from dsv3.evals.final_answer import after_thought, marked_answer
from dsv3.posttrain.problem import Problem

GYM = "gym:"
NUM_PROBLEMS = 2000


def gym_problems(name: str) -> list[Problem]:
    """Return problems of one of its data sets, each with its record for the reward `gym`.

    Raises:
        ConfigError: there is no such data set.
        MissingExtraError: reasoning-gym is not installed.
    """
    return [
        Problem(
            messages=({"role": "user", "content": record["question"]},),
            answer=str(record["answer"]),
            name=f"{GYM}{name}#{number}",
            more={"gym": name, "record": record},
        )
        for number, record in enumerate(_dataset(name))
    ]


def gym_score(problem: Problem, answer: str) -> float:
    r"""Return its own score, from 0 to 1, of what is in the last `\boxed{}` or behind `####`, or of all that is said.

    Raises:
        ConfigError: the problem is none of reasoning-gym's.
    """
    if "gym" not in problem.more:
        raise ConfigError(f"{problem.name!r} is no problem of reasoning-gym; the reward 'gym' is for --task gym:NAME")
    said = after_thought(answer)
    marked = marked_answer(said)
    given = said.strip() if marked is None else marked
    return float(_dataset(problem.more["gym"]).score_answer(given, problem.more["record"]))


@cache
def _dataset(name: str) -> Any:
    try:
        from reasoning_gym import create_dataset
    except ImportError as error:
        raise MissingExtraError(package="reasoning-gym", extra="rl", purpose="its problems and their scores") from error
    try:
        return create_dataset(name, size=NUM_PROBLEMS, seed=0)
    except ValueError as error:
        raise ConfigError(f"reasoning-gym has no data set '{name}' ({error}); one is chain_sum") from error
