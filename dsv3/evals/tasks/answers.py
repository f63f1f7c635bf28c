"""Finding in a text what it gives as its answer, in the ways that several benchmarks share."""

import re
from collections.abc import Iterable

from dsv3.evals.final_answer import NUMBER, same_answer

LETTERS = "ABCDEFGHIJKLMNOP"


def cut_at(text: str, stops: Iterable[str]) -> str:
    """Return a text up to the first of some ends."""
    return min((text.split(stop, 1)[0] for stop in stops), key=len, default=text)


def number_said(text: str, *, after: Iterable[str], first: bool) -> str | None:
    """Return the first or last number after the last of some words, in any case; without the words, the last of all."""
    places = [match.end() for word in after for match in re.finditer(re.escape(word), text, re.IGNORECASE)]
    if places and (numbers := NUMBER.findall(text[max(places) :])):
        return numbers[0 if first else -1]
    numbers = NUMBER.findall(text)
    return numbers[-1] if numbers else None


def same_number(found: str | None, wanted: str) -> float:
    """1 if a number was found, and it is the one that is wanted."""
    return float(found is not None and same_answer(found, wanted))
