"""Numbers of a plan that say where they come from."""

from dataclasses import dataclass
from enum import StrEnum


class Source(StrEnum):
    """Why a number of a plan is what it is."""

    COMPUTED = "computed"
    """From the settings, by formula or by running a schedule on paper."""
    PUBLISHED = "published"
    """By DeepSeek, or on the data sheet of a GPU."""
    ASSUMPTION = "assumption"
    """Ours; the line says what is assumed, and an option changes it where there is one."""
    FITTED = "fitted"
    """Chosen so that another, published number comes out; the line says which."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """One number of a plan."""

    section: str
    name: str
    value: int | float
    unit: str
    """As 'bytes', 'seconds', 'FLOPs', 'USD', or '' for a bare number."""
    source: Source
    why: str
    """The formula, the place of publication, or what is assumed."""
