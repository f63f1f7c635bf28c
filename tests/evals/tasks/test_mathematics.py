"""Final answers: references are right, changed ones are wrong, and normal forms are Minerva's."""

import random
import re
import time
from itertools import islice, pairwise

import pytest

from dsv3.errors import MissingExtraError
from dsv3.evals.question import Question
from dsv3.evals.tasks import TASKS
from dsv3.evals.tasks.comparer import Comparer
from dsv3.evals.tasks.math_answer import equivalent, normal_form
from tests.evals.tasks.conftest import published, published_settings
from tests.evals.tasks.test_prompts import records


def grade(name, answer, *, wanted, **more):
    question = Question(id="1", prompt="p", answer=wanted, stop=next_stop(name), more=more)
    return TASKS[name].grade(question, answer)["EM"]


def next_stop(name):
    return {"math500": (), "math": ("\nProblem:",), "cmath": ("\n问题：",), "mgsm": ("\nQuestion:",)}.get(
        name, ("\nQ:",)
    )


def test_reference_solutions_are_right_and_changed_ones_wrong(shared_data):
    references = records(shared_data / "gsm8k" / "test.jsonl.gz")
    for question, record in zip(TASKS["gsm8k"].questions(shared_data), references, strict=True):
        number = question.answer
        other = str(int(number.replace(",", "")) + 1)
        assert TASKS["gsm8k"].grade(question, record["answer"])["EM"] == 1.0
        assert TASKS["gsm8k"].grade(question, record["answer"].rpartition("####")[0] + f"#### {other}")["EM"] == 0.0
        assert TASKS["gsm8k"].grade(question, f" So it is. The answer is {number}.\n\nQ: And 1?")["EM"] == 1.0
        assert TASKS["gsm8k"].grade(question, f" The answer is ${other} a day, not {number}.")["EM"] == 0.0


def test_gsm8k_finds_what_the_published_patterns_find(shared_data):
    """On every worked example and its like in words."""
    patterns = [
        published_settings(file)["filter_list"][0]["filter"][0]["regex_pattern"]
        for file in ("gsm8k/gsm8k.yaml", "gsm8k/gsm8k-cot.yaml")
    ]
    for record in records(shared_data / "gsm8k" / "train.jsonl.gz", count=300):
        steps, _, number = record["answer"].partition("#### ")
        for text in (record["answer"], f"{steps}The answer is {number}."):
            (found,) = [match[1].rstrip(".") for one in patterns if (match := re.search(one, text))]
            assert grade("gsm8k", text, wanted=found) == 1.0


@pytest.mark.parametrize(
    ("name", "answer", "wanted", "score"),
    [
        ("gsm8k", "She has 1,200 left", "1200", 1.0),
        ("gsm8k", "The answer is 18.00", "18", 1.0),
        ("gsm8k", "The answer is unclear", "18", 0.0),
        ("gsm8k", "", "18", 0.0),
        ("cmath", "3×6=18。所以答案是：18。", "18", 1.0),
        ("cmath", "所以答案是：18小包。\n\n\n问题：1+1\n答案：2", "18", 1.0),
        ("cmath", "答案是：2/10", "1/5", 1.0),
        ("cmath", "一共18包", "18", 1.0),
        ("cmath", "答案是：17", "18", 0.0),
    ],
)
def test_numbers_said_in_words(name, answer, wanted, score):
    assert grade(name, answer, wanted=wanted) == score


@pytest.mark.parametrize(
    ("language", "answer"),
    [
        ("en", "So 16 - 7 = 9. The answer is $18."),
        ("de", "Die Antwort lautet 18. Es sind 2 Tage"),
        ("es", "La respuesta es 18."),
        ("fr", "La réponse est 18."),
        ("ru", "Ответ — 18."),
        ("sw", "Jibu ni 18."),
        ("te", "సమాధానం 18."),
        ("th", "คำตอบคือ 18"),
        ("ja", "答えは18です。"),
        ("zh", "答案是 18。"),
        ("bn", "উত্তর হল 18।"),
        ("bn", "The answer is 18."),
        ("sw", "18"),
    ],
)
def test_mgsm_reads_the_answer_in_each_language(language, answer):
    expected = 0.0 if language == "de" else 1.0  # The last number after the word, as published.
    assert grade("mgsm", answer, wanted="18", language=language) == expected
    assert grade("mgsm", answer, wanted="19", language=language) == 0.0


