"""BIG-Bench Hard: the answers of the published examples are found."""

import re

import pytest

from dsv3.evals.question import Question
from dsv3.evals.tasks.reasoning import answer_said, grade, published_prompts
from tests.evals.tasks.conftest import published_settings


def test_the_answers_of_the_published_examples_are_found_as_by_lm_eval(shared_data):
    pattern = published_settings("bbh/cot_fewshot/_cot_fewshot_template_yaml")["filter_list"][0]["filter"][0][
        "regex_pattern"
    ]
    found = 0
    for text in published_prompts(shared_data / "bbh" / "cot_prompts.json.gz").values():
        for shot in text.split("\n\nQ:")[1:]:
            assert answer_said(shot) == re.findall(pattern, shot)[-1].strip()
            found += 1
    assert found == 3 * 27


def test_no_canary_is_shown_to_a_model(shared_data):
    assert not any(
        "canary" in text.lower() for text in published_prompts(shared_data / "bbh" / "cot_prompts.json.gz").values()
    )


@pytest.mark.parametrize(
    ("answer", "wanted", "score"),
    [
        ("\nSo the answer is (B).", "(B)", 1.0),
        ("So the answer is } ] >.\n\nQ: next\nA: So the answer is ).", "} ] >", 1.0),
        ("So the answer is Monsters, Inc.", "Monsters, Inc", 1.0),
        ("First the answer is 3. No: so the answer is -4.", "-4", 1.0),
        ("So the answer is (A) red.", "(A)", 0.0),
        ("(B)", "(B)", 0.0),
        ("", "(B)", 0.0),
    ],
)
def test_an_answer_is_right_letter_by_letter(answer, wanted, score):
    assert grade(Question(id="1", prompt="p", answer=wanted, stop=("\n\n", "\nQ:")), answer)["EM"] == score
