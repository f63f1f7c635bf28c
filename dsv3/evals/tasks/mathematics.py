"""Problems with a number or a formula as their answer: GSM8K, MATH, CMATH, MGSM."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from dsv3.evals.final_answer import NUMBER, as_number, final_answer
from dsv3.evals.question import EvalTask, Question
from dsv3.evals.tasks.answers import cut_at, number_said, same_number
from dsv3.evals.tasks.items import Item, first_items, read_items
from dsv3.evals.tasks.math_answer import answer_said, equivalent, normal_form

CALCULATOR = re.compile(r"<<[^>]*>>")
STEP_BY_STEP = "A: Let's think step by step."


# GSM8K


def gsm8k(folder: Path) -> Iterator[Question]:
    """Read GSM8K's test problems, each after the first eight of its training split."""
    before = gsm8k_shots(folder, question="Q:", answer=STEP_BY_STEP)
    for item in read_items(folder / "gsm8k" / "test.jsonl.gz"):
        _, number = worked_steps(item)
        prompt = f"{before}Q: {item.text('question')}\n{STEP_BY_STEP}"
        yield Question(id=item.id, prompt=prompt, answer=number, stop=("\nQ:",))


def gsm8k_shots(folder: Path, *, question: str, answer: str) -> str:
    """Return eight problems with their steps and "The answer is N."."""
    shots = ""
    for shot in first_items(folder / "gsm8k" / "train.jsonl.gz", count=8):
        steps, number = worked_steps(shot)
        shots += f"{question} {shot.text('question')}\n{answer}\n{steps}\nThe answer is {number}.\n\n"
    return shots


def worked_steps(item: Item) -> tuple[str, str]:
    """Return the steps without the marks of the calculator, and the number after '####'."""
    steps, mark, number = item.text("answer").partition("####")
    if not mark or as_number(number) is None:
        raise item.broken("the answer should end in '#### ' and a number")
    return CALCULATOR.sub("", steps).strip(), number.strip()


def grade_gsm8k(question: Question, answer: str) -> Mapping[str, float]:
    """1 if the number after '####' or "The answer is", else the last one, is right."""
    said = cut_at(answer, question.stop)
    found = final_answer(said) if "####" in said else number_said(said, after=["answer is"], first=True)
    return {"EM": same_number(found, question.answer)}


# MATH


def math(folder: Path) -> Iterator[Question]:
    """Read MATH's 5,000 test problems but for four, which are the worked examples of the others."""
    shots = first_items(folder / "math" / "train4500.jsonl.gz", count=4)
    before = ""
    for shot in shots:
        closing = f"Final Answer: The final answer is ${boxed(shot)}$. I hope it is correct."
        before += f"{problem_form(shot)}\n{shot.text('solution')}\n{closing}\n\n"
    for item in read_items(folder / "math" / "train4500.jsonl.gz"):
        if item.line > len(shots):
            yield math_question(item, before=before, name=f"train4500/{item.id}", subject=item.text("type"))
    for item in read_items(folder / "math" / "math500.jsonl.gz", id_key="unique_id"):
        yield math_question(item, before=before, name=item.id, subject=item.text("subject"))


def math_question(item: Item, *, before: str, name: str, subject: str) -> Question:
    """Return a problem in Minerva's form."""
    prompt = before + problem_form(item)
    more = {"subject": subject}
    return Question(id=name, prompt=prompt, answer=boxed(item), stop=("\nProblem:",), max_tokens=1024, more=more)


def problem_form(item: Item) -> str:
    """Return a problem up to its solution."""
    return f"Problem:\n{item.text('problem')}\n\nSolution:"


def boxed(item: Item) -> str:
    """Return the answer that a reference solution boxes."""
    solution = re.sub(
        r"\\boxed (\S+?)(?=[\s$.]|\Z)", r"\\boxed{\1}", item.text("solution").replace("\\fbox", "\\boxed")
    )
    found = final_answer(solution) if "\\boxed{" in solution else None
    if not found:
        raise item.broken("the solution boxes no answer")
    return found


def math500(folder: Path) -> Iterator[Question]:
    """Read MATH-500 for a chat model."""
    for item in read_items(folder / "math" / "math500.jsonl.gz", id_key="unique_id"):
        prompt = f"{item.text('problem')}\nPlease reason step by step, and put your final answer within \\boxed{{}}."
        more = {"subject": item.text("subject")}
        yield Question(id=item.id, prompt=prompt, answer=item.text("answer"), max_tokens=8192, more=more)


def grade_math(question: Question, answer: str) -> Mapping[str, float]:
    """1 if the answer is the same mathematics; and by Minerva's comparison of texts alone."""
    found = answer_said(cut_at(answer, question.stop))
    if found is None:
        return {"EM": 0.0, "EM as text": 0.0}
    as_text = normal_form(found) == normal_form(question.answer)
    return {"EM": float(as_text or equivalent(found, question.answer)), "EM as text": float(as_text)}


