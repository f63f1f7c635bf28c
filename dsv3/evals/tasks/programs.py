"""Programs that a model writes, run against tests in the sandbox: HumanEval, its infilling, MBPP."""

from collections.abc import Iterator, Mapping
from math import comb
from pathlib import Path

from dsv3.data.special_tokens import FIM_BEGIN, FIM_END, FIM_HOLE
from dsv3.evals.question import EvalTask, Question
from dsv3.evals.sandbox import program_in, run_tests
from dsv3.evals.tasks.answers import cut_at
from dsv3.evals.tasks.items import Item, first_items, read_items

HUMANEVAL_STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
INFILLING = {"single": "SingleLine", "multi": "MultiLine", "random": "RandomSpan"}


def pass_at_k(n: int, c: int, k: int) -> float:
    """Return how likely one of `k` programs passes, estimated without bias from `n`, of which `c` passed.

    Source: Chen et al. 2021, eq. 1: 1 - C(n - c, k) / C(n, k).
    """
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f"pass@{k} needs at least {k} programs, and {c} that passed among {n}")
    return 1 - comb(n - c, k) / comb(n, k)


# HumanEval


def humaneval(folder: Path) -> Iterator[Question]:
    """Read HumanEval: a signature and what it is to do; the body is asked for."""
    for item in read_items(folder / "humaneval" / "HumanEval.jsonl.gz", id_key="task_id"):
        prompt = item.text("prompt")
        more = {"test": check_of(item), "name": item.text("entry_point"), "before": prompt}
        yield Question(id=item.id, prompt=prompt, stop=HUMANEVAL_STOPS, max_tokens=1024, more=more)


def check_of(item: Item) -> str:
    """Return the test of a function, called."""
    return f"{item.text('test')}\ncheck({item.text('entry_point')})"


def grade_humaneval(question: Question, answer: str) -> Mapping[str, float]:
    """1 if the function passes. A chat model may answer with the whole function in a fenced block."""
    program = question.more["before"] + cut_at(answer, question.stop)
    if "```" in answer and f"def {question.more['name']}(" in (fenced := program_in(answer)):
        program = f"{question.more['before']}\n    pass\n\n{fenced}"
    return {"pass@1": float(run_tests(program, tests=(question.more["test"],)).passed)}


# Infilling


def humaneval_infilling(folder: Path) -> Iterator[Question]:
    """Read HumanEval with a hole in each solution: a line, some lines, or any span. Asked as prefix, suffix, middle."""
    for kind, name in INFILLING.items():
        for item in read_items(folder / "humaneval" / f"HumanEval-{name}Infilling.jsonl.gz", id_key="task_id"):
            before, after = item.text("prompt"), item.values.get("suffix")
            if not isinstance(after, str):
                raise item.broken("'suffix' should be a text")
            yield Question(
                id=item.id,
                prompt=f"{FIM_BEGIN}{before}{FIM_HOLE}{after}{FIM_END}",
                stop=("\n",) if kind == "single" else (),
                more={"kind": kind, "test": check_of(item), "before": before, "after": after},
            )


def grade_infilling(question: Question, answer: str) -> Mapping[str, float]:
    """1 if the function passes with the answer in its hole; a single line ends where its line ends."""
    middle = cut_at(answer, question.stop) + "\n" if question.more["kind"] == "single" else answer
    program = question.more["before"] + middle + question.more["after"]
    return {"pass@1": float(run_tests(program, tests=(question.more["test"],)).passed)}


# MBPP


def mbpp(folder: Path) -> Iterator[Question]:
    """Read MBPP's 500 test problems, each after problems 2, 3 and 4 of its prompt split."""
    path = folder / "mbpp" / "mbpp.jsonl.gz"
    shots = first_items(path, count=4, id_key="task_id")[1:]
    before = "".join(f"{mbpp_form(shot)}{shot.text('code')}\n[DONE]\n\n" for shot in shots)
    for item in read_items(path, id_key="task_id"):
        if item.id != str(item.line):
            raise item.broken("problems should stand in the order of 'task_id', by which MBPP is split")
        if 11 <= item.line <= 510:
            setup = item.values.get("test_setup_code") or ""
            more = {"tests": (*filter(None, [setup]), *item.texts("test_list"))}
            yield Question(id=item.id, prompt=before + mbpp_form(item), stop=("[DONE]",), more=more)


def mbpp_form(item: Item) -> str:
    """Return a problem with its three tests, up to the program."""
    tests = "\n".join(item.texts("test_list"))
    task = f"You are an expert Python programmer, and here is your task: {item.text('text')}"
    return f"{task} Your code should pass these tests:\n\n{tests}\n[BEGIN]\n"


def grade_mbpp(question: Question, answer: str) -> Mapping[str, float]:
    """1 if the program passes its three tests."""
    program = program_in(cut_at(answer, question.stop))
    return {"pass@1": float(run_tests(program, tests=question.more["tests"]).passed)}


PROGRAMS = (
    EvalTask(
        name="humaneval", protocol="generate", metric="pass@1", shots=0, questions=humaneval, grade=grade_humaneval
    ),
    EvalTask(
        name="humaneval_infilling",
        protocol="generate",
        metric="pass@1",
        shots=0,
        questions=humaneval_infilling,
        grade=grade_infilling,
        group_by="kind",
        note="Not in the report's tables; the prompt spells V3's tokens for infilling",
    ),
    EvalTask(name="mbpp", protocol="generate", metric="pass@1", shots=3, questions=mbpp, grade=grade_mbpp),
)
