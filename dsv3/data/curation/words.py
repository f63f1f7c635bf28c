"""A text as numbers of its words, so that runs of words are compared without making them: n-grams in one sweep each."""

import unicodedata
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b

import numpy as np
from jaxtyping import Int, UInt64
from numpy import ndarray

from dsv3.data.contamination import WORD

MAX_TABLE = 200_000
"""Words whose numbers are remembered; then all are forgotten, so that memory stays flat."""
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


class _Numbers(dict[str, int]):
    """The number of each word: 64 bits of its hash, the same in every process."""

    def __missing__(self, word: str) -> int:
        number = int.from_bytes(blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")
        self[word] = number
        return number


class WordCounter:
    """Makes `Words` of texts; one for each process."""

    def __init__(self) -> None:
        self._numbers = _Numbers()

    def words(self, text: str) -> "Words":
        """Return the words of a text, as `contamination` has them: in lower case, of some scripts each character."""
        if len(self._numbers) > MAX_TABLE:
            self._numbers.clear()
        folded = text.lower() if text.isascii() else unicodedata.normalize("NFKC", text).lower()
        found: list[str] = WORD.findall(folded)
        numbers = np.fromiter(map(self._numbers.__getitem__, found), dtype=np.uint64, count=len(found))
        return Words(words=found, numbers=numbers)


@dataclass(frozen=True, kw_only=True)
class Words:
    """The words of one text, in order."""

    words: list[str]
    numbers: UInt64[ndarray, " word"]

    def __len__(self) -> int:
        return len(self.words)

    @cached_property
    def lengths(self) -> Int[ndarray, " word"]:
        """Characters of each word."""
        return np.fromiter(map(len, self.words), dtype=np.int64, count=len(self.words))

    def rows(self, count: int) -> UInt64[ndarray, " row"]:
        """Return a hash of every `count` words in a row; none where there are fewer words."""
        return rows_of_numbers(self.numbers, count)

    def rows_by_size(self, largest: int) -> dict[int, UInt64[ndarray, " row"]]:
        """Return a hash of every 2 to `largest` words in a row, by their number, not mixed: good to compare alone."""
        found, hashed = {}, self.numbers
        for size in range(2, largest + 1):
            # Each is made of the one before it.
            hashed = hashed[:-1] * MULTIPLIER + self.numbers[size - 1 :]
            found[size] = hashed
        return found


def rows_of_numbers(numbers: UInt64[ndarray, " word"], count: int) -> UInt64[ndarray, " row"]:
    """Return a hash of every `count` numbers in a row: a polynomial modulo 2^64, its bits mixed at the end."""
    places = len(numbers) - count + 1
    if places <= 0:
        return np.empty(0, dtype=np.uint64)
    hashed = numbers[:places].copy()
    for offset in range(1, count):
        hashed *= MULTIPLIER
        hashed += numbers[offset : offset + places]
    return mixed(hashed)


def mixed(values: UInt64[ndarray, " value"]) -> UInt64[ndarray, " value"]:
    """Return 64-bit values whose every bit depends on all: the finaliser of SplitMix64."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
