"""Questions with lettered options: the options stand in the prompt, and the letters are scored.

QUESTION
A. ...
B. ...
Answer: B
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from dsv3.evals.question import EvalTask, Question
from dsv3.evals.tasks.answers import LETTERS, cut_at
from dsv3.evals.tasks.items import Item, first_items, read_items

ANSWER_IS = (
    re.compile(r"answer is \(?([A-J])\)?"),
    re.compile(r".*[aA]nswer:\s*([A-J])"),
    re.compile(r"([A-J])(?=[^A-J]*$)"),
)
"""How MMLU-Pro's own evaluation finds a letter, in this order: as asked, after "Answer:", the last in the text."""


LETTER_AT_END = re.compile(r"(?i)answer[ \t]*:[ \t]*\$?([A-D])\b")
"""How simple-evals finds it in what answers `mmlu_chat`: the first, whatever the case."""


def header(subject: str) -> str:
    """Return the first line of a prompt, which names the subject."""
    return f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}.\n\n"


def lettered(question: str, options: Sequence[str], *, right: int | None = None) -> str:
    """Return a question with its options, and the letter of the right one if it is given."""
    lines = [question.strip(), *(f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False))]
    return "\n".join([*lines, "Answer:" if right is None else f"Answer: {LETTERS[right]}\n\n"])


def letter_question(item: Item, *, before: str, options: str, right: str, name: str, **more: str) -> Question:
    """Return a question whose answer is a letter; `options` and `right` say where the item has them."""
    choices = item.texts(options)
    return Question(
        id=name,
        prompt=before + lettered(item.text("question"), choices),
        choices=tuple(f" {letter}" for letter in LETTERS[: len(choices)]),
        answer=item.place(right, among=len(choices)),
        more=more,
    )


def worked(item: Item, *, options: str, right: str) -> str:
    """Return an item as a worked example."""
    choices = item.texts(options)
    return lettered(item.text("question"), choices, right=item.place(right, among=len(choices)))


def mmlu(folder: Path) -> Iterator[Question]:
    """Read MMLU's test questions, each after the five of its subject's dev split."""
    shots: dict[str, list[str]] = defaultdict(list)
    for item in read_items(folder / "mmlu" / "dev.jsonl.gz"):
        shots[item.text("subject")].append(worked(item, options="choices", right="answer"))
    for item in read_items(folder / "mmlu" / "test.jsonl.gz"):
        subject = item.text("subject")
        if (count := len(shots[subject])) != 5:
            dev = folder / "mmlu" / "dev.jsonl.gz"
            raise item.broken(f"there are {count} worked examples of '{subject}' in {dev}, and 5 are wanted")
        before = header(subject) + "".join(shots[subject])
        yield letter_question(item, before=before, options="choices", right="answer", name=item.id, subject=subject)


def mmlu_pro(folder: Path) -> Iterator[Question]:
    """Read MMLU-Pro's questions; the first five of each category are the worked examples of the others."""
    shots: dict[str, list[str]] = defaultdict(list)
    for item in read_items(folder / "mmlu-pro" / "test.jsonl.gz", id_key="question_id"):
        subject = item.text("category")
        if len(shots[subject]) < 5:
            shots[subject].append(worked(item, options="options", right="answer_index"))
            continue
        before = header(subject) + "".join(shots[subject])
        yield letter_question(
            item, before=before, options="options", right="answer_index", name=item.id, subject=subject
        )


def mmlu_pro_chat(folder: Path) -> Iterator[Question]:
    """Read MMLU-Pro's questions for a model that thinks before it answers."""
    for item in read_items(folder / "mmlu-pro" / "test.jsonl.gz", id_key="question_id"):
        subject = item.text("category")
        options = item.texts("options")
        asked = (
            f'{header(subject).strip()} Think step by step and then finish your answer with "the answer is (X)" '
            "where X is the correct letter choice.\n\n"
        )
        listed = "".join(f"{letter}. {option}\n" for letter, option in zip(LETTERS, options, strict=False))
        yield Question(
            id=item.id,
            prompt=f"{asked}Question:\n{item.text('question')}\nOptions:\n{listed}Answer: Let's think step by step.",
            answer=LETTERS[item.place("answer_index", among=len(options))],
            stop=("Question:",),
            max_tokens=8192,
            more={"subject": subject},
        )


