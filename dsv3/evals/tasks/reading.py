"""Questions answered in a few words: from memory (NQ-open) or from a passage (CMRC)."""

import re
import string
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from dsv3.evals.question import EvalTask, Question
from dsv3.evals.tasks.items import Item, first_items, read_items, shown

CHINESE_MARKS = "-:_*^/\\~`+=，。：？！“”；’《》·、「」（）－～『』"
"""What CMRC's own evaluation drops before it compares."""
CHINESE = re.compile(r"[\u4e00-\u9fa5]")
LATIN = re.compile(r"\w+|[^\w\s]")


def nq_open(folder: Path) -> Iterator[Question]:
    """Read NQ-open's dev questions. The first five are the worked examples of the others."""
    path = folder / "nq-open" / "dev.jsonl.gz"
    before = ""
    for shot in first_items(path, count=5):
        before += f"Q: {shot.text('question')}?\nA: {shot.texts('answer')[0]}\n\n"
    for item in read_items(path):
        if item.line > 5:
            prompt = f"{before}Q: {item.text('question')}?\nA:"
            yield Question(id=item.id, prompt=prompt, answer=item.texts("answer"), stop=("\n",), max_tokens=64)


def plain(text: str) -> str:
    """Return a text in small letters, without punctuation, articles and doubled spaces, as SQuAD's evaluation does."""
    small = "".join(mark for mark in text.lower() if mark not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", small).split())


def grade_alias(question: Question, answer: str) -> Mapping[str, float]:
    """1 if the first line of the answer is any of the right ones."""
    said = plain(answer.strip().split("\n")[0])
    return {"EM": float(any(said == plain(alias) for alias in question.answer))}


def cmrc(folder: Path) -> Iterator[Question]:
    """Read CMRC 2018's dev questions, one passage each. The first passage is the worked example of the others."""
    path = folder / "cmrc2018" / "dev.jsonl.gz"
    (shot,) = first_items(path, count=1, id_key="id")
    asked = questions_of(shot)[0]
    before = f"{passage_form(shot, question=asked['question'])}{asked['answers'][0]}\n\n"
    for item in read_items(path, id_key="id"):
        for place, one in enumerate(questions_of(item) if item.line > 1 else ()):
            yield Question(
                id=f"{item.id}/{place}",
                prompt=before + passage_form(item, question=one["question"]),
                answer=tuple(one["answers"]),
                stop=("\n",),
                max_tokens=128,
            )


def passage_form(item: Item, *, question: str) -> str:
    """Return a passage and one question about it."""
    return f"文章：{item.text('context')}\n问题：{question}\n答案："


def questions_of(item: Item) -> list[Any]:
    """Return the questions of a passage, looked through."""
    found = item.values.get("qas")
    if not isinstance(found, list) or not found:
        raise item.broken(f"'qas' should be a list of questions; it is {shown(found)}")
    for one in found:
        texts = (
            [one.get("id"), one.get("question"), *(one.get("answers") or [None])] if isinstance(one, dict) else [one]
        )
        if not all(isinstance(text, str) and text for text in texts):
            raise item.broken(f"a question should have an id, a text and answers; it is {shown(one)}")
    return found


def without_marks(text: str) -> str:
    """Return a text in small letters and without punctuation."""
    return "".join(mark for mark in text.lower().strip() if mark not in CHINESE_MARKS)


def pieces(text: str) -> list[str]:
    """Return a text as its Chinese characters, and the words between them."""
    spaced = CHINESE.sub(lambda match: f"\n{match[0]}\n", without_marks(text))
    return list(chain.from_iterable(LATIN.findall(part) for part in spaced.split("\n")))


def common_run(a: list[str], b: list[str]) -> int:
    """Return the length of the longest run of pieces that both have."""
    longest, above = 0, [0] * (len(b) + 1)
    for piece in a:
        row = [0] + [above[place] + 1 if piece == other else 0 for place, other in enumerate(b)]
        longest, above = max(longest, *row), row
    return longest


def overlap(said: str, wanted: str) -> float:
    """Return F1 over the longest common run, as CMRC's evaluation has it."""
    a, b = pieces(said), pieces(wanted)
    return 2 * common_run(a, b) / (len(a) + len(b)) if a and b else 0.0


def grade_passage(question: Question, answer: str) -> Mapping[str, float]:
    """EM without punctuation, and F1; the best over the right answers."""
    said = answer.strip().split("\n")[0]
    return {
        "EM": float(any(without_marks(said) == without_marks(wanted) for wanted in question.answer)),
        "F1": max(overlap(said, wanted) for wanted in question.answer),
    }


READING = (
    EvalTask(
        name="nq_open",
        protocol="generate",
        metric="EM",
        shots=5,
        questions=nq_open,
        grade=grade_alias,
        note="The training split is not in the data: the first five of dev are worked examples and not asked",
    ),
    EvalTask(
        name="cmrc",
        protocol="generate",
        metric="EM",
        shots=1,
        questions=cmrc,
        grade=grade_passage,
        note="The form of the prompt is not published; the first passage of dev is the worked example and not asked. "
        "F1 splits Latin text into words and marks, where the published one has NLTK's tokenizer",
    ),
)
