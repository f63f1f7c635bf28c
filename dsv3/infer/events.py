"""What the engine says back, token by token, and what it has done. Without torch, for whoever only passes it on."""

from dataclasses import dataclass, field, fields, replace
from enum import StrEnum
from itertools import zip_longest
from typing import Any

import numpy as np
from jaxtyping import Int


class FinishReason(StrEnum):
    """Why generation ended."""

    END_OF_TEXT = "end_of_text"
    """The model wrote its end token, or one of `stop_token_ids`."""
    STOP_STRING = "stop_string"
    MAX_TOKENS = "max_tokens"
    CONTEXT_LIMIT = "context_limit"
    """Prompt and answer fill the context, or the engine's pages."""
    CANCELLED = "cancelled"
    HANDED_OVER = "handed_over"
    """Another engine goes on from here; see `Request.hand_to`."""
    FAILED = "failed"
    """Something broke while this request was computed; `TokenEvent.error` says what."""


@dataclass(frozen=True, kw_only=True)
class TokenLogprob:
    """Log-probability of one token where it stands, with the likeliest ones there."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    """(token, log-probability), likeliest first."""


@dataclass(frozen=True, kw_only=True)
class TokenEvent:
    """What one step brought one request: some tokens, and perhaps its end."""

    id: str
    tokens: tuple[int, ...] = ()
    """New tokens, several when drafts were accepted. The end token that finishes a request is not among them."""
    logprobs: tuple[TokenLogprob, ...] = ()
    """One for each of `tokens` where they were asked for."""
    end: TokenLogprob | None = None
    """The end token that finishes a request, where log-probabilities were asked for."""
    prompt_logprobs: tuple[TokenLogprob | None, ...] = ()
    """In the first event, where asked for: one for each prompt token, None for the first."""
    experts: Int[np.ndarray, "token layer chosen"] | None = None
    """In the last event, where asked for: the experts of each layer that has some, for all tokens that were read."""
    finish_reason: FinishReason | None = None
    error: str = ""
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    """Prompt tokens that were found in the prefix cache, when the request was first read."""
    num_drafted: int = 0
    num_accepted: int = 0
    """Drafts of this step, and those of them that were right."""


@dataclass(kw_only=True)
class ExpertStats:
    """What the experts on one of several ranks have done, and how evenly the ranks share the work."""

    num_rows: int = 0
    """Rows that experts here have computed: one for each token and expert."""
    balance: float | None = None
    """Mean rows of a rank divided by the most that one had, averaged over layers: from the newest look to that before
    it. 1 is even. None before there was one."""
    num_changes: int = 0
    """Times that experts were placed anew."""
    num_moves: int = 0
    """Experts whose weights have come here."""
    moved_bytes: int = 0
    load_before: float | None = None
    """Load of this rank that the newest look found for the placement there was; 1 is its fair share."""
    load_after: float | None = None
    """What it expects of the one that it chose."""
    balance_before: float | None = None
    """`balance` of all ranks, in the same way."""
    balance_after: float | None = None


@dataclass(kw_only=True)
class EngineStats:
    """Counts since the engine started, and what it holds now."""

    num_waiting: int = 0
    num_running: int = 0
    num_pages: int = 0
    num_pages_in_use: int = 0
    num_pages_cached: int = 0
    """Free to be taken, but still good as a prefix."""
    num_steps: int = 0
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_generated_tokens: int = 0
    num_preemptions: int = 0
    num_read_tokens: int = 0
    """Tokens that went through a pass, drafts among them."""
    step_seconds: float = 0.0
    """Time that passes took, all in all."""
    drafted_at: list[int] = field(default_factory=list)
    """Drafts made, by place in the chain: index 0 is the first token ahead."""
    accepted_at: list[int] = field(default_factory=list)
    """Those of them that were right and counted."""
    finished: dict[str, int] = field(default_factory=dict)
    """Requests by finish reason."""
    experts: ExpertStats | None = None
    """Where experts are spread over ranks: what those of this one have done. Sums have none."""

    def plus(self, other: "EngineStats") -> "EngineStats":
        """Return what two engines have counted and hold together; lists are added place by place."""

        def added(mine: Any, its: Any) -> Any:
            if isinstance(mine, list):
                return [sum(pair) for pair in zip_longest(mine, its, fillvalue=0)]
            if isinstance(mine, dict):
                return {key: mine.get(key, 0) + its.get(key, 0) for key in {**mine, **its}}
            return mine + its

        names = [one.name for one in fields(self) if one.name != "experts"]
        return EngineStats(**{name: added(getattr(self, name), getattr(other, name)) for name in names})

    def counts(self) -> "EngineStats":
        """Return the counts alone, of an engine that has ended and holds nothing any more."""
        return replace(self, num_waiting=0, num_running=0, num_pages=0, num_pages_in_use=0, num_pages_cached=0)
