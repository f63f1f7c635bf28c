"""AGIEval: exams in English and Chinese, without examples; one letter, several, or a formula is the answer."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from dsv3.evals.question import EvalTask, Question
from dsv3.evals.tasks.answers import LETTERS, cut_at
from dsv3.evals.tasks.items import Item, read_items, shown
from dsv3.evals.tasks.math_answer import equivalent

ENGLISH = (
    "aqua-rat",
    "gaokao-english",
    "lsat-ar",
    "lsat-lr",
    "lsat-rc",
    "sat-en",
    "sat-en-without-passage",
    "sat-math",
)
CHINESE = tuple(
    f"gaokao-{subject}"
    for subject in ("biology", "chemistry", "chinese", "geography", "history", "mathqa", "physics", "mathcloze")
)
CLOZE = "gaokao-mathcloze"
LETTER = re.compile("[A-F]")
IN_DOLLARS = re.compile(r"\$(.*)\$")
PLAIN_NUMBER = re.compile(r"-?\$?\d+(?:\.\d+)?(?!\w)")


def agieval(folder: Path) -> Iterator[Question]:
    """Read the exams that may be passed on, in the published zero-shot form."""
    for exam in (*ENGLISH, *CHINESE):
        for item in read_items(folder / "agieval" / f"{exam}.jsonl.gz"):
            cloze = exam == CLOZE
            yield Question(
                id=f"{exam}/{item.id}",
                prompt=cloze_form(item) if cloze else choice_form(item, english=exam in ENGLISH),
                answer=item.text("answer") if cloze else right_letters(item),
                stop=("\nQ:", "\n问题："),
                max_tokens=256 if cloze else 32,
                more={"exam": exam},
            )


def choice_form(item: Item, *, english: bool) -> str:
    """Return a question with its options, up to the letter."""
    options = item.texts("options", at_least=2)
    passage, listed, last = item.values.get("passage") or "", " ".join(options), LETTERS[len(options) - 1]
    if english:
        asked = f"Q: {item.text('question')} Answer Choices: {listed}"
        return f"{passage}{asked}\nA: Among A through {last}, the answer is"
    return f"{passage}问题：{item.text('question')} 选项：{listed}\n答案：从A到{last}, 我们应选择"


def cloze_form(item: Item) -> str:
    """Return a question whose answer is to be filled in."""
    return f"{item.values.get('passage') or ''}问题：{item.text('question')}\n答案："


def right_letters(item: Item) -> str:
    """Return the letters that are right, such as 'AC'; the files also have ['A', 'C'] and 'A C'."""
    label = item.values.get("label")
    letters = "".join(label) if isinstance(label, list) and all(isinstance(one, str) for one in label) else label
    known = LETTERS[: len(item.texts("options", at_least=2))]
    if not isinstance(letters, str) or not letters.strip() or not set(letters) <= {*known, " "}:
        raise item.broken(f"'label' should be of the letters {known}; it is {shown(label)}")
    return "".join(sorted(set(letters) - {" "}))


def grade(question: Question, answer: str) -> Mapping[str, float]:
    """1 if the first letter is right; all letters where several may be; or the formula."""
    if question.more["exam"] == CLOZE:
        found = formula_said(cut_at(answer, question.stop))
        return {"EM": float(found is not None and equivalent(found, question.answer.replace("$", "")))}
    letters = LETTER.findall(answer.strip().split("\n")[0])
    several = question.more["exam"] == "gaokao-physics" or len(question.answer) > 1
    return {"EM": float(set(letters if several else letters[:1]) == set(question.answer))}


def formula_said(text: str) -> str | None:
    """Return the formula in the last box, else in dollars, else after the last '=', else the last number."""
    if (start := text.rfind("\\boxed{")) >= 0:
        return last_side(closed(text[start + len("\\boxed{") :]))
    if dollars := IN_DOLLARS.findall(text):
        return last_side(dollars[-1])
    if "=" in text:
        return last_side(text).rstrip(".")
    numbers = PLAIN_NUMBER.findall(text)
    return numbers[-1] if numbers else None


def closed(text: str) -> str:
    """Return a text up to the brace that closes what was opened before it."""
    depth = 1
    for place, mark in enumerate(text):
        depth += {"{": 1, "}": -1}.get(mark, 0)
        if depth == 0:
            return text[:place]
    return text


def last_side(text: str) -> str:
    """Return what stands after the last '='."""
    return text.split("=")[-1].lstrip(" ")


EXAMS = (
    EvalTask(
        name="agieval",
        protocol="generate",
        metric="EM",
        shots=0,
        questions=agieval,
        grade=grade,
        group_by="exam",
        note="16 of the 21 files: LogiQA and JEC-QA may not be passed on, and MATH is a task of its own. Seven "
        "questions of gaokao-mathqa have several right letters, which the published evaluation never counts as right",
    ),
)
