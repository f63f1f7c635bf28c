from collections.abc import Iterator
from pathlib import Path

from dsv3.evals.asked import asked_items, asked_texts
from dsv3.evals.question import EvalTask, Question
from dsv3.evals.tasks import TASKS

PROMPTS = [
    ("one", "Answer these.\n\nQ: a shown example\nA: yes\n\nQ: Where is the sea?\nWhy?\nA:"),
    ("two", "Answer these.\n\nQ: a shown example\nA: yes\n\nQ: Where is the moon?\nA:"),
    ("three", "Answer these.\n\nQ: another example\nA: no\n\nQ: Who sleeps?\nA:"),
    ("four", "Answer these.\n\nQ: another example\nA: no\n\nQ: Who sings?\nA:"),
]


def task(prompts: list[tuple[str, str]]) -> EvalTask:
    def questions(folder: Path) -> Iterator[Question]:
        return (Question(id=name, prompt=prompt) for name, prompt in prompts)

    return EvalTask(name="t", protocol="generate", metric="EM", shots=1, questions=questions)


def test_examples_and_labels_are_taken_off_and_the_question_is_left():
    texts = list(asked_texts(task(PROMPTS), data=Path()))
    assert texts == ["Where is the sea?\nWhy?", "Where is the moon?", "Who sleeps?", "Who sings?"]


def test_a_single_question_is_taken_whole():
    assert list(asked_texts(task(PROMPTS[:1]), data=Path())) == [PROMPTS[0][1]]


def test_benchmarks_whose_files_are_missing_are_named(tmp_path):
    absent: list[str] = []
    assert list(asked_items(tmp_path, absent=absent)) == []
    assert {"mmlu", "gsm8k", "humaneval"} <= set(absent)


def test_the_questions_of_real_benchmarks_come_without_their_examples(shared_data):
    gsm8k = list(asked_texts(TASKS["gsm8k"], data=shared_data))
    assert len(gsm8k) == 1319
    assert max(map(len, gsm8k)) < 1200  # The eight examples before each have 4,500 characters.
    assert gsm8k[0].startswith("Janet")
