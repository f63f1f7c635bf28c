"""What came of each request, and of all of them together."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(kw_only=True)
class Outcome:
    """What came of one request. Times are in seconds since the load began."""

    scheduled: float
    """When it was to be sent. Waiting counts from here: a client that is held up by a slow server, and so sends late,
    would otherwise leave out exactly the waits that are to be measured (coordinated omission)."""
    sent: float = 0.0
    first: float | None = None
    """When the first text came, of the answer or of the reasoning before it."""
    last: float | None = None
    end: float = 0.0
    gaps: list[float] = field(default_factory=list)
    """Between pieces of text. A piece can hold several tokens."""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    is_counted: bool = False
    """Whether the server said how many tokens there were; otherwise a piece counts as one."""
    accepted_drafts: int = 0
    rejected_drafts: int = 0
    finish_reason: str = ""
    error: str = ""
    """Kind of error, such as `http 429`; empty for a whole answer."""
    detail: str = ""
    """What the server or the network said."""

    @property
    def time_to_first_token(self) -> float | None:
        """Seconds from when it was to be sent (TTFT)."""
        return None if self.first is None else self.first - self.scheduled

    @property
    def time_per_token(self) -> float | None:
        """Seconds for each token after the first (TPOT); None where there is no second one."""
        if self.first is None or self.last is None or self.completion_tokens < 2:
            return None
        return (self.last - self.first) / (self.completion_tokens - 1)

    @property
    def latency(self) -> float:
        """Seconds from when it was to be sent to the end of the answer."""
        return self.end - self.scheduled


@dataclass(frozen=True, kw_only=True)
class Distribution:
    """A few numbers for many; not a number (NaN) where there were none."""

    mean: float
    p50: float
    p90: float
    p99: float


@dataclass(frozen=True, kw_only=True)
class LoadSummary:
    """What came of a load. Latencies and rates are those of whole answers."""

    num_requests: int
    num_whole: int
    errors: dict[str, int]
    """Requests by kind of error."""
    seconds: float
    """From the first request to the end of the last."""
    requests_per_second: float
    output_tokens_per_second: float
    total_tokens_per_second: float
    """Prompts included, whether or not they were cached."""
    prompt_tokens: float
    """Mean of a request, as the server counted it."""
    output_tokens: float
    cached_share: float
    """Share of prompt tokens that were found in the server's cache."""
    draft_acceptance: float
    """Share of the tokens drafted by MTP that counted; NaN where nothing was drafted."""
    time_to_first_token: Distribution
    time_per_token: Distribution
    gap: Distribution
    """Between pieces of text, of all answers together: shows stalls that a mean over an answer hides."""
    latency: Distribution
    send_delay: Distribution
    """How late the load itself was. Where it is not small beside the latencies, it is the load that was slow."""
    num_uncounted: int
    """Answers whose tokens the server did not count."""

    def as_dict(self) -> dict[str, Any]:
        """Return it for JSON, which has no NaN: null there."""

        def clean(value: Any) -> Any:
            if isinstance(value, dict):
                return {key: clean(inner) for key, inner in value.items()}
            return None if isinstance(value, float) and not math.isfinite(value) else value

        return clean(asdict(self))


def percentile(values: Sequence[float], *, share: float) -> float:
    """Return the value below which `share` of the values lie, between two of them in proportion; NaN of none.

    It is the definition that numpy and spreadsheets use (Hyndman and Fan 1996, type 7).
    """
    if not values:
        return math.nan
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    if ordered[below] == ordered[above]:
        return ordered[below]
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def distribution(values: Sequence[float]) -> Distribution:
    """Return mean and percentiles."""
    return Distribution(
        mean=_ratio(math.fsum(values), len(values)),
        p50=percentile(values, share=0.5),
        p90=percentile(values, share=0.9),
        p99=percentile(values, share=0.99),
    )


def summarise(outcomes: Sequence[Outcome]) -> LoadSummary:
    """Return what a load measured."""
    whole = [outcome for outcome in outcomes if not outcome.error]
    seconds = max((o.end for o in outcomes), default=0.0) - min((o.scheduled for o in outcomes), default=0.0)
    prompt_tokens = sum(outcome.prompt_tokens for outcome in whole)
    output_tokens = sum(outcome.completion_tokens for outcome in whole)
    accepted = sum(outcome.accepted_drafts for outcome in whole)
    return LoadSummary(
        num_requests=len(outcomes),
        num_whole=len(whole),
        errors=dict(Counter(outcome.error for outcome in outcomes if outcome.error).most_common()),
        seconds=seconds,
        requests_per_second=_ratio(len(whole), seconds),
        output_tokens_per_second=_ratio(output_tokens, seconds),
        total_tokens_per_second=_ratio(prompt_tokens + output_tokens, seconds),
        prompt_tokens=_ratio(prompt_tokens, len(whole)),
        output_tokens=_ratio(output_tokens, len(whole)),
        cached_share=_ratio(sum(outcome.cached_tokens for outcome in whole), prompt_tokens),
        draft_acceptance=_ratio(accepted, accepted + sum(outcome.rejected_drafts for outcome in whole)),
        time_to_first_token=distribution([o.time_to_first_token for o in whole if o.time_to_first_token is not None]),
        time_per_token=distribution([o.time_per_token for o in whole if o.time_per_token is not None]),
        gap=distribution([gap for outcome in whole for gap in outcome.gaps]),
        latency=distribution([outcome.latency for outcome in whole]),
        send_delay=distribution([outcome.sent - outcome.scheduled for outcome in outcomes]),
        num_uncounted=sum(not outcome.is_counted for outcome in whole),
    )


def _ratio(part: int | float, whole: int | float) -> float:
    return part / whole if whole else math.nan
