"""What rules make of answers; verdicts are those of the data sets' own formats."""

import gzip
import json
from dataclasses import replace
from functools import partial

import pytest

from dsv3.errors import ConfigError, DataError
from dsv3.evals.final_answer import final_answer, same_answer
from dsv3.evals.sandbox import Limits, run_on_input, why_no_sandbox
from dsv3.posttrain import rewards
from dsv3.posttrain.problem import Problem
from dsv3.posttrain.rewards import (
    answer_is_equivalent,
    answer_is_exact,
    answer_is_right,
    instructions_are_followed,
    program_prints,
    rewards_named,
    same_output,
    thinks_first,
)
from dsv3.posttrain.tasks import read_problems


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
    named = rewards_named(["answer=1", "format=0.25"])
    assert [(one.name, one.weight) for one in named] == [("answer", 1.0), ("format", 0.25)]
    for wrong, told in (
        ([], "no reward"),
        (["truth=1"], "no reward 'truth'"),
        (["answer=much"], "has no weight"),
        (["answer=1", "answer"], "given twice"),
    ):
        with pytest.raises(ConfigError, match=told):
            rewards_named(wrong)


def test_an_answer_that_cannot_be_computed_is_wrong_and_keeps_nobody_waiting():
    pytest.importorskip("math_verify", reason="math-verify is not installed")
    assert answer_is_equivalent(problem("7"), "So \\boxed{9^{9^{9^9}}}.") == 0
    assert answer_is_equivalent(problem("\\frac12"), "So \\boxed{0.5}.") == 1


@pytest.mark.parametrize(
    ("printed", "wanted", "same"),
    [
        ("3\n", "3", True),
        ("3 \n\n", " 3\n", True),
        ("1  2\t3\n4", "1 2 3\n4\n", True),
        ("1 2\n3", "1 2 3", False),
        ("1\n\n2", "1\n2", False),
        ("yes", "Yes", False),
        ("0.3333333", "0.333333333", True),
        ("0.33333", "0.333333333", False),
        ("1e3", "1000.0", True),
        ("12345678.4", "12345678.0", True),
        ("12345679", "12345678", False),
        ("12345678.1", "12345678", False),
        ("3.0", "3", True),
        ("nan", "1.0", False),
        ("inf", "1.0", False),
        ("1_0", "10", False),
        ("", "0", False),
        ("", "", True),
    ],
)
def test_outputs_are_compared_by_lines_words_and_numbers(printed, wanted, same):
    assert same_output(printed, wanted) is same


SUM = (("1 2\n", "3\n"), ("10 -4\n", "6\n"))
HOSTILE = {
    "is wrong on one case": "print(3)",
    "prints nothing": "",
    "leaves with an error": "print(sum(map(int, input().split())))\nraise SystemExit(1)",
    "is cut off at once": "import os\nprint(3)\nos._exit(0)",
    "prints all there is": "while True: print('3\\n6\\n' * 1000)",
    "claims the verdict": (
        'import os\nfor fd in range(3, 32):\n    try: os.write(fd, b\'{"said": "ended", "output": "3"}\')\n'
        "    except OSError: pass\nos._exit(0)"
    ),
    "looks for the cases": "import gc\nprint([o for o in gc.get_objects() if isinstance(o, dict) and 'output' in o])",
    "reads files": "print(open('/etc/passwd').read())",
}


@pytest.fixture
def walls():
    if (reason := why_no_sandbox()) is not None:
        pytest.skip(reason)


@pytest.mark.parametrize(
    "program",
    [
        "a, b = map(int, input().split())\nprint(a + b)",
        "import sys\nprint(sum(map(int, sys.stdin.read().split())))",
        "import sys\nprint(sum(map(int, sys.stdin.buffer.read().split())))",
    ],
)
@pytest.mark.usefixtures("walls")
def test_a_program_that_prints_what_it_must_is_worth_1(program):
    assert program_prints(replace(problem(""), cases=SUM), f"So:\n```python\n{program}\n```") == 1
    assert program_prints(problem(""), program) == 0  # there is nothing to pass


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.usefixtures("walls")
def test_a_program_that_does_not_is_worth_nothing(name, monkeypatch):
    monkeypatch.setattr(rewards, "run_on_input", partial(run_on_input, limits=Limits(seconds=1.0)))
    assert program_prints(replace(problem(""), cases=SUM), HOSTILE[name]) == 0


def test_cases_are_read_and_faults_named(tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_text(json.dumps({"prompt": "add", "cases": [{"input": "1 2", "output": "3"}]}))
    assert next(iter(read_problems(file))).cases == (("1 2", "3"),)
    for cases, told in (
        ({}, "no list"),
        ([["1 2", "3"]], "'input' and an 'output'"),
        ([{"input": "1 2", "output": 3}], "that are texts"),
        ([{"input": "", "output": "x" * 70_000}], "70,000 characters"),
    ):
        file.write_text(json.dumps({"prompt": "add", "cases": cases}))
        with pytest.raises(DataError, match=told):
            list(read_problems(file))


def test_instructions_are_worth_the_share_that_is_followed():
    asked = {
        "instruction_id_list": ["punctuation:no_comma", "keywords:existence"],
        "kwargs": [{}, {"keywords": ["sea"]}],
    }
    both = replace(problem(""), more=asked)
    assert instructions_are_followed(both, "<think>Well, well.</think>The sea is wide.") == 1
    assert instructions_are_followed(both, "The sea, it is wide.") == 0.5
    assert instructions_are_followed(both, "A boat, and no more.") == 0
    with pytest.raises(DataError, match="0 instructions"):
        instructions_are_followed(problem(""), "anything")