def test_mgsm_finds_what_the_patterns_of_lm_eval_find():
    for language, settings in published("mgsm.utils").LANGUAGES.items():
        text = "7 + 11. " + settings["REGEX"].replace("(\\-?[0-9\\.\\,]+)", "18").replace("\\", "")
        assert re.search(settings["REGEX"], text)[1].rstrip(".") == "18"
        assert grade("mgsm", text, wanted="18", language=language) == 1.0


# MATH


def test_math_reference_solutions_are_right_and_others_wrong(shared_data):
    questions = list(islice(TASKS["math"].questions(shared_data), 0, None, 300))
    solutions = {
        record["problem"]: record["solution"] for record in records(shared_data / "math" / "train4500.jsonl.gz")
    }
    solutions |= {
        record["problem"]: record["solution"] for record in records(shared_data / "math" / "math500.jsonl.gz")
    }
    for question, other in pairwise(questions):
        problem = question.prompt.rpartition("Problem:\n")[2].removesuffix("\n\nSolution:")
        assert TASKS["math"].grade(question, solutions[problem]) == {"EM": 1.0, "EM as text": 1.0}
        closing = f"So.\nFinal Answer: The final answer is ${question.answer}$. I hope it is correct.\n\nProblem:\nx"
        assert TASKS["math"].grade(question, closing) == {"EM": 1.0, "EM as text": 1.0}
        wrong = TASKS["math"].grade(question, f"\\boxed{{{other.answer}+17.3}}")
        assert wrong == {"EM": 0.0, "EM as text": 0.0}


def test_math500_has_its_own_answers(shared_data):
    for question, record in zip(
        TASKS["math500"].questions(shared_data), records(shared_data / "math" / "math500.jsonl.gz"), strict=True
    ):
        if question.id.endswith("5.json"):
            assert TASKS["math500"].grade(question, record["solution"])["EM"] == 1.0, question.id


@pytest.mark.parametrize("step", [29, pytest.param(1, marks=pytest.mark.slow)])
def test_normal_forms_are_minervas(shared_data, step):
    theirs = published("minerva_math.utils")
    chance = random.Random(0)
    for file in ("math500", "train4500"):
        solutions = [record["solution"] for record in records(shared_data / "math" / f"{file}.jsonl.gz")]
        answers = [theirs.remove_boxed(theirs.last_boxed_only_string(one)) for one in solutions]
        for answer in answers[::step]:
            for one in (answer, f"${answer}$", f"x = {answer}", f"\\text{{{answer}}}", f"{answer} cm", f" {answer} "):
                assert normal_form(one) == theirs.normalize_final_answer(one), one
        for a, b in zip(answers, chance.sample(answers, len(answers)), strict=True):
            same = theirs.normalize_final_answer(a) == theirs.normalize_final_answer(b)
            assert (normal_form(a) == normal_form(b)) == same


@pytest.mark.parametrize(
    ("found", "wanted", "same"),
    [
        ("\\dfrac{1}{2}", "\\frac12", True),
        ("0.5", "\\frac{1}{2}", True),
        ("$x = 5$", "5", True),
        ("10,000", "10000", True),
        ("(-\\infty, 3]", "(-\\infty,3]", True),
        ("2\\sqrt{3}", "\\sqrt{12}", True),
        ("(1,2)", "(2,1)", False),
        ("\\frac{1}{3}", "0.33", False),
        ("x+1", "x-1", False),
        ("", "3", False),
    ],
)
def test_answers_are_compared_as_mathematics(found, wanted, same):
    pytest.importorskip("math_verify")
    assert equivalent(found, wanted) == same


def test_an_answer_that_never_ends_is_wrong_in_time_and_the_next_is_judged():
    pytest.importorskip("math_verify")
    comparer = Comparer(seconds=0.5)
    begun = time.monotonic()
    assert not comparer.same("9^{9^{9^{9}}}", "3")
    assert time.monotonic() - begun < 60  # Imports of the process included.
    comparer.seconds = 60.0
    assert comparer.same("0.5", "\\frac{1}{2}")
    comparer._process.kill()
    comparer._process.wait()
    assert comparer.same("2", "2.0")
    comparer.close()


def test_without_math_verify_the_extra_is_named(monkeypatch):
    monkeypatch.setattr("dsv3.evals.tasks.comparer.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match="eval"):
        Comparer()
