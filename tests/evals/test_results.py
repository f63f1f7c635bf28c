"""Standard errors are those of the formulas and of resampling; models are compared item by item."""

import math
import random
from statistics import mean, stdev

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3.errors import DataError
from dsv3.evals.benchmarks import run_benchmarks
from dsv3.evals.question import EvalTask, Question
from dsv3.evals.results import compare, estimate, read_results, shown, table_beside_published, what_is_missing
from dsv3.evals.running import Outcome
from dsv3.evals.suite import suite_named


def outcomes_of(scores, *, groups=None):
    groups = groups or [""] * len(scores)
    return [
        Outcome(
            task="t",
            id=str(i),
            prompt_hash="h",
            scores=score if isinstance(score, dict) else {"EM": score},
            group=group,
        )
        for i, (score, group) in enumerate(zip(scores, groups, strict=True))
    ]


@given(right=st.integers(0, 50), wrong=st.integers(0, 50))
@settings(deadline=None, max_examples=50)
def test_the_error_of_a_share_is_the_binomial_one(right, wrong):
    if right + wrong == 0:
        return
    n, p = right + wrong, right / (right + wrong)
    found = estimate(outcomes_of([1.0] * right + [0.0] * wrong), name="EM")
    assert found.value == pytest.approx(p)
    assert found.standard_error == pytest.approx(math.sqrt(p * (1 - p) / n), abs=1e-12)
    assert (found.count, found.num_groups) == (n, 0)


def test_copies_in_a_group_do_not_make_a_score_surer():
    once = [1.0, 0.0, 1.0, 1.0, 0.0, 1.0, 0.0]
    copied = estimate(
        outcomes_of([score for score in once for _ in range(9)], groups=[str(i) for i in range(7) for _ in range(9)]),
        name="EM",
    )
    alone = estimate(outcomes_of(once), name="EM")
    assert copied.standard_error == pytest.approx(alone.standard_error)
    assert copied.num_groups == 7


def test_one_group_alone_says_nothing_of_groups():
    scores = [1.0, 0.0, 1.0]
    assert estimate(outcomes_of(scores, groups=["a"] * 3), name="EM") == estimate(outcomes_of(scores), name="EM")


def test_the_error_of_a_ratio_is_that_of_resampled_texts():
    draw = random.Random(1)
    parts = []
    for _ in range(200):
        size = float(draw.randint(10, 2000))
        parts.append({"bits": size * draw.gauss(1.5, 0.4), "bytes": size})
    found = estimate(outcomes_of(parts), name="BPB", ratio=("bits", "bytes"))
    assert found.value == pytest.approx(sum(part["bits"] for part in parts) / sum(part["bytes"] for part in parts))
    samples = []
    for _ in range(1000):
        sample = draw.choices(parts, k=len(parts))
        samples.append(sum(part["bits"] for part in sample) / sum(part["bytes"] for part in sample))
    assert found.value == pytest.approx(mean(samples), rel=0.01)
    assert found.standard_error == pytest.approx(stdev(samples), rel=0.1)


# ---- from a run to its tables ----


class Knows:
    """Gives the right answers, but for some."""

    def __init__(self, wrong=()):
        self.wrong = wrong

    def continuations(self, pairs):
        raise NotImplementedError

    def rolling(self, texts):
        return [-math.log(2) * (2.0 + (text in self.wrong)) * len(text) for text in texts]

    def generate(self, prompts, *, stops, max_tokens):
        return ["wrong" if prompt in self.wrong else prompt for prompt in prompts]


def echoes(name, count, **changes):
    questions = [
        Question(id=str(i), prompt=f"{name} {i}", answer=f"{name} {i}", more={"kind": "ab"[i % 2]})
        for i in range(count)
    ]
    given = {
        "name": name,
        "protocol": "generate",
        "metric": "EM",
        "shots": 8,
        "questions": lambda folder: iter(questions),
        "grade": lambda question, answer: {"EM": float(answer == question.answer)},
    }
    return EvalTask(**(given | changes))


PILE = echoes("pile", 5, protocol="rolling", metric="BPB", grade=None)


def results_in(folder, *, wrong=(), tasks=None, suite="base"):
    return run_benchmarks(
        tasks or [echoes("gsm8k", 10, group_by="kind"), PILE],
        suite=suite_named(suite),
        answerer_for=lambda task: Knows(wrong),
        model={"model": folder.name},
        data=folder,
        folder=folder,
    )


def test_a_task_has_its_mean_error_groups_and_first_prompt(tmp_path):
    results = results_in(tmp_path, wrong=("gsm8k 1", "gsm8k 3"))
    task, pile = results["tasks"]
    assert task["score"] == pytest.approx(0.8)
    assert task["groups"] == {"a": {"score": 1.0, "count": 5}, "b": {"score": pytest.approx(0.6), "count": 5}}
    assert task["standard_error"] == pytest.approx(math.sqrt(2 * (5 * 0.2) ** 2) / 10)
    assert task["first_prompt"] == "gsm8k 0"
    assert (pile["metric"], pile["score"]) == ("BPB", pytest.approx(2.0))
    assert read_results(tmp_path)["tasks"] == results["tasks"]


