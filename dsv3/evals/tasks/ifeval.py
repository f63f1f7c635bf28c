"""IFEval: 541 requests with instructions that a program can check."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dsv3.evals.question import EvalTask, Question
from dsv3.evals.tasks.instructions import RULES, follows
from dsv3.evals.tasks.items import Item, read_items, shown


def ifeval(folder: Path) -> Iterator[Question]:
    """Read the requests; each has the names and values of its instructions."""
    for item in read_items(folder / "ifeval" / "input_data.jsonl.gz", id_key="key"):
        more = {"instructions": item.texts("instruction_id_list"), "values": values_of(item)}
        yield Question(id=item.id, prompt=item.text("prompt"), max_tokens=8192, more=more)


def values_of(item: Item) -> tuple[Mapping[str, Any], ...]:
    """Return the values of each instruction."""
    names, values = item.texts("instruction_id_list"), item.values.get("kwargs")
    if unknown := [name for name in names if name not in RULES]:
        raise item.broken(f"there is no instruction '{unknown[0]}'; there are {', '.join(RULES)}")
    if not isinstance(values, list) or len(values) != len(names) or not all(isinstance(one, dict) for one in values):
        raise item.broken(f"'kwargs' should have a table for each of {len(names)} instructions; it is {shown(values)}")
    return tuple(values)


def grade(question: Question, answer: str) -> Mapping[str, float]:
    """Whether all instructions are followed, and how many of them; both strictly and loosely."""
    pairs = list(zip(question.more["instructions"], question.more["values"], strict=True))
    strict, loose = (
        [follows(answer, instruction=name, values=values, loose=loosely) for name, values in pairs]
        for loosely in (False, True)
    )
    return {
        "prompt strict": float(all(strict)),
        "prompt loose": float(all(loose)),
        "followed strict": float(sum(strict)),
        "followed loose": float(sum(loose)),
        "instructions": float(len(pairs)),
    }


INSTRUCTION_FOLLOWING = (
    EvalTask(
        name="ifeval",
        protocol="generate",
        metric="prompt strict",
        shots=0,
        questions=ifeval,
        grade=grade,
        chat=True,
        ratios={
            "instruction strict": ("followed strict", "instructions"),
            "instruction loose": ("followed loose", "instructions"),
        },
        note="Sentences are split by our own rules, where the published checker has NLTK's trained splitter; two items "
        "ask for a mark to be counted, for which the published checker draws a letter",
    ),
)