def mmlu_chat(folder: Path) -> Iterator[Question]:
    """Read MMLU's test questions for a model that thinks before it answers, in the form of simple-evals."""
    for item in read_items(folder / "mmlu" / "test.jsonl.gz"):
        options = item.texts("choices")
        listed = "\n".join(f"{letter}) {option}" for letter, option in zip(LETTERS, options, strict=False))
        yield Question(
            id=item.id,
            prompt="Answer the following multiple choice question. The last line of your response should be of the "
            "following format: 'Answer: $LETTER' (without quotes) where LETTER is one of ABCD. Think step by step "
            f"before answering.\n\n{item.text('question')}\n\n{listed}",
            answer=LETTERS[item.place("answer", among=len(options))],
            max_tokens=8192,
            more={"subject": item.text("subject")},
        )


def letter_said(text: str) -> str | None:
    """Return the letter that a text answers with. Unlike the published evaluation we never guess one."""
    for pattern in ANSWER_IS:
        if (match := pattern.search(text)) is not None:
            return match[1]
    return None


def grade_letter(question: Question, answer: str) -> Mapping[str, float]:
    """1 if the letter is right."""
    return {"EM": float(letter_said(cut_at(answer, question.stop)) == question.answer)}


def grade_letter_at_end(question: Question, answer: str) -> Mapping[str, float]:
    """1 if the letter after "Answer:" is right."""
    match = LETTER_AT_END.search(answer)
    return {"EM": float(match is not None and match[1].upper() == question.answer)}


def arc(folder: Path, *, name: str) -> Iterator[Question]:
    """Read ARC's test questions, each after the first 25 of its training split."""
    files = folder / "commonsense-mc"
    shots = first_items(files / f"{name}-train.jsonl.gz", count=25, id_key="id")
    before = "".join(worked(shot, options="choices", right="answer") for shot in shots)
    for item in read_items(files / f"{name}-test.jsonl.gz", id_key="id"):
        yield letter_question(item, before=before, options="choices", right="answer", name=item.id)


def arc_easy(folder: Path) -> Iterator[Question]:
    """Read ARC-Easy."""
    return arc(folder, name="arc-easy")


def arc_challenge(folder: Path) -> Iterator[Question]:
    """Read ARC-Challenge."""
    return arc(folder, name="arc-challenge")


ARC_NOTE = (
    "The form is not published. Options are shown and letters scored, as for MMLU, which we infer from the height of "
    "the report's scores; DeepSeek LLM scored the options' text, normalised unconditionally"
)
MULTIPLE_CHOICE = (
    EvalTask(name="mmlu", protocol="choices", metric="EM", shots=5, questions=mmlu, group_by="subject"),
    EvalTask(
        name="mmlu_chat",
        protocol="generate",
        metric="EM",
        shots=0,
        questions=mmlu_chat,
        grade=grade_letter_at_end,
        chat=True,
        group_by="subject",
    ),
    EvalTask(
        name="mmlu_pro",
        protocol="choices",
        metric="EM",
        shots=5,
        questions=mmlu_pro,
        group_by="subject",
        note="The 70 validation questions are not in the data: the first five of each category are its worked "
        "examples and are not asked",
    ),
    EvalTask(
        name="mmlu_pro_chat",
        protocol="generate",
        metric="EM",
        shots=0,
        questions=mmlu_pro_chat,
        grade=grade_letter,
        chat=True,
        group_by="subject",
        note="Without the five worked answers of the validation split, which is not in the data; where no letter is "
        "found the published evaluation draws one, and here the answer is wrong",
    ),
    EvalTask(name="arc_easy", protocol="choices", metric="EM", shots=25, questions=arc_easy, note=ARC_NOTE),
    EvalTask(name="arc_challenge", protocol="choices", metric="EM", shots=25, questions=arc_challenge, note=ARC_NOTE),
)
