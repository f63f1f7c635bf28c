"""What is asked in post-training, and what rules may know of the answer."""

from dataclasses import dataclass, field
from typing import Any

Message = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What is asked, and what the rules may know of the answer."""

    messages: tuple[Message, ...]
    answer: str = ""
    """The one that is right, as text."""
    name: str = ""
    tests: tuple[str, ...] = ()
    """Of a programming problem, assertions that its program must pass."""
    cases: tuple[tuple[str, str], ...] = ()
    """Of a programming problem, what its program reads and what it must print for it."""
    more: dict[str, Any] = field(default_factory=dict)
    """Whatever else a reward of the user's own reads."""
