"""All tasks: the data are read whole, what is broken is named, and the table of the documentation is the truth."""

import gzip
import json
import re
from itertools import islice
from pathlib import Path

import pytest

from dsv3.errors import DataError
from dsv3.evals.tasks import TASKS

DOCS = Path(__file__).parents[3] / "docs" / "evaluation.md"
COUNTS = {
    "bbh": 6511,
    "mmlu": 14042,
    "mmlu_chat": 14042,
    "mmlu_pro": 12032 - 14 * 5,
    "mmlu_pro_chat": 12032,
    "arc_easy": 2376,
    "arc_challenge": 1172,
    "hellaswag": 10042 - 10,
    "piqa": 1838,
    "winogrande": 1267 - 5,
    "openbookqa": 500,
    "social_iqa": 1954,
    "nq_open": 3610 - 5,
    "cmrc": 3219 - 3,
    "agieval": 3967,
    "humaneval": 164,
    "humaneval_infilling": 1033 + 5815 + 1640,
    "mbpp": 500,
    "cruxeval_i": 800,
    "cruxeval_o": 800,
    "gsm8k": 1319,
    "math": 5000 - 4,
    "math500": 500,
    "cmath": 1098,
    "mgsm": 2750,
    "ifeval": 541,
}
"""What the sources say they hold, less the worked examples taken from them."""
LONG = {name for name, count in COUNTS.items() if count > 2500}


@pytest.mark.parametrize("name", TASKS)
def test_every_question_can_be_asked(shared_data, name):
    task = TASKS[name]
    for question in islice(task.questions(shared_data), 100):
        assert question.prompt.strip()
        if task.protocol == "choices":
            assert 0 <= question.answer < len(question.choices)
            assert len(question.contexts) in (0, len(question.choices))
            assert not any(prompt.endswith(" ") for prompt in (question.prompt, *question.contexts))
            assert all(choice.startswith(" ") for choice in question.choices) or name == "winogrande"
        if task.group_by:
            assert isinstance(question.more[task.group_by], str)


@pytest.mark.parametrize("name", [pytest.param(one, marks=pytest.mark.slow if one in LONG else ()) for one in TASKS])
def test_every_question_is_there_once(shared_data, name):
    ids = [question.id for question in TASKS[name].questions(shared_data)]
    assert len(set(ids)) == len(ids) == COUNTS[name]


def test_a_task_says_all_that_the_runner_needs():
    for name, task in TASKS.items():
        assert task.name == name
        assert (task.grade is not None) == (task.protocol == "generate")
        assert task.protocol in ("choices", "generate")
        assert task.normalise in ("none", "bytes", "tokens")


def test_the_first_score_is_the_task_s_own(shared_data):
    for task in TASKS.values():
        if task.grade is not None and task.metric != "pass@1" and not task.name.startswith("cruxeval"):
            question = next(task.questions(shared_data))
            scores = task.grade(question, "")
            assert next(iter(scores)) == task.metric
            assert scores[task.metric] == 0.0


def test_nothing_is_read_before_questions_are_asked_for(tmp_path):
    for task in TASKS.values():
        questions = task.questions(tmp_path)
        with pytest.raises(DataError, match=r"no .*gz; --data takes the folder|should be a gzipped JSON table"):
            next(questions)


def test_the_table_of_the_documentation_is_the_tasks():
    """Columns: task, shots, metric, protocol, data folder, note."""
    text = DOCS.read_text(encoding="utf-8")
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in text.splitlines() if line.startswith("| `")]
    table = {cells[0].strip(" `"): [cell.strip() for cell in cells[1:]] for cells in rows if len(cells) == 6}
    assert list(table) == list(TASKS)
    for name, (shots, metric, protocol, _, note) in table.items():
        task = TASKS[name]
        said = task.protocol + (f", by {task.normalise}" if task.normalise != "none" else ", chat" if task.chat else "")
        assert (shots, metric, protocol, note) == (str(task.shots), task.metric, said, task.note)


def test_the_table_names_the_folder_that_is_read(shared_data, tmp_path):
    text = DOCS.read_text(encoding="utf-8")
    for name, task in TASKS.items():
        (row,) = [line for line in text.splitlines() if line.startswith(f"| `{name}` ")]
        folders = row.split("|")[5].strip().split(", ")
        chosen = tmp_path / name
        chosen.mkdir()
        for folder in folders:
            (chosen / folder).symlink_to(shared_data / folder)
        assert next(task.questions(chosen)) == next(task.questions(shared_data))


# Broken data


@pytest.fixture
def broken(shared_data, tmp_path):
    """Return a function that asks a task for its questions with one line of one file changed."""

    def change(name, file, *, line, **values):
        path = shared_data / file
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            records = [json.loads(one) for one, _ in zip(lines, range(400), strict=False)]
        records[line - 1].update(values)
        folder = tmp_path / path.parent.name
        folder.mkdir()
        for other in path.parent.iterdir():
            if other.name != path.name:
                (folder / other.name).symlink_to(other)
        with gzip.open(folder / path.name, "wt", encoding="utf-8") as file:
            file.writelines(json.dumps(record) + "\n" for record in records)
        for other in shared_data.iterdir():
            if other.is_dir() and other.name != path.parent.name:
                (tmp_path / other.name).symlink_to(other)
        return list(islice(TASKS[name].questions(tmp_path), 100))

    return change


