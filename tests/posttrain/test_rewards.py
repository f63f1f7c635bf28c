"""What rules make of answers; verdicts are those of the data sets' own formats."""

import gzip
import json

import pytest

from dsv3.errors import ConfigError
from dsv3.evals.final_answer import final_answer, same_answer
from dsv3.posttrain.problem import Problem
from dsv3.posttrain.rewards import (
    answer_is_equivalent,
    answer_is_exact,
    answer_is_right,
    rewards_named,
    thinks_first,
)


def problem(answer: str) -> Problem:
    return Problem(messages=({"role": "user", "content": "?"},), answer=answer)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("So it is \\boxed{42}.", "42"),
        ("first \\boxed{1}, no: \\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("She has 3 left.\n#### 1,234\nand more", "1,234"),
        ("It takes 3 of 4, so 7", "7"),
        ("the rate is -2.5 percent.", "-2.5"),
        ("<think>\\boxed{1} or 2?</think>I say 5", "5"),
        ("\\boxed{never closed 3", "3"),
        ("nothing at all", None),
        ("", None),
    ],
)
def test_the_final_answer_is_found(text, answer):
    assert final_answer(text) == answer


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        ("1,234", "1234", True),
        ("42.", "42", True),
        ("42.0", "42", True),
        ("$18", "18", True),
        ("1/2", "0.5", True),
        ("1/0", "0", False),
        ("12", "21", False),
        ("x", "x ", True),
        ("nan", "nan1", False),
        ("", "0", False),
        ("1" * 400, "1", False),
    ],
)
def test_answers_are_compared_as_numbers_where_they_are(a, b, same):
    assert same_answer(a, b) is same
    assert same_answer(b, a) is same


def test_the_answers_of_gsm8k_are_right_by_their_own_rule(shared_data):
    with gzip.open(shared_data / "gsm8k" / "test.jsonl.gz", "rt") as file:
        records = [json.loads(line) for line in file]
    for record in records:
        wanted = record["answer"].rsplit("####", 1)[1].strip()
        assert answer_is_right(problem(wanted), record["answer"]) == 1.0
        wrong = record["answer"].rsplit("####", 1)[0] + "#### 123456789"
        assert answer_is_right(problem(wanted), wrong) == 0.0


def test_an_answer_is_exact_but_for_space():
    assert answer_is_exact(problem("19"), " 19\n") == 1
    assert answer_is_exact(problem("19"), "it is 19") == 0


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("<think>3 and 4 make 7</think>7", 1),
        (" <think>a\nb</think>\n\n7", 1),
        ("7", 0),
        ("<think></think>7", 0),
        ("<think>a</think>", 0),
        ("<think>a</think> \n", 0),
        ("<think>a<think>b</think>7", 0),
        ("<think>a</think>7</think>", 0),
        ("7<think>a</think>", 0),
    ],
)
def test_a_thought_comes_first_once_and_an_answer_follows(text, score):
    assert thinks_first(problem("7"), text) == score


def test_mathematics_is_compared_by_what_it_means():
    pytest.importorskip("math_verify")
    for wanted, given in (
        ("\\frac{1}{2}", "0.5"),
        ("x^2+1", "1+x^2"),
        ("(1,2)", "(1, 2)"),
        ("\\sqrt{8}", "2\\sqrt{2}"),
    ):
        assert answer_is_equivalent(problem(wanted), f"so \\boxed{{{given}}}") == 1, (wanted, given)
    assert answer_is_equivalent(problem("\\frac{1}{2}"), "\\boxed{0.25}") == 0


def test_rewards_are_named_with_their_weights():
    rewards = rewards_named(["answer=1", "format=0.25"])
    assert [(one.name, one.weight) for one in rewards] == [("answer", 1.0), ("format", 0.25)]
    for wrong, told in (([], "no reward"), (["truth=1"], "no reward 'truth'"), (["answer=much"], "has no weight")):
        with pytest.raises(ConfigError, match=told):
            rewards_named(wrong)


def test_an_answer_that_cannot_be_computed_is_wrong_and_keeps_nobody_waiting():
    pytest.importorskip("math_verify", reason="math-verify is not installed")
    assert answer_is_equivalent(problem("7"), "So \\boxed{9^{9^{9^9}}}.") == 0
    assert answer_is_equivalent(problem("\\frac12"), "So \\boxed{0.5}.") == 1
