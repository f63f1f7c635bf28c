"""What the report says beside what was seen, and whether the two agree: the verdict of a reproduction."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from math import isclose, sqrt
from statistics import fmean, stdev
from typing import Any, Protocol


class Verdict(StrEnum):
    """How what was seen stands to what the report says."""

    SAME = "same sign"
    """Of a comparison: the report's direction, in every seed."""
    UNCLEAR = "within the spread"
    """Seeds disagree, so that nothing was seen."""
    OTHER = "other sign"
    """Against the report, in every seed."""
    AGREES = "agrees"
    """Of a number: within its tolerance."""
    DIFFERS = "differs"


class Finding(Protocol):
    """One thing that the report says, held against what was seen here."""

    @property
    def claim(self) -> str:
        """What is compared, in a few words."""
        ...

    @property
    def report(self) -> str:
        """What the report says of it."""
        ...

    @property
    def seen(self) -> str:
        """What came out here, in numbers."""
        ...

    @property
    def verdict(self) -> Verdict:
        """How the two stand to each other."""
        ...

    def as_dict(self) -> dict[str, Any]:
        """Return all of it for JSON."""
        ...


@dataclass(frozen=True, kw_only=True)
class Number:
    """A number that the report gives, or that follows from what it gives."""

    claim: str
    report: str
    expected: float
    value: float
    tolerance: float = 0.0
    """Largest difference that still agrees, as a share of what is expected."""
    unit: str = ""

    @property
    def seen(self) -> str:
        """The value, and how far off it is where it is not the very number."""
        off = (
            ""
            if isclose(self.value, self.expected) or not self.expected
            else f" ({self.value / self.expected - 1:+.1%})"
        )
        return f"{shown(self.value)}{self.unit and ' '}{self.unit}{off}"

    @property
    def verdict(self) -> Verdict:
        """Whether it lies within the tolerance."""
        room = self.tolerance * abs(self.expected) + 1e-9 * abs(self.expected)
        return Verdict.AGREES if abs(self.value - self.expected) <= room else Verdict.DIFFERS

    def as_dict(self) -> dict[str, Any]:
        """Return all of it for JSON."""
        return asdict(self) | {"seen": self.seen, "verdict": str(self.verdict)}


@dataclass(frozen=True, kw_only=True)
class Limit:
    """A bound that the report states, and the number of each seed that has to keep it."""

    claim: str
    report: str
    bound: float
    values: tuple[float, ...]
    at_least: bool = False
    """Whether the numbers must not be lower, where otherwise they must not be higher."""
    unit: str = ""

    @property
    def seen(self) -> str:
        """The number of each seed."""
        return " ".join(shown(value) for value in self.values) + (f" {self.unit}" if self.unit else "")

    @property
    def verdict(self) -> Verdict:
        """Whether all of them keep it."""
        kept = [value >= self.bound if self.at_least else value <= self.bound for value in self.values]
        return Verdict.AGREES if all(kept) else Verdict.DIFFERS

    def as_dict(self) -> dict[str, Any]:
        """Return all of it for JSON."""
        return asdict(self) | {"seen": self.seen, "verdict": str(self.verdict)}


@dataclass(frozen=True, kw_only=True)
class Order:
    """Two things of which the report says which has the lower number: a pair for each seed, of the same rows."""

    claim: str
    report: str
    lower: tuple[float, ...]
    """Of what the report has lower, seed by seed."""
    higher: tuple[float, ...]
    margin: float = 0.0
    """How much higher `lower` may be, as a share, and still be no worse: for 'as good as', not for 'better than'."""

    def __post_init__(self) -> None:
        assert self.lower
        assert len(self.lower) == len(self.higher), "a pair of numbers for each seed"

    @property
    def differences(self) -> tuple[float, ...]:
        """How much lower it was in each seed; below zero where it was higher."""
        return tuple(b - a for a, b in zip(self.lower, self.higher, strict=True))

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return fmean(self.differences)

    @property
    def error(self) -> float:
        """Standard error of the mean over seeds; 0 of a single one, which tells nothing of the spread."""
        return standard_error(self.differences)

    @property
    def seen(self) -> str:
        """Both means, and their difference with its spread."""
        both = f"{shown(fmean(self.lower))} and {shown(fmean(self.higher))}"
        if len(self.lower) == 1:
            return both
        each = " ".join(f"{value:+.3g}" for value in self.differences)
        return f"{both}; lower by {self.mean:+.3g} ± {self.error:.2g} (seeds: {each})"

    @property
    def verdict(self) -> Verdict:
        """Whether every seed agrees with the report, none does, or they disagree."""
        room = [self.margin * abs(value) for value in self.higher]
        kept = [
            difference > 0 or (self.margin > 0 and difference >= -most)
            for difference, most in zip(self.differences, room, strict=True)
        ]
        if all(kept):
            return Verdict.SAME
        return Verdict.UNCLEAR if any(kept) else Verdict.OTHER

    def as_dict(self) -> dict[str, Any]:
        """Return all of it for JSON."""
        return asdict(self) | {
            "differences": list(self.differences),
            "mean": self.mean,
            "standard_error": self.error,
            "seen": self.seen,
            "verdict": str(self.verdict),
        }


def standard_error(values: Sequence[float]) -> float:
    """Return the standard error of the mean of a few values; 0 of a single one."""
    return stdev(values) / sqrt(len(values)) if len(values) > 1 else 0.0


def shown(value: float) -> str:
    """Write a number with four digits, and whole ones whole, in groups of three."""
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"
