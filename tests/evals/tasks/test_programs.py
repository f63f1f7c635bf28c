"""Programs that are run: references pass, empty ones do not, and pass@k is its definition."""

from itertools import combinations, islice
from math import comb

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3.evals.sandbox import why_no_sandbox
from dsv3.evals.tasks import TASKS, pass_at_k
from tests.evals.tasks.test_prompts import records


@pytest.fixture(autouse=True)
def walls(request):
    if "no_walls" not in request.keywords and (reason := why_no_sandbox()) is not None:
        pytest.skip(reason)


def score(name, question, answer):
    (value,) = TASKS[name].grade(question, answer).values()
    return value


def sample(name, shared_data, *, step):
    return islice(TASKS[name].questions(shared_data), 0, None, step)


def test_reference_programs_pass_and_empty_ones_fail(shared_data):
    solutions = {
        one["task_id"]: one["canonical_solution"] for one in records(shared_data / "humaneval" / "HumanEval.jsonl.gz")
    }
    for question in sample("humaneval", shared_data, step=90):
        assert score("humaneval", question, solutions[question.id] + "\ndef next(): broken(") == 1.0
        assert score("humaneval", question, "    return None\n") == 0.0
        whole = question.prompt + solutions[question.id]
        assert score("humaneval", question, f"Here:\n```python\n{whole}```\nDone.") == 1.0
        assert score("humaneval", question, "    return ```") == 0.0


def test_mbpp_references_pass_and_empty_ones_fail(shared_data):
    programs = {str(one["task_id"]): one["code"] for one in records(shared_data / "mbpp" / "mbpp.jsonl.gz")}
    for question in sample("mbpp", shared_data, step=300):
        assert score("mbpp", question, programs[question.id] + "\n[DONE]\n\nYou are broken(") == 1.0
        assert score("mbpp", question, f"```python\n{programs[question.id]}\n```") == 1.0
        assert score("mbpp", question, "pass\n[DONE]") == 0.0


def test_a_hole_is_filled_by_what_was_cut_out(shared_data):
    for kind in ("SingleLine", "MultiLine", "RandomSpan"):
        cut = {
            one["task_id"]: one["canonical_solution"]
            for one in records(shared_data / "humaneval" / f"HumanEval-{kind}Infilling.jsonl.gz", count=400)
        }
        asked = (one for one in TASKS["humaneval_infilling"].questions(shared_data) if one.id in cut)
        for question in islice(asked, 7, 8):
            middle = cut[question.id]
            assert score("humaneval_infilling", question, middle) == 1.0
            assert score("humaneval_infilling", question, "!") == 0.0
            if kind == "SingleLine":
                assert score("humaneval_infilling", question, middle.rstrip("\n")) == 1.0
                assert score("humaneval_infilling", question, middle + "    and on(\n") == 1.0


# CRUXEval


def test_the_right_output_is_right_and_another_wrong(shared_data):
    for question in sample("cruxeval_o", shared_data, step=500):
        for answer in (f"assert f(1) == {question.answer}\n[/ANSWER]", question.answer, f"f(x) == {question.answer}"):
            assert score("cruxeval_o", question, answer) == 1.0
        for answer in ("assert f(1) == 'no'", "f(1)", "1 or True", "'a' == 'b' == 'c'", "", "import os", "(" * 500):
            assert score("cruxeval_o", question, answer) == 0.0


def test_an_output_may_hold_the_sign_of_equality(shared_data):
    """At which the published evaluation would cut."""
    question = next(one for one in TASKS["cruxeval_o"].questions(shared_data) if one.answer.startswith("'"))
    assert score("cruxeval_o", question, f"assert f('a == b') == {question.answer}") == 1.0


def test_any_input_that_gives_the_output_is_right(shared_data):
    inputs = {one["id"]: one["input"] for one in records(shared_data / "cruxeval" / "cruxeval.jsonl.gz")}
    for question in sample("cruxeval_i", shared_data, step=500):
        given = inputs[question.id]
        assert score("cruxeval_i", question, f"assert f({given}) == {question.answer}\n[/ANSWER]") == 1.0
        assert score("cruxeval_i", question, f"f(*[{given}])") == 1.0
        for answer in (question.answer, f"assert {question.answer} == f({given})", "f('no such input')", "f(", ""):
            assert score("cruxeval_i", question, answer) == 0.0


# pass@k


@pytest.mark.no_walls
@given(st.integers(1, 8).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))))
def test_pass_at_k_is_the_share_of_choices_with_one_that_passes(numbers):
    n, c, k = numbers
    passing = sum(any(one < c for one in chosen) for chosen in combinations(range(n), k))
    assert pass_at_k(n, c, k) == pytest.approx(passing / comb(n, k))


@pytest.mark.no_walls
@pytest.mark.parametrize(("n", "c", "k"), [(3, 4, 1), (3, -1, 1), (3, 1, 0), (3, 1, 4)])
def test_pass_at_k_of_what_cannot_be_is_refused(n, c, k):
    with pytest.raises(ValueError, match="needs at least"):
        pass_at_k(n, c, k)
