"""The measurements of a load as a table to read."""

import math

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

from dsv3.serve.load.measure import LoadSummary


def render(summary: LoadSummary) -> Group:
    """Return what a load measured: latencies in milliseconds as a table, the rest as lines below it."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("milliseconds")
    for name in ("mean", "p50", "p90", "p99"):
        table.add_column(name, justify="right")
    for title, found in (
        ("time to first token", summary.time_to_first_token),
        ("time per token after it", summary.time_per_token),
        ("between pieces of text", summary.gap),
        ("whole answer", summary.latency),
        ("sent late by", summary.send_delay),
    ):
        table.add_row(title, *(milliseconds(value) for value in (found.mean, found.p50, found.p90, found.p99)))
    return Group(table, *(Text(line) for line in lines(summary)))


def lines(summary: LoadSummary) -> list[str]:
    """Return what is one number each, and what the reader has to know about the numbers."""
    said = [
        f"{summary.num_whole} of {summary.num_requests} requests answered in {summary.seconds:.1f} s: "
        f"{plain(summary.requests_per_second)} requests/s, {plain(summary.output_tokens_per_second)} tokens/s "
        f"({plain(summary.total_tokens_per_second)} with prompts)",
        f"prompts of {plain(summary.prompt_tokens)} tokens, {percent(summary.cached_share)} of them cached; "
        f"answers of {plain(summary.output_tokens)} tokens",
    ]
    if math.isfinite(summary.draft_acceptance):
        said.append(f"{percent(summary.draft_acceptance)} of the tokens drafted by MTP were accepted")
    if summary.errors:
        kinds = ", ".join(f"{count} {kind}" for kind, count in summary.errors.items())
        said.append(f"errors: {kinds}")
    if summary.num_uncounted:
        said.append(f"the server did not count the tokens of {summary.num_uncounted} answers; a piece counts as one")
    return said


def milliseconds(seconds: float) -> str:
    """Write a time with three digits or more."""
    return plain(1000 * seconds)


def percent(share: float) -> str:
    """Write a share; a dash where there is none."""
    return f"{100 * share:.0f} %" if math.isfinite(share) else "–"


def plain(value: float) -> str:
    """Write a number with three digits or more; a dash where there is none."""
    if not math.isfinite(value):
        return "–"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
