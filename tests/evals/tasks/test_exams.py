"""AGIEval: letters and formulas, found as its authors find them."""

import random

import pytest

from dsv3.evals.question import Question
from dsv3.evals.tasks import TASKS
from dsv3.evals.tasks.exams import formula_said
from tests.evals.tasks.conftest import published
from tests.evals.tasks.test_prompts import records


def score(answer, wanted, *, exam="lsat-ar"):
    question = Question(id="1", prompt="p", answer=wanted, stop=("\nQ:", "\n问题："), more={"exam": exam})
    return TASKS["agieval"].grade(question, answer)["EM"]


@pytest.mark.parametrize(
    ("answer", "letters", "exam", "expected"),
    [
        (" (B).", "B", "lsat-ar", 1.0),
        (" B, not A", "B", "lsat-ar", 1.0),
        (" A or B", "B", "lsat-ar", 0.0),
        ("\n\nB", "B", "lsat-ar", 1.0),
        (" none", "B", "lsat-ar", 0.0),
        ("", "B", "lsat-ar", 0.0),
        ("BD", "BD", "gaokao-physics", 1.0),
        ("B、D两项", "BD", "gaokao-physics", 1.0),
        ("B", "BD", "gaokao-physics", 0.0),
        ("ABD\n问题：C", "ABD", "gaokao-mathqa", 1.0),
    ],
)
def test_letters_are_read_as_published(answer, letters, exam, expected):
    assert score(answer, letters, exam=exam) == expected


def test_formulas_are_found_and_compared_as_published(shared_data):
    theirs = published("agieval.utils")
    answers = [record["answer"] for record in records(shared_data / "agieval" / "gaokao-mathcloze.jsonl.gz")]
    chance = random.Random(0)
    for answer, other in zip(answers, chance.sample(answers, len(answers)), strict=True):
        bare = answer.strip("$")
        for text in (
            f"${bare}$",
            f"所以 $x={bare}$。",
            f"\\boxed{{{bare}}}",
            f"故 $1$ 或 ${bare}$",
            "共 3.5 米, 即 12",
            "x = 7.",
        ):
            assert formula_said(text) == theirs.parse_math_answer(text), text
        if ";" not in answer + other:
            assert score(f"${bare}$", answer, exam="gaokao-mathcloze") == 1.0
            if theirs.is_equiv(other, answer):
                assert score(other, answer, exam="gaokao-mathcloze") == 1.0
    assert score("$3$", "$4$", exam="gaokao-mathcloze") == 0.0
    assert score("不知道", "$4$", exam="gaokao-mathcloze") == 0.0


def test_an_exam_is_asked_in_its_own_language(shared_data):
    asked = {question.more["exam"]: question.prompt for question in TASKS["agieval"].questions(shared_data)}
    assert len(asked) == 16
    assert asked["aqua-rat"].endswith("\nA: Among A through E, the answer is")
    assert asked["gaokao-english"].endswith("\nA: Among A through D, the answer is")
    assert asked["gaokao-physics"].endswith("\n答案：从A到D, 我们应选择")
    assert asked["gaokao-mathcloze"].endswith("\n答案：")
