"""Needle in a haystack: a fact hidden in real text, at every depth and length, and asked for at the end (report 4.3).

The report shows a heat map of 15 lengths by 15 depths up to 128K and does not say what its needles were. These are
ours, for models that continue text: a sentence of the haystack states the fact, and the prompt ends with the beginning
of that very sentence, once more.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from statistics import fmean
from typing import Any

from dsv3.config import EngineConfig
from dsv3.data.tokenizer import Tokenizer
from dsv3.errors import ConfigError
from dsv3.infer.loaded import LoadedModel
from dsv3.infer.params import SamplingParams
from dsv3.infer.request import Request

GRID = 15
"""Lengths, and depths, as in the report."""
LEAST_TOKENS = 100
"""Of a prompt in which anything can be hidden at all."""
AT_ONCE = 4
"""Prompts that are read at the same time."""

_PLACES = ("Paris", "Lima", "Oslo", "Cairo", "Delhi", "Seoul", "Rome", "Tokyo", "Quito", "Accra", "Dakar", "Minsk")
_COLOURS = ("red", "blue", "green", "white", "black", "brown", "yellow", "grey", "golden", "silver")
_THINGS = (
    "river",
    "house",
    "garden",
    "letter",
    "stone",
    "bridge",
    "window",
    "table",
    "horse",
    "ship",
    "tower",
    "field",
)


@dataclass(frozen=True, kw_only=True)
class Needle:
    """Facts to hide, and what is asked."""

    facts: tuple[str, ...]
    """Whole sentences; the first is the one that is asked for, and the one whose depth counts."""
    question: str
    """The beginning of that sentence."""
    answer: str
    """The rest of it, without its full stop."""


def number_needle(random: Random) -> Needle:
    """A number of six digits that belongs to a place."""
    place, number = random.choice(_PLACES), random.randrange(100_000, 1_000_000)
    beginning = f"The secret number of {place} is"
    return Needle(facts=(f"{beginning} {number}.",), question=beginning, answer=str(number))


def phrase_needle(random: Random) -> Needle:
    """Three words that belong to a thing."""
    thing, *words = random.sample(_THINGS, 4)
    beginning = f"The password of the {random.choice(_COLOURS)} {thing} is"
    return Needle(facts=(f"{beginning} {' '.join(words)}.",), question=beginning, answer=" ".join(words))


def keys_needle(random: Random) -> Needle:
    """Four numbers of four places, spread over the text; one of them is asked for."""
    places = random.sample(_PLACES, 4)
    numbers = random.sample(range(100_000, 1_000_000), 4)
    beginnings = [f"The secret number of {place} is" for place in places]
    facts = tuple(f"{beginning} {number}." for beginning, number in zip(beginnings, numbers, strict=True))
    return Needle(facts=facts, question=beginnings[0], answer=str(numbers[0]))


KINDS: dict[str, Callable[[Random], Needle]] = {"number": number_needle, "phrase": phrase_needle, "keys": keys_needle}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One place of the grid."""

    length: int
    """Tokens, of the prompt and the answer together."""
    depth: float
    """Where the fact was: 0 at the beginning of the text, 1 at its end."""
    found: dict[str, bool]
    """By kind of needle."""

    @property
    def score(self) -> float:
        """Share of the needles that were found."""
        return fmean(self.found.values())


@dataclass(frozen=True, kw_only=True)
class NeedleResult:
    """The grid, length by length."""

    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    cells: tuple[Cell, ...]
    haystack_tokens: int
    """Of different text; longer prompts have some of it twice."""

    @property
    def score(self) -> float:
        """Share of all needles that were found."""
        return fmean(cell.score for cell in self.cells)

    def by_length(self) -> dict[int, float]:
        """Return for each length the share of needles found there, over all depths."""
        return {length: fmean(cell.score for cell in self.cells if cell.length == length) for length in self.lengths}

    def as_dict(self) -> dict[str, Any]:
        """Return it for JSON."""
        return {
            "score": self.score,
            "lengths": list(self.lengths),
            "depths": list(self.depths),
            "haystack_tokens": self.haystack_tokens,
            "cells": [{"length": cell.length, "depth": cell.depth, "found": cell.found} for cell in self.cells],
        }


