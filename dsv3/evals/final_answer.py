"""The answer that a text ends in, and whether two of them are the same."""

import re
from decimal import Decimal, InvalidOperation

THINK = re.compile(r"\A\s*<think>(?P<thought>.+?)</think>(?P<answer>.+)\Z", re.DOTALL)
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:/\d+)?")


def final_answer(text: str) -> str | None:
    r"""Return what a text gives as its answer: the last `\boxed{...}`, what follows `####`, else its last number.

    What is thought between <think> and </think> is no answer.
    """
    said = after_thought(text)
    if (marked := marked_answer(said)) is not None:
        return marked
    numbers = NUMBER.findall(said)
    return numbers[-1] if numbers else None


def after_thought(text: str) -> str:
    """Return what a text says after what it thinks between <think> and </think>."""
    thought = THINK.match(text)
    return thought["answer"] if thought else text


def marked_answer(said: str) -> str | None:
    r"""Return the last `\boxed{...}`, or else what follows `####`."""
    if (box := _last_box(said)) is not None:
        return box
    return said.rsplit("####", 1)[1].strip().split("\n")[0].strip() if "####" in said else None


def same_answer(found: str, wanted: str) -> bool:
    """Tell whether two answers are the same text, but for space and a full stop, or the same number."""
    a, b = (one.strip().rstrip(".").strip() for one in (found, wanted))
    if a == b:
        return True
    numbers = [as_number(one) for one in (a, b)]
    return None not in numbers and numbers[0] == numbers[1]


def as_number(text: str) -> Decimal | None:
    """Return a number written with or without commas, a currency, a percent sign or as a fraction; else None."""
    plain = text.replace(",", "").replace("$", "").replace("%", "").strip()
    try:
        if "/" in plain:
            above, below = (Decimal(part) for part in plain.split("/"))
            return above / below if below else None
        number = Decimal(plain)
    except (InvalidOperation, ValueError):
        return None
    return number if number.is_finite() else None


def _last_box(text: str) -> str | None:
    r"""Return what is in the last `\boxed{...}`, braces within it balanced; None where there is none whole."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth, begin = 0, start + len("\\boxed{")
    for place in range(begin - 1, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[begin:place].strip()
    return None