# CMATH

CMATH_STEPS = {1: "99-90=9", 101: "18+29=47", 201: "84÷6=14"}
"""Lines of dev600 that are worked examples, and our working: the file has numbers only."""


def cmath(folder: Path) -> Iterator[Question]:
    """Read CMATH's test problems, each after three of dev600."""
    before = ""
    for item in first_items(folder / "cmath" / "dev600.jsonl.gz", count=max(CMATH_STEPS)):
        if (steps := CMATH_STEPS.get(item.line)) is not None:
            if not steps.endswith(f"={item.text('answer')}"):
                raise item.broken(f"as a worked example its answer should be that of {steps}")
            before += f"问题：{item.text('question')}\n答案：{steps}。所以答案是：{item.text('answer')}。\n\n\n"
    for item in read_items(folder / "cmath" / "test.jsonl.gz"):
        if as_number(item.text("golden")) is None:
            raise item.broken(f"'golden' should be a number; it is '{item.text('golden')}'")
        prompt = f"{before}问题：{item.text('question')}\n答案："
        more = {"grade": str(item.values.get("grade"))}
        yield Question(id=item.id, prompt=prompt, answer=item.text("golden"), stop=("\n问题：",), more=more)


def grade_cmath(question: Question, answer: str) -> Mapping[str, float]:
    """1 if the last number of the line after "答案是", else of the whole answer, is right."""
    said = cut_at(answer, question.stop)
    _, found, rest = said.partition("答案是")
    line = rest.strip().split("\n")[0]
    numbers = NUMBER.findall(line if found and NUMBER.search(line) else said)
    return {"EM": same_number(numbers[-1] if numbers else None, question.answer)}


# MGSM

MGSM_ANSWER = {
    "bn": "উত্তর",
    "de": "Antwort",
    "en": "answer is",
    "es": "respuesta",
    "fr": "réponse",
    "ja": "答え",
    "ru": "ответ",
    "sw": "jibu",
    "te": "సమాధానం",
    "th": "คำตอบ",
    "zh": "答案",
}
"""The word that announces an answer, by language."""


def mgsm(folder: Path) -> Iterator[Question]:
    """Read MGSM's problems in eleven languages, each after eight problems of GSM8K worked in English."""
    form = "Step-by-Step Answer:"
    before = gsm8k_shots(folder, question="Question:", answer=form)
    for item in read_items(folder / "mgsm" / "mgsm.jsonl.gz"):
        language = item.text("lang")
        if language not in MGSM_ANSWER:
            raise item.broken(f"the languages are {', '.join(MGSM_ANSWER)}; it is in '{language}'")
        if as_number(item.text("answer")) is None:
            raise item.broken(f"the answer should be a number; it is '{item.text('answer')}'")
        prompt = f"{before}Question: {item.text('question')}\n{form}"
        more = {"language": language}
        name = f"{language}/{item.id}"
        yield Question(id=name, prompt=prompt, answer=item.text("answer"), stop=("\nQuestion:",), more=more)


def grade_mgsm(question: Question, answer: str) -> Mapping[str, float]:
    """1 if the last number after the word for "answer", in English or the question's language, is right."""
    words = [MGSM_ANSWER["en"], MGSM_ANSWER[question.more["language"]]]
    return {"EM": same_number(number_said(cut_at(answer, question.stop), after=words, first=False), question.answer)}


MATHEMATICS = (
    EvalTask(
        name="gsm8k",
        protocol="generate",
        metric="EM",
        shots=8,
        questions=gsm8k,
        grade=grade_gsm8k,
        note="Which eight problems the report shows is not published; here the first of the training split",
    ),
    EvalTask(
        name="math",
        protocol="generate",
        metric="EM",
        shots=4,
        questions=math,
        grade=grade_math,
        group_by="subject",
        note="Minerva's form; its own four problems are of MATH's training split, which is not in the data, so the "
        "first four of train4500 are worked examples and not asked",
    ),
    EvalTask(
        name="math500",
        protocol="generate",
        metric="EM",
        shots=0,
        questions=math500,
        grade=grade_math,
        chat=True,
        group_by="subject",
        note="The report gives no prompt; this is the one that DeepSeek asks users of its models for",
    ),
    EvalTask(
        name="cmath",
        protocol="generate",
        metric="EM",
        shots=3,
        questions=cmath,
        grade=grade_cmath,
        group_by="grade",
        note="The form of DeepSeekMath; the report's three problems are not published, ours are of dev600",
    ),
    EvalTask(
        name="mgsm",
        protocol="generate",
        metric="EM",
        shots=8,
        questions=mgsm,
        grade=grade_mgsm,
        group_by="language",
        note="The translated worked examples are not in the data; English ones of GSM8K stand before every language",
    ),
)
