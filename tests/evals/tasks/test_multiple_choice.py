"""Letters: found in answers as the published evaluations find them."""

import re

import pytest

from dsv3.evals.question import Question
from dsv3.evals.tasks.multiple_choice import grade_letter, grade_letter_at_end, letter_said, lettered
from tests.evals.tasks.conftest import published_settings


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("Let's see. The answer is (C).", "C"),
        ("the answer is J", "J"),
        ("The answer is (A). No, the answer is (B).", "A"),  # The first, as published.
        ("Answer: D", "D"),
        ("So, answer:\n\nE", "E"),
        ("It is B or G", "G"),
        ("Nothing fits", None),
        ("answer is K", None),
        ("", None),
    ],
)
def test_letters_are_found_as_the_published_evaluation_finds_them(text, letter):
    assert letter_said(text) == letter


def test_the_first_search_is_that_of_lm_eval():
    settings = published_settings("mmlu_pro/_default_template_yaml")
    pattern = settings["filter_list"][0]["filter"][0]["regex_pattern"]
    for text in ("the answer is (B)", "answer is C)", "the answer is (J).", "my answer is A, or the answer is D"):
        assert letter_said(text) == re.search(pattern, text)[1]


def test_an_answer_ends_where_a_new_question_begins():
    question = Question(id="1", prompt="p", answer="A", stop=("Question:",))
    assert grade_letter(question, "The answer is (A).\n\nQuestion: the answer is (B)")["EM"] == 1.0
    assert grade_letter(question, "I do not know.\n\nQuestion:\nthe answer is (A)")["EM"] == 0.0


def test_a_question_with_its_options():
    assert lettered(" Which? ", ["x", "y"]) == "Which?\nA. x\nB. y\nAnswer:"
    assert lettered("Which?", ["x", "y"], right=1) == "Which?\nA. x\nB. y\nAnswer: B\n\n"


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B is close, but no.\n\nAnswer: C", "C"),
        ("answer : $d", "D"),
        ("Answer: A\nAnswer: B", "A"),
        ("ANSWER:b.", "B"),
        ("The answer is (C)", None),
        ("Answer: Carbon", None),
        ("Answer:\nB", None),
        ("", None),
    ],
)
def test_in_conversations_about_mmlu_a_letter_counts_where_it_was_asked_for(text, letter):
    for right in "ABCD":
        question = Question(id="1", prompt="p", answer=right)
        assert grade_letter_at_end(question, text) == {"EM": float(right == letter)}
