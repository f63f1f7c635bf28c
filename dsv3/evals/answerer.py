"""What evaluations need of a model, ours or one behind an endpoint."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable


@dataclass(frozen=True, kw_only=True)
class Continuation:
    """How likely a text was after another."""

    logprob: float
    """Natural logarithm, summed over its tokens."""
    is_greedy: bool
    """Whether each of its tokens was the likeliest."""
    num_tokens: int
    num_cut: int
    """Tokens of the context that were left out at its beginning, for the model's context to suffice."""


@runtime_checkable
class Answerer(Protocol):
    """Answers the three kinds of question that there are. Order and company of questions change no answer."""

    def continuations(self, pairs: Sequence[tuple[str, str]]) -> list[Continuation]:
        """Score (context, continuation) pairs; an empty context stands for the beginning of a text."""
        ...

    def rolling(self, texts: Sequence[str]) -> list[float]:
        """Return the log-probability of whole texts, in windows of the context's length."""
        ...

    def generate(
        self, prompts: Sequence[str], *, stops: Sequence[Sequence[str]], max_tokens: Sequence[int]
    ) -> list[str]:
        """Return greedy answers, each up to its first stop, which is not part of it."""
        ...