def test_every_row_of_a_suite_has_a_score_or_a_sentence(tmp_path):
    results = results_in(tmp_path)
    table, missing = table_beside_published(results), what_is_missing(results)
    assert [row[0] for row in table] == ["benchmark", "GSM8K", "pile"]
    assert table[1] == ["GSM8K", "EM", "8", "100.0 ± 0.0", "10", "81.6", "88.3", "83.5", "89.3"]
    assert table[2][3] == "2.000 ± 0.000"
    for row in suite_named("base").rows:
        assert row.benchmark == "GSM8K" or any(line.startswith(f"{row.benchmark}: ") for line in missing)
    assert "DROP: needs data: DROP; lm-eval has drop" in missing
    assert "MBPP: not asked; --tasks mbpp" in missing


def test_what_went_wrong_is_said_by_task_and_item(tmp_path):
    def questions(folder):
        for i in range(6):
            yield Question(id=f"empty{i}", prompt="" if i else "gsm8k 0", answer="gsm8k 0")
        raise DataError("gsm8k.jsonl is cut off")

    missing = what_is_missing(results_in(tmp_path, tasks=[echoes("gsm8k", 0, questions=questions)]))
    assert missing[-5:] == [
        "gsm8k: gsm8k.jsonl is cut off; the 1 items before it are scored",
        *(f"gsm8k, item empty{i}: the prompt is empty" for i in (1, 2, 3)),
        "gsm8k: 2 more items were not scored (results.json)",
    ]


def test_scores_that_are_a_sum_over_a_sum(tmp_path):
    fields = {
        "name": "ifeval",
        "ratios": {"instruction": ("followed", "asked")},
        "protocol": "generate",
        "metric": "prompt",
        "shots": 0,
        "questions": lambda folder: iter([Question(id=str(i), prompt=f"p{i}", answer=f"p{i}") for i in range(3)]),
        "grade": lambda question, answer: {
            "prompt": float(question.id == "0"),
            "followed": 1.0,
            "asked": 1.0 + 2 * float(question.id),
        },
    }
    [task] = results_in(tmp_path, tasks=[EvalTask(**fields)])["tasks"]
    assert {name: score["value"] for name, score in task["scores"].items()} == pytest.approx(
        {"prompt": 1 / 3, "instruction": 3 / 9}
    )
    assert task["score"] == pytest.approx(1 / 3)


def test_models_are_compared_item_by_item(tmp_path):
    wrong_first, wrong_second = ("gsm8k 1",), ("gsm8k 1", "gsm8k 2", "gsm8k 3", "gsm8k 4", "pile 0")
    tasks = [echoes("gsm8k", 100), PILE]
    results_in(tmp_path / "a", wrong=wrong_first, tasks=tasks)
    results_in(tmp_path / "b", wrong=wrong_second, tasks=[echoes("gsm8k", 90), PILE])
    gsm8k, pile = compare(tmp_path / "a", tmp_path / "b")
    assert (gsm8k.first, gsm8k.second) == pytest.approx((89 / 90, 86 / 90))
    assert (gsm8k.count, gsm8k.first_better, gsm8k.second_better, gsm8k.unpaired) == (90, 3, 0, 10)
    # The paired error: of 90 differences, three are 1 and the others 0.
    assert gsm8k.standard_error == pytest.approx(math.sqrt(3 / 90 * (1 - 3 / 90) / 90))
    assert not gsm8k.is_seen  # 3.3 points, and 1.96 times 1.89
    assert (pile.first_better, pile.second_better) == (1, 0)
    assert pile.difference == pytest.approx(2.0 - 2.2)


def test_a_model_does_not_differ_from_itself_and_strangers_share_nothing(tmp_path):
    for name in "ab":
        results_in(tmp_path / name, wrong=("gsm8k 3",))
    for one in compare(tmp_path / "a", tmp_path / "b"):
        assert (one.difference, one.standard_error, one.is_seen) == (0.0, 0.0, False)
    results_in(tmp_path / "c", tasks=[echoes("mgsm", 3)])
    with pytest.raises(DataError, match="share no item"):
        compare(tmp_path / "a", tmp_path / "c")
    with pytest.raises(DataError, match=r"there is no .*results.json"):
        compare(tmp_path / "a", tmp_path / "nowhere")


def test_scores_are_shown_as_the_report_shows_them():
    assert shown(0.8931, metric="EM", error=0.0081) == "89.3 ± 0.8"
    assert shown(0.548, metric="BPB") == "0.548"
    assert shown(None, metric="EM") == "-"
