"""Short answers: SQuAD's comparison for NQ, CMRC's own for passages in Chinese."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3.evals.question import Question
from dsv3.evals.tasks.reading import common_run, grade_alias, grade_passage, overlap, plain


@pytest.mark.parametrize(
    ("said", "score"),
    [
        (" December 1972", 1.0),
        (" december, 1972.", 1.0),
        (" The 14 December 1972 UTC\nQ: next", 1.0),
        (" 1972", 0.0),
        ("", 0.0),
    ],
)
def test_any_alias_is_right_but_for_case_marks_and_articles(said, score):
    question = Question(id="1", prompt="p", answer=("14 December 1972 UTC", "December 1972"))
    assert grade_alias(question, said)["EM"] == score


def test_plain_text_is_that_of_squad():
    assert plain("The  U.S. Navy's  an-a 'Seal'") == "us navys ana seal"
    assert plain("theatre") == "theatre"


@pytest.mark.parametrize(
    ("said", "exact", "f1"),
    [
        ("光荣和ω-force", 1.0, 1.0),
        ("「光荣」和ω-force。", 1.0, 1.0),
        ("光荣", 0.0, 2 * 2 / (2 + 4)),  # The longest common run is 光荣; wanted are 光, 荣, 和 and ωforce.
        ("光荣与force", 0.0, 2 * 2 / (4 + 4)),
        ("任天堂", 0.0, 0.0),
        ("", 0.0, 0.0),
    ],
)
def test_passages_are_judged_as_by_cmrc(said, exact, f1):
    scores = grade_passage(Question(id="1", prompt="p", answer=("光荣和ω-force",)), said)
    assert scores["EM"] == exact
    assert scores["F1"] == pytest.approx(f1)


def test_the_best_of_several_answers_counts():
    question = Question(id="1", prompt="p", answer=("村雨城", "任天堂游戏谜之村雨城"))
    assert grade_passage(question, "任天堂游戏谜之村雨城\n问题：")["F1"] == 1.0


@given(st.text("光荣和村ab 1，。", max_size=12), st.text("光荣和村ab 1，。", max_size=12))
def test_overlap_is_symmetric_and_whole_only_for_equals(a, b):
    assert overlap(a, b) == pytest.approx(overlap(b, a))
    assert 0.0 <= overlap(a, b) <= 1.0


@given(st.lists(st.sampled_from("abc"), max_size=7), st.lists(st.sampled_from("abc"), max_size=7))
def test_a_common_run_is_the_longest_of_all(a, b):
    runs = {"".join(a[i:j]) for i in range(len(a) + 1) for j in range(i, len(a) + 1)}
    assert common_run(a, b) == max(len(run) for run in runs if run in "".join(b))
