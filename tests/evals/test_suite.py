"""Every row of the report's two tables of evaluations is there, with its numbers and an answer."""

import re

import pytest

from dsv3.errors import ConfigError
from dsv3.evals.question import EvalTask
from dsv3.evals.suite import BASE, CHAT, SUITES, chosen_tasks, suite_named
from dsv3.evals.tasks import TASKS

TABLE_3 = """
Pile-test 0.606 0.638 0.542 0.548
BBH 78.8 79.8 82.9 87.5
MMLU 78.4 85.0 84.4 87.1
MMLU-Redux 75.6 83.2 81.3 86.2
MMLU-Pro 51.4 58.3 52.8 64.4
DROP 80.4 80.6 86.0 89.0
ARC-Easy 97.6 98.4 98.4 98.9
ARC-Challenge 92.2 94.5 95.3 95.3
HellaSwag 87.1 84.8 89.2 88.9
PIQA 83.9 82.6 85.9 84.7
WinoGrande 86.3 82.3 85.2 84.9
RACE-Middle 73.1 68.1 74.2 67.1
RACE-High 52.6 50.3 56.8 51.3
TriviaQA 80.0 71.9 82.7 82.9
NaturalQuestions 38.6 33.2 41.5 40.0
AGIEval 57.5 75.8 60.6 79.6
HumanEval 43.3 53.0 54.9 65.2
MBPP 65.0 72.6 68.4 75.4
LiveCodeBench-Base (0801-1101) 11.6 12.9 15.5 19.4
CRUXEval-I 52.5 59.1 58.5 67.3
CRUXEval-O 49.8 59.9 59.9 69.8
GSM8K 81.6 88.3 83.5 89.3
MATH 43.4 54.4 49.0 61.6
MGSM 63.6 76.2 69.9 79.8
CMath 78.7 84.5 77.3 90.7
CLUEWSC 82.0 82.5 83.0 82.7
C-Eval 81.4 89.2 72.5 90.1
CMMLU 84.0 89.5 73.7 88.8
CMRC 77.4 75.8 76.0 76.3
C3 77.4 76.7 79.7 78.6
CCPM 93.0 88.5 78.6 92.0
MMMLU-non-English 64.0 74.8 73.8 79.4
"""
TABLE_6 = """
MMLU 78.2 80.6 85.3 88.6 88.3 87.2 88.5
MMLU-Redux 77.9 80.3 85.6 86.2 88.9 88.0 89.1
MMLU-Pro 58.5 66.2 71.6 73.3 78.0 72.6 75.9
DROP 83.0 87.8 76.7 88.7 88.3 83.7 91.6
IF-Eval 57.7 80.6 84.1 86.0 86.5 84.3 86.1
GPQA-Diamond 35.3 41.3 49.0 51.1 65.0 49.9 59.1
SimpleQA 9.0 10.2 9.1 17.1 28.4 38.2 24.9
FRAMES 66.9 65.4 69.8 70.0 72.5 80.5 73.3
LongBench v2 31.6 35.4 39.4 36.1 41.0 48.1 48.7
HumanEval-Mul 69.3 77.4 77.3 77.2 81.7 80.5 82.6
LiveCodeBench (CoT, Aug-Nov 2024) 18.8 29.2 31.1 28.4 36.3 33.4 40.5
LiveCodeBench (Aug-Nov 2024) 20.3 28.4 28.7 30.1 32.8 34.2 37.6
Codeforces 17.5 35.6 24.8 25.3 20.3 23.6 51.6
SWE-bench Verified (Agentless) - 22.6 23.8 24.5 50.8 38.8 42.0
Aider-Edit (diff) 60.3 71.6 65.4 63.9 84.2 72.9 79.7
Aider-Polyglot (diff) - 18.2 7.6 5.8 45.3 16.0 49.6
AIME 2024 4.6 16.7 23.3 23.3 16.0 9.3 39.2
MATH-500 56.3 74.7 80.0 73.8 78.3 74.6 90.2
CNMO 2024 2.8 10.8 15.9 6.8 13.1 10.8 43.2
CLUEWSC 89.9 90.4 91.4 84.7 85.4 87.9 90.9
C-Eval 78.6 79.5 86.1 61.5 76.7 76.0 86.5
C-SimpleQA 48.5 54.1 48.4 50.4 51.3 59.3 64.8
"""
SHOTS_OF_TABLE_3 = "0 3 5 5 5 3 25 25 10 0 5 5 5 5 5 0 0 3 3 2 2 8 4 8 3 5 5 5 1 0 0 5"
BY_LIKELIHOOD = (
    "MMLU MMLU-Redux MMLU-Pro ARC-Easy ARC-Challenge HellaSwag PIQA WinoGrande RACE-Middle RACE-High "
    "C-Eval CMMLU C3 CCPM MMMLU-non-English"
)


