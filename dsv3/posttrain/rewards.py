"""What an answer is worth: rules that read it, or models (report 5.2.1). A reward is a function of problem and answer.

def short(problem: Problem, answer: str) -> float:
    return 1.0 if len(answer) < 80 else 0.0

grpo(..., rewards=[Reward(name="short", weight=0.1, score=short)])
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal

from dsv3.config.teaching import JudgeConfig
from dsv3.errors import ConfigError, DataError
from dsv3.evals.final_answer import THINK, final_answer, same_answer
from dsv3.evals.sandbox import program_in, run_on_input, run_tests
from dsv3.evals.tasks.instructions import follows
from dsv3.evals.tasks.math_answer import equivalent
from dsv3.posttrain.gym import gym_score
from dsv3.posttrain.judge import open_judge
from dsv3.posttrain.problem import Problem
from dsv3.posttrain.reward_model import load_reward_model

Score = Callable[[Problem, str], float]
ScoreAll = Callable[[Sequence[Problem], Sequence[str]], list[float]]
INTEGER = re.compile(r"[+-]?[0-9]+")
NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,3})?")
TOLERANCE = 1e-6
"""Of numbers that a program prints, absolute, or relative to a larger one."""


@dataclass(frozen=True, kw_only=True)
class Reward:
    """A rule and how much it counts."""

    name: str
    score: Score
    weight: float = 1.0
    score_all: ScoreAll | None = None
    """The same for many answers at once, where that is faster."""

    def scores(self, problems: Sequence[Problem], answers: Sequence[str]) -> list[float]:
        """Return what each answer is worth, before the weight."""
        if self.score_all is not None:
            return self.score_all(problems, answers)
        return [self.score(problem, answer) for problem, answer in zip(problems, answers, strict=True)]


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


def instructions_are_followed(problem: Problem, answer: str) -> float:
    """Return the share of IFEval's instructions that an answer follows, by the strict reading.

    A problem names them as IFEval does: `instruction_id_list`, and in `kwargs` the values of each.

    Raises:
        DataError: there is no such instruction, or its values are not those that it takes.
        MissingExtraError: langdetect is not installed, and an instruction is about a language.
    """
    names, values = (problem.more.get(key) or [] for key in ("instruction_id_list", "kwargs"))
    if not names or len(names) != len(values):
        raise DataError(f"{problem.name} has {len(names)} instructions and {len(values)} sets of values for them")
    said = answer.rsplit("</think>", 1)[-1]
    followed = [follows(said, instruction=name, values=given) for name, given in zip(names, values, strict=True)]
    return sum(followed) / len(followed)


def code_passes(problem: Problem, answer: str) -> float:
    """1 if the program in an answer passes the tests of the problem."""
    return float(bool(problem.tests) and run_tests(program_in(answer), tests=problem.tests).passed)


def program_prints(problem: Problem, answer: str) -> float:
    """1 if the program in an answer prints what it must for every case, but for space, and the last digits of numbers.

    It is not told what it must print: outputs are compared out here.
    """
    program = program_in(answer)
    return float(bool(problem.cases) and all(_prints(program, read=read, wanted=out) for read, out in problem.cases))


def same_output(printed: str, wanted: str) -> bool:
    """Tell whether two outputs have the same lines, those at the end that are empty aside, word by word.

    A whole number must be met exactly; another within 1e-6.
    """
    lines, others = ([line.split() for line in text.rstrip().splitlines()] for text in (printed, wanted))
    return len(lines) == len(others) and all(
        len(line) == len(other) and all(map(_same_word, line, other)) for line, other in zip(lines, others, strict=True)
    )


def _prints(program: str, *, read: str, wanted: str) -> bool:
    verdict = run_on_input(program, stdin=read)
    return verdict.passed and same_output(verdict.output, wanted)


def _same_word(found: str, wanted: str) -> bool:
    if found == wanted:
        return True
    if not (NUMBER.fullmatch(found) and NUMBER.fullmatch(wanted)):
        return False
    if INTEGER.fullmatch(wanted):
        return Decimal(found) == Decimal(wanted)
    return abs(float(found) - float(wanted)) <= TOLERANCE * max(1.0, abs(float(wanted)))


SCORES: dict[str, Score] = {
    "answer": answer_is_right,
    "exact": answer_is_exact,
    "math": answer_is_equivalent,
    "format": thinks_first,
    "code": code_passes,
    "stdin": program_prints,
    "instructions": instructions_are_followed,
    "gym": gym_score,
}
MODELS = ("model", "judge")
CHOICES = f"{', '.join(SCORES)}, model:FOLDER or judge:FOLDER_OR_ADDRESS"


def rewards_named(wanted: Sequence[str], *, judge: JudgeConfig | None = None) -> list[Reward]:
    """Return the rewards of settings such as ('answer=1', 'format=0.2', 'model:runs/preferences=0.5').

    `judge` says how a 'judge:' judges.

    Raises:
        ConfigError: none, an unknown name, one given twice, or a weight that is no number.
        CheckpointError, TokenizerError, MissingExtraError: a model cannot be asked.
    """
    if not wanted:
        raise ConfigError(f"no reward; choose of {CHOICES}")
    rewards: list[Reward] = []
    for one in wanted:
        name, _, weight = one.rpartition("=") if "=" in one else (one, "", "1")
        kind, _, place = name.partition(":")
        if name not in SCORES and not (kind in MODELS and place):
            raise ConfigError(f"there is no reward '{name}'; choose of {CHOICES}")
        if name in {other.name for other in rewards}:
            raise ConfigError(f"the reward '{name}' is given twice; add its weights")
        try:
            counts = float(weight or 1)
        except ValueError:
            raise ConfigError(f"the reward {one!r} has no weight; write it as {name}=1") from None
        if name in SCORES:
            rewards.append(Reward(name=name, score=SCORES[name], weight=counts))
        elif kind == "model":
            rewards.append(_of_many(load_reward_model(place).score, name=name, weight=counts))
        else:
            rewards.append(_of_many(open_judge(place, config=judge or JudgeConfig()).score, name=name, weight=counts))
    return rewards


def _of_many(score_all: ScoreAll, *, name: str, weight: float) -> Reward:
    return Reward(
        name=name, weight=weight, score_all=score_all, score=lambda problem, answer: score_all([problem], [answer])[0]
    )
