"""Questions whose options are texts: the likeliest continuation is the answer."""

from collections.abc import Iterator
from pathlib import Path

from dsv3.evals.question import EvalTask, Question
from dsv3.evals.tasks.items import Item, first_items, read_items


def choice_question(item: Item, *, prompt: str, options: str, right: str) -> Question:
    """Return a question whose options follow the prompt after a space."""
    choices = item.texts(options, at_least=2)
    answer = item.place(right, among=len(choices))
    return Question(id=item.id, prompt=prompt, choices=tuple(f" {choice}" for choice in choices), answer=answer)


def hellaswag(folder: Path) -> Iterator[Question]:
    """Read HellaSwag's validation: what happens next. Its first ten are the worked examples of the others."""
    path = folder / "hellaswag" / "val.jsonl.gz"
    shots = first_items(path, count=10, id_key="id")
    before = ""
    for shot in shots:
        endings = shot.texts("endings", at_least=2)
        before += f"{shot.text('ctx')} {endings[shot.place('label', among=len(endings))]}\n\n"
    for item in read_items(path, id_key="id"):
        if item.line > len(shots):
            yield choice_question(item, prompt=before + item.text("ctx"), options="endings", right="label")


def piqa(folder: Path) -> Iterator[Question]:
    """Read PIQA's validation: which of two ways works."""
    for item in read_items(folder / "commonsense-mc" / "piqa-val.jsonl.gz", id_key="id"):
        prompt = f"Question: {item.text('question')}\nAnswer:"
        yield choice_question(item, prompt=prompt, options="choices", right="answer")


def openbookqa(folder: Path) -> Iterator[Question]:
    """Read OpenBookQA's test questions: the end of a sentence about nature."""
    for item in read_items(folder / "commonsense-mc" / "openbookqa-test.jsonl.gz", id_key="id"):
        yield choice_question(item, prompt=item.text("question"), options="choices", right="answer")


def social_iqa(folder: Path) -> Iterator[Question]:
    """Read Social IQa's validation: what people feel, want and do."""
    for item in read_items(folder / "commonsense-mc" / "social-i-qa-val.jsonl.gz", id_key="id"):
        prompt = f"Q: {item.text('question')}\nA:"
        yield choice_question(item, prompt=prompt, options="choices", right="answer")


def winogrande(folder: Path) -> Iterator[Question]:
    """Read WinoGrande's validation: who is meant by the blank.

    Scored is the rest of the sentence, the same after either name. The first five are worked examples of the others.
    """
    path = folder / "commonsense-mc" / "winogrande-val.jsonl.gz"
    before = "".join(filled(shot) + "\n\n" for shot in first_items(path, count=5, id_key="id"))
    for item in read_items(path, id_key="id"):
        if item.line <= 5:
            continue
        start, rest = halves(item)
        names = item.texts("choices", at_least=2)
        yield Question(
            id=item.id,
            prompt=before,
            contexts=tuple(before + start + name for name in names),
            choices=(rest,) * len(names),
            answer=item.place("answer", among=len(names)),
        )


def halves(item: Item) -> tuple[str, str]:
    """Return what stands before and after the blank."""
    parts = item.text("question").split("_")
    if len(parts) != 2 or not parts[1]:
        raise item.broken(f"there should be one blank, and words after it; it is '{item.text('question')}'")
    return parts[0], parts[1]


def filled(item: Item) -> str:
    """Return the sentence with the right name in its blank."""
    start, rest = halves(item)
    names = item.texts("choices", at_least=2)
    return start + names[item.place("answer", among=len(names))] + rest


NOT_REPORTED = "Not in the report's tables"
CONTINUATIONS = (
    EvalTask(
        name="hellaswag",
        protocol="choices",
        metric="EM",
        shots=10,
        questions=hellaswag,
        normalise="bytes",
        note="The training split is not in the data: the first ten of validation are worked examples and not asked",
    ),
    EvalTask(name="piqa", protocol="choices", metric="EM", shots=0, questions=piqa, normalise="bytes"),
    EvalTask(
        name="winogrande",
        protocol="choices",
        metric="EM",
        shots=5,
        questions=winogrande,
        note="The training split is not in the data: the first five of validation are worked examples and not asked",
    ),
    EvalTask(
        name="openbookqa",
        protocol="choices",
        metric="EM",
        shots=0,
        questions=openbookqa,
        note=f"{NOT_REPORTED}; DeepSeek LLM's division by an option's unconditional likelihood is not done",
    ),
    EvalTask(
        name="social_iqa",
        protocol="choices",
        metric="EM",
        shots=0,
        questions=social_iqa,
        normalise="bytes",
        note=NOT_REPORTED,
    ),
)