def numbers_of(table, *, columns):
    rows = [line.rsplit(maxsplit=columns) for line in table.strip().splitlines()]
    return {row[0]: tuple(None if cell == "-" else float(cell) for cell in row[1:]) for row in rows}


@pytest.mark.parametrize(("rows", "table", "columns"), [(BASE, TABLE_3, 4), (CHAT, TABLE_6, 7)], ids=["3", "6"])
def test_every_row_has_the_published_numbers_in_the_published_order(rows, table, columns):
    assert [(row.benchmark, row.published) for row in rows] == list(numbers_of(table, columns=columns).items())


def test_shots_and_protocols_are_those_of_table_3():
    assert [row.shots for row in BASE] == list(map(int, SHOTS_OF_TABLE_3.split()))
    assert [row.benchmark for row in BASE if row.protocol == "choices"] == BY_LIKELIHOOD.split()
    assert [row.benchmark for row in BASE if row.metric == "BPB"] == ["Pile-test"]
    assert [row.benchmark for row in BASE if row.metric == "F1"] == ["DROP"]


@pytest.mark.parametrize("row", [*BASE, *CHAT], ids=lambda row: row.benchmark)
def test_every_row_has_a_task_or_says_what_it_needs(row):
    assert bool(row.task) != bool(row.needs)
    if row.needs:
        assert re.match(r"(data: |a judge model|docker: |a task: )", row.needs)


def test_our_tasks_are_named_once_in_a_suite_and_quick_is_a_part_of_base():
    for suite in SUITES.values():
        assert len(suite.tasks()) == len([row for row in suite.rows if row.task])
    assert set(SUITES["quick"].tasks()) < set(SUITES["base"].tasks())
    assert len(SUITES["quick"].tasks()) == 9


def test_the_tasks_that_rows_name_exist_with_their_shots():
    for row in (*BASE, *CHAT):
        if row.task:
            assert row.task in TASKS
            assert row.shots in (None, TASKS[row.task].shots), row.benchmark
            assert row.protocol == TASKS[row.task].protocol
            assert row.metric == TASKS[row.task].metric


@pytest.mark.slow  # half a minute, in which it reads its fifteen thousand tasks
def test_lm_eval_knows_the_names():
    manager = pytest.importorskip("lm_eval.tasks").TaskManager()
    assert {row.lm_eval for row in (*BASE, *CHAT) if row.lm_eval} <= set(manager.all_tasks)


def task_named(name):
    return EvalTask(name=name, protocol="generate", metric="EM", shots=0, questions=lambda folder: iter(()))


def test_a_name_that_is_no_task_is_told_with_what_its_row_needs():
    known = {name: task_named(name) for name in SUITES["base"].tasks()}
    suite = suite_named("base")
    assert [task.name for task in chosen_tasks(suite, names=("gsm8k", "bbh", "gsm8k"), known=known)] == ["gsm8k", "bbh"]
    assert [task.name for task in chosen_tasks(suite, names=(), known=known)] == list(suite.tasks())
    with pytest.raises(ConfigError, match="DROP needs data: DROP; the tasks are bbh, mmlu"):
        chosen_tasks(suite, names=("drop",), known=known)
    with pytest.raises(ConfigError, match="'gsm9k' is no task"):
        chosen_tasks(suite, names=("gsm9k",), known=known)
    with pytest.raises(ConfigError, match="no suite 'bass'; choose one of base, chat, quick"):
        suite_named("bass")
