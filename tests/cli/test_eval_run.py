"""dsv3 eval run and compare, with tasks and a model of its own."""

import json
import sys
from contextlib import contextmanager
from types import ModuleType

import pytest

from dsv3.cli import eval_run
from dsv3.cli.main import main
from dsv3.evals.question import EvalTask, Question


def task(name, count=4, **changes):
    questions = [Question(id=str(i), prompt=f"{name} {i}", answer=f"{name} {i}") for i in range(count)]
    given = {
        "name": name,
        "protocol": "generate",
        "metric": "EM",
        "shots": 8,
        "questions": lambda folder: iter(questions),
        "grade": lambda question, answer: {"EM": float(answer == question.answer)},
    }
    return EvalTask(**(given | changes))


class Echo:
    def continuations(self, pairs):
        raise NotImplementedError

    def rolling(self, texts):
        raise NotImplementedError

    def generate(self, prompts, *, stops, max_tokens):
        return list(prompts)


@pytest.fixture(autouse=True)
def tasks_and_a_model(monkeypatch, tmp_path):
    """Stand-ins for the tasks, and for the model that answers them."""
    tasks, scoring = ModuleType("dsv3.evals.tasks"), ModuleType("dsv3.evals.scoring")
    names = ("arc_easy", "hellaswag", "piqa", "winogrande", "nq_open", "humaneval", "cruxeval_o", "cmath", "mbpp")
    tasks.TASKS = {name: task(name, count=0) for name in names} | {"gsm8k": task("gsm8k", count=60)}
    monkeypatch.setitem(sys.modules, "dsv3.evals.tasks", tasks)
    monkeypatch.setitem(sys.modules, "dsv3.evals.scoring", scoring)

    @contextmanager
    def of_folder(model, **settings):
        yield eval_run._Subject(
            answerer_for=lambda task: Echo(), identity={"model": model.name}, folder=model / "evaluation"
        )

    monkeypatch.setattr(eval_run, "_of_folder", of_folder)
    (tmp_path / "data").mkdir()


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as ended:
        main(["eval", *map(str, arguments)])
    found = capsys.readouterr()
    return ended.value.code, found.out, found.err


def test_run_may_be_left_out(capsys, tmp_path):
    words = (tmp_path / "model", "--data", tmp_path / "data", "--tasks", "gsm8k")
    outs = [run(capsys, *before, *words) for before in ((), ("run",))]
    assert outs[0][:2] == outs[1][:2]  # what was asked is not asked again, which the other stream tells
    assert outs[0][0] == 0
    assert run(capsys, "--help")[1].startswith("Usage: dsv3 eval [OPTIONS]")
    code, _, err = run(capsys, "--suite", "base")
    assert (code, "'--data'" in err) == (2, True)


def test_a_suite_is_run_and_shown_beside_what_was_published(capsys, tmp_path):
    code, out, err = run(
        capsys, "run", tmp_path / "model", "--data", tmp_path / "data", "--suite", "base", "--tasks", "gsm8k"
    )
    assert code == 0
    assert out.splitlines()[1].split() == [
        "GSM8K",
        "EM",
        "8",
        "100.0",
        "±",
        "0.0",
        "60",
        "81.6",
        "88.3",
        "83.5",
        "89.3",
    ]
    assert "DROP: needs data: DROP" in out
    assert "gsm8k: EM 100.0 ± 0.0 (60 items)" in err
    assert (tmp_path / "model" / "evaluation" / "items.jsonl").exists()
    assert (
        "60 of an earlier sitting"
        in run(capsys, "run", tmp_path / "model", "--data", tmp_path / "data", "--suite", "base", "--tasks", "gsm8k")[2]
    )


def test_the_quick_suite_asks_fifty_items_of_a_task(capsys, tmp_path):
    code, out, _ = run(
        capsys, "run", tmp_path / "model", "--data", tmp_path / "data", "--json", "--output", tmp_path / "o"
    )
    results = json.loads(out)
    assert code == 0
    assert {one["task"]: one["count"] for one in results["tasks"]}["gsm8k"] == 50
    assert len(results["tasks"]) == 9
    assert results == json.loads((tmp_path / "o" / "results.json").read_text())


def test_two_folders_are_compared(capsys, tmp_path):
    for name in "ab":
        run(capsys, "run", tmp_path / name, "--data", tmp_path / "data", "--tasks", "gsm8k")
    code, out, _ = run(capsys, "compare", tmp_path / "a" / "evaluation", tmp_path / "b" / "evaluation")
    assert code == 0
    assert "no difference seen" in out
    code, out, _ = run(capsys, "compare", tmp_path / "a" / "evaluation", tmp_path / "b" / "evaluation", "--json")
    assert json.loads(out)[0]["count"] == 50


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "give a MODEL, or --endpoint URL"),
        (["MODEL", "--endpoint", "http://a/v1", "--endpoint-model", "m"], "and not both"),
        (["--endpoint", "http://a/v1"], "go together"),
        (["MODEL", "--key-variable", "KEY"], "go together"),
        (["MODEL", "--tasks", "drop", "--suite", "base"], "DROP needs data: DROP"),
        (["MODEL", "--suite", "bass"], "choose one of base, chat, quick"),
        (["MODEL", "--data", "nowhere"], "nowhere is no folder"),
    ],
)
def test_what_does_not_go_together_is_refused(capsys, tmp_path, arguments, told):
    arguments = [tmp_path / "model" if one == "MODEL" else one for one in arguments]
    if "--data" not in arguments:
        arguments += ["--data", tmp_path / "data"]
    code, _, err = run(capsys, "run", *arguments)
    assert code != 0
    assert told in " ".join(err.split())
