"""CRUXEval: what a function returns, or what it was given; the answer is run, so any right one counts.

[PYTHON]
def f(n):
    return n
assert f(17) == ??
[/PYTHON]
[ANSWER]
assert f(17) == 17
[/ANSWER]
"""

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

from dsv3.evals.question import EvalTask, Question
from dsv3.evals.sandbox import run_tests
from dsv3.evals.tasks.answers import cut_at
from dsv3.evals.tasks.items import read_items

ASK_OUTPUT = (
    "You are given a Python function and an assertion containing an input to the function. Complete the assertion with "
    "a literal (no unsimplified expressions, no function calls) containing the output when executing the provided code "
    "on the given input, even if the function is incorrect or incomplete. Do NOT output any extra information. Provide "
    "the full assertion with the correct output in [ANSWER] and [/ANSWER] tags, following the examples."
)
ASK_INPUT = (
    "You will be given a function f and an output in the form f(??) == output. Find any input such that executing f on "
    "the input leads to the given output. There may be multiple answers, but you should only output one. In [ANSWER] "
    "and [/ANSWER] tags, complete the assertion with one such input that will produce the output when executing the "
    "function."
)
COUNT_EVEN = (
    "def f(my_list):\n    count = 0\n    for i in my_list:\n        if len(i) % 2 == 0:\n            count += 1\n"
    "    return count"
)
OUTPUT_SHOTS = (("def f(n):\n    return n", "17", "17"), ('def f(s):\n    return s + "a"', '"x9j"', '"x9ja"'))
INPUT_SHOTS = (
    (COUNT_EVEN, '["mq", "px", "zy"]', "3"),
    ("def f(s1, s2):\n    return s1 + s2", '"ba", "nana"', '"banana"'),
)
"""The published prompts (Gu et al. 2024), word for word: code, input, output."""


def asked_form(code: str, *, given: str, wanted: str) -> str:
    """Return a function and an assertion about it, up to the answer."""
    return f"[PYTHON]\n{code}\nassert f({given}) == {wanted}\n[/PYTHON]\n[ANSWER]\n"


def answered(given: str, wanted: str) -> str:
    """Return the answer of a worked example."""
    return f"assert f({given}) == {wanted}\n[/ANSWER]\n\n"


def cruxeval_o(folder: Path) -> Iterator[Question]:
    """Read CRUXEval-O: the output is asked for."""
    shots = "".join(asked_form(code, given=x, wanted="??") + answered(x, y) for code, x, y in OUTPUT_SHOTS)
    return cruxeval(folder, before=f"{ASK_OUTPUT}\n\n{shots}", asked="output")


def cruxeval_i(folder: Path) -> Iterator[Question]:
    """Read CRUXEval-I: an input is asked for."""
    shots = "".join(asked_form(code, given="??", wanted=y) + answered(x, y) for code, x, y in INPUT_SHOTS)
    return cruxeval(folder, before=f"{ASK_INPUT}\n\n{shots}", asked="input")


def cruxeval(folder: Path, *, before: str, asked: str) -> Iterator[Question]:
    """Read the 800 functions, and ask for what is named by `asked`."""
    for item in read_items(folder / "cruxeval" / "cruxeval.jsonl.gz", id_key="id"):
        given = "??" if asked == "input" else str(item.values.get("input"))  # which may be empty
        wanted = "??" if asked == "output" else item.text("output")
        yield Question(
            id=item.id,
            prompt=before + asked_form(item.text("code"), given=given, wanted=wanted),
            answer=item.text("output"),
            stop=("[/ANSWER]",),
            more={"code": item.text("code")},
        )


def sides(answer: str) -> tuple[ast.expr, ast.expr] | ast.expr | None:
    """Return the two sides of the assertion in an answer, or the expression that the answer is; None for neither."""
    try:
        (statement,) = ast.parse(answer.strip()).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
    match statement:
        case ast.Assert(test=ast.Compare(left=left, ops=[ast.Eq()], comparators=[right])):
            return left, right
        case ast.Expr(value=ast.Compare(left=left, ops=[ast.Eq()], comparators=[right])):
            return left, right
        case ast.Expr(value=value):
            return value
    return None


def grade_output(question: Question, answer: str) -> Mapping[str, float]:
    """1 if the output that the answer asserts is the right one, and does not call the function itself."""
    found = sides(cut_at(answer, question.stop))
    said = found[1] if isinstance(found, tuple) else found
    if said is None or any(isinstance(node, ast.Name) and node.id == "f" for node in ast.walk(said)):
        return {"EM": 0.0}
    return {"EM": holds(question, said)}


def grade_input(question: Question, answer: str) -> Mapping[str, float]:
    """1 if the function returns the right output for the input that the answer gives."""
    found = sides(cut_at(answer, question.stop))
    said = found[0] if isinstance(found, tuple) else found
    if not (isinstance(said, ast.Call) and isinstance(said.func, ast.Name) and said.func.id == "f"):
        return {"EM": 0.0}
    return {"EM": holds(question, said)}


def holds(question: Question, said: ast.expr) -> float:
    """Run the code, and compare what was said with the right output. One expression can do no more than be compared."""
    test = f"assert ({ast.unparse(said)}) == ({question.answer})"
    return float(run_tests(question.more["code"], tests=(test,)).passed)


NOTE = "Where the published evaluation splits at '==', this one reads the assertion as Python"
CODE_REASONING = (
    EvalTask(
        name="cruxeval_i",
        protocol="generate",
        metric="EM",
        shots=2,
        questions=cruxeval_i,
        grade=grade_input,
        note=NOTE,
    ),
    EvalTask(
        name="cruxeval_o",
        protocol="generate",
        metric="EM",
        shots=2,
        questions=cruxeval_o,
        grade=grade_output,
        note=NOTE,
    ),
)