@pytest.mark.parametrize(
    ("name", "file", "values", "told"),
    [
        (
            "mmlu",
            "mmlu/test.jsonl.gz",
            {"answer": 4},
            "item '7': 'answer' should be 0 to 3, for there are 4 choices; it is 4",
        ),
        ("mmlu", "mmlu/test.jsonl.gz", {"subject": "alchemy"}, "item '7': there are 0 worked examples of 'alchemy'"),
        ("mmlu", "mmlu/test.jsonl.gz", {"choices": "ABCD"}, "'choices' should be 1 or more texts; it is 'ABCD'"),
        ("mmlu_pro", "mmlu-pro/test.jsonl.gz", {"answer_index": None}, "'answer_index' should be 0 to 9"),
        ("hellaswag", "hellaswag/val.jsonl.gz", {"label": True}, "item 'hellaswag-val-6': 'label' should be 0 to 3"),
        ("winogrande", "commonsense-mc/winogrande-val.jsonl.gz", {"question": "No blank"}, "there should be one blank"),
        ("bbh", "bbh/bbh.jsonl.gz", {"task": "juggling"}, "there is no prompt for 'juggling'"),
        ("bbh", "bbh/bbh.jsonl.gz", {"target": ""}, "'target' should be a text; it is ''"),
        ("gsm8k", "gsm8k/test.jsonl.gz", {"answer": "It is 3."}, "the answer should end in '#### ' and a number"),
        ("math", "math/train4500.jsonl.gz", {"solution": "So 3."}, "the solution boxes no answer"),
        ("cmath", "cmath/test.jsonl.gz", {"golden": "三"}, "'golden' should be a number"),
        ("mgsm", "mgsm/mgsm.jsonl.gz", {"lang": "tlh"}, "it is in 'tlh'"),
        ("nq_open", "nq-open/dev.jsonl.gz", {"answer": []}, "'answer' should be 1 or more texts; it is []"),
        ("cmrc", "cmrc2018/dev.jsonl.gz", {"qas": [{"id": "x"}]}, "item 'DEV_6': a question should have an id"),
        ("agieval", "agieval/aqua-rat.jsonl.gz", {"label": "F"}, "'label' should be of the letters ABCDE; it is 'F'"),
        ("humaneval", "humaneval/HumanEval.jsonl.gz", {"entry_point": 3}, "item 'HumanEval/6': 'entry_point' should"),
        (
            "humaneval",
            "humaneval/HumanEval.jsonl.gz",
            {"task_id": "HumanEval/0"},
            "'HumanEval/0' stands in line 1 already",
        ),
        (
            "humaneval_infilling",
            "humaneval/HumanEval-SingleLineInfilling.jsonl.gz",
            {"suffix": None},
            "'suffix' should",
        ),
        ("mbpp", "mbpp/mbpp.jsonl.gz", {"task_id": 2000}, "in the order of 'task_id'"),
        ("cruxeval_o", "cruxeval/cruxeval.jsonl.gz", {"code": None}, "'code' should be a text; it is None"),
        ("ifeval", "ifeval/input_data.jsonl.gz", {"instruction_id_list": ["a:b"]}, "there is no instruction 'a:b'"),
        ("ifeval", "ifeval/input_data.jsonl.gz", {"kwargs": []}, "'kwargs' should have a table for each of"),
    ],
)
def test_a_broken_item_is_named(broken, name, file, values, told):
    with pytest.raises(DataError, match=re.escape(told)) as error:
        broken(name, file, line=7, **values)
    assert f"{Path(file).name}, line 7" in str(error.value)


def test_a_worked_example_with_another_answer_is_refused(broken):
    with pytest.raises(
        DataError, match=r"line 101, item '101': as a worked example its answer should be that of 18\+29=47"
    ):
        broken("cmath", "cmath/dev600.jsonl.gz", line=101, answer="48")


def test_files_that_are_cut_empty_or_no_json_are_refused(tmp_path):
    folder = tmp_path / "commonsense-mc"
    folder.mkdir()
    path = folder / "piqa-val.jsonl.gz"

    def questions():
        return list(TASKS["piqa"].questions(tmp_path))

    good = gzip.compress(b'{"id": "a", "question": "q", "choices": ["x", "y"], "answer": 0}\n' * 2)
    for content, told in (
        (b"plain", "cannot be read to its end"),
        (good[:-20], "cannot be read to its end"),
        (gzip.compress(b""), "is empty"),
        (gzip.compress(b"\n"), "line 1: this is no JSON"),
        (gzip.compress(b"[1]\n"), "line 1: a table of names and values should be here; it is \\[1\\]"),
        (gzip.compress(b"{}\n"), "line 1: 'id' should name the item; it is None"),
        (gzip.compress(b'{"id": "a"}\n'), "item 'a': 'question' should be a text; it is None"),
        (good, "line 2: item 'a' stands in line 1 already"),
        (gzip.compress(b'{"id": "a", "question": "\xff"}\n'), "as gzipped UTF-8"),
    ):
        path.write_bytes(content)
        with pytest.raises(DataError, match=told):
            questions()