def grid_of(longest: int, *, size: int = GRID) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Return evenly spaced lengths up to `longest`, and depths from 0 to 1.

    Raises:
        ConfigError: the shortest would have no room for a needle.
    """
    lengths = tuple(longest * step // size for step in range(1, size + 1))
    if lengths[0] < LEAST_TOKENS:
        raise ConfigError(
            f"the shortest of {size} lengths up to {longest} tokens has {lengths[0]}, and a needle needs about "
            f"{LEAST_TOKENS}; use fewer lengths, as in --grid {max(1, longest // LEAST_TOKENS)}"
        )
    return lengths, tuple(step / (size - 1) if size > 1 else 0.5 for step in range(size))


def find_needles(
    model: LoadedModel,
    *,
    haystack: Sequence[int],
    longest: int,
    kinds: Sequence[str] = tuple(KINDS),
    size: int = GRID,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> NeedleResult:
    """Ask for needles in prompts of up to `longest` tokens, each answered greedily and compared word for word.

    `haystack` are tokens of real text, none of which the model was trained on.

    Raises:
        ConfigError: an unknown kind, a length that the model has no positions for, or too short a haystack.
    """
    unknown = sorted(set(kinds) - set(KINDS))
    if unknown or not kinds:
        raise ConfigError(f"needles of kind {', '.join(unknown) or 'none'}; choose of {', '.join(KINDS)}")
    limit = model.config.max_position_embeddings
    if longest > limit:
        raise ConfigError(f"needles were wanted in {longest} tokens, and {model.source} has {limit} positions")
    if len(haystack) < LEAST_TOKENS:
        raise ConfigError(f"the haystack has {len(haystack)} tokens, which is no text to hide something in")
    lengths, depths = grid_of(longest, size=size)
    asked = [
        _ask(model.tokenizer, haystack=haystack, kind=kind, length=length, depth=depth, seed=seed)
        for length in lengths
        for depth in depths
        for kind in kinds
    ]
    answers = _answers(model, asked=asked, longest=longest, progress=progress)
    found = iter(
        [_is_right(model.tokenizer, answer, needle=one.needle) for one, answer in zip(asked, answers, strict=True)]
    )
    cells = tuple(
        Cell(length=length, depth=depth, found={kind: next(found) for kind in kinds})
        for length in lengths
        for depth in depths
    )
    return NeedleResult(lengths=lengths, depths=depths, cells=cells, haystack_tokens=len(haystack))


@dataclass(frozen=True, kw_only=True)
class _Asked:
    prompt: list[int]
    needle: Needle
    answer_tokens: int


def _ask(tokenizer: Tokenizer, *, haystack: Sequence[int], kind: str, length: int, depth: float, seed: int) -> _Asked:
    """Return a prompt that, with its answer, has `length` tokens."""
    random = Random(f"{seed} {kind} {length} {depth}")
    needle = KINDS[kind](random)
    facts = [tokenizer.encode(f"\n{fact}\n") for fact in needle.facts]
    question = tokenizer.encode(f"\n{needle.question}")
    answer_tokens = len(tokenizer.encode(f" {needle.answer}.")) + 2
    room = length - 1 - sum(map(len, facts)) - len(question) - answer_tokens
    if room < 0:
        raise ConfigError(
            f"needles of kind {kind} need {length - room} tokens of this tokenizer, and a prompt has {length}; "
            "use fewer lengths, or another kind"
        )
    begin = random.randrange(len(haystack))
    text = [haystack[(begin + place) % len(haystack)] for place in range(room)]
    places = [depth, *(random.random() for _ in facts[1:])]
    # The last first, so that the places of the others do not move.
    for place, fact in sorted(zip(places, facts, strict=True), key=lambda pair: -pair[0]):
        at = round(place * room)
        text[at:at] = fact
    return _Asked(prompt=[tokenizer.bos_id, *text, *question], needle=needle, answer_tokens=answer_tokens)


def _answers(
    model: LoadedModel, *, asked: Sequence[_Asked], longest: int, progress: Callable[[int, int], None] | None
) -> list[list[int]]:
    engine = model.new_engine(
        EngineConfig(max_sequences=AT_ONCE, prefix_caching=False), cache_tokens=AT_ONCE * (longest + 64)
    )
    answers: dict[str, list[int]] = {str(number): [] for number in range(len(asked))}
    for number, one in enumerate(asked):
        params = SamplingParams(temperature=0.0, max_tokens=one.answer_tokens)
        engine.add(Request(id=str(number), prompt_ids=one.prompt, params=params))
    ended = 0
    while engine.has_work:
        for event in engine.step():
            answers[event.id] += event.tokens
            if event.finish_reason is not None:
                ended += 1
                if progress is not None:
                    progress(ended, len(asked))
    return list(answers.values())


def _is_right(tokenizer: Tokenizer, answer: Sequence[int], *, needle: Needle) -> bool:
    """Whether the sentence was ended as it stood in the text, and not merely begun so."""
    said = tokenizer.decode(list(answer)).strip()
    return said.split("\n")[0].partition(".")[0].strip() == needle.answer
