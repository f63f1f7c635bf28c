"""How many tokens: always the same, evenly between two numbers, or a few that are long among many short ones."""

import math
import random
from dataclasses import dataclass

from dsv3.errors import ConfigError

FORMS = "use a number (256), a range (64-512) or lognormal:MEDIAN:SIGMA (lognormal:200:0.8)"
LONGEST_IN_MEDIANS = 10
"""Lengths of a lognormal distribution are cut off here, so that one request cannot be a hundred times the others."""


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """A distribution of whole numbers, all at least 1."""

    low: int
    high: int
    """What is drawn lies between the two, both included."""
    median: float = 0.0
    sigma: float = 0.0
    """Of the logarithm. At 0 all numbers from `low` to `high` are equally likely."""

    def draw(self, rng: random.Random) -> int:
        """Return a length."""
        if self.sigma == 0:
            return rng.randint(self.low, self.high)
        length = round(self.median * math.exp(rng.gauss(0.0, self.sigma)))
        return min(max(length, self.low), self.high)


def parse_lengths(text: str, *, option: str) -> Lengths:
    """Read what was written for a distribution of lengths.

    Raises:
        ConfigError: it is none of the forms, or leaves no length of at least 1.
    """
    try:
        lengths = _lognormal(text) if text.startswith("lognormal:") else _range(text)
    except ValueError:
        raise ConfigError(f"{option} {text}: {FORMS}") from None
    if not 1 <= lengths.low <= lengths.high:
        raise ConfigError(f"{option} {text}: lengths are at least 1, and a range goes from less to more")
    return lengths


def _range(text: str) -> Lengths:
    low, dash, high = text.partition("-")
    return Lengths(low=int(low), high=int(high) if dash else int(low))


def _lognormal(text: str) -> Lengths:
    _, median, sigma = text.split(":")
    if not (0 < float(median) < math.inf and 0 < float(sigma) <= 5):
        raise ValueError(text)
    return Lengths(low=1, high=math.ceil(float(median) * LONGEST_IN_MEDIANS), median=float(median), sigma=float(sigma))
