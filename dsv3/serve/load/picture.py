"""The measurements of a load as a picture: how latencies are distributed, and what happened when."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dsv3.errors import ConfigError
from dsv3.serve.load.measure import Outcome

BLUE, ORANGE, GREEN, RED, GREY = "#3257c9", "#d8691a", "#248f5e", "#c73a58", "#9aa0aa"
MAX_BARS = 400
"""Requests of the timeline; of more, evenly chosen ones are shown."""


def save_picture(path: Path, *, outcomes: Sequence[Outcome], title: str) -> None:
    """Write a PNG.

    Raises:
        ConfigError: the file cannot be written.
    """
    figure = Figure(figsize=(11, 8), layout="constrained")
    figure.suptitle(title, fontsize=12)
    first, per_token, timeline, rate = figure.subplots(2, 2).flat
    whole = [outcome for outcome in outcomes if not outcome.error]
    firsts = [outcome.time_to_first_token for outcome in whole if outcome.time_to_first_token is not None]
    draw_shares(first, {"to the first token": firsts, "to the end": [outcome.latency for outcome in whole]}, unit="s")
    paces = [1000 * outcome.time_per_token for outcome in whole if outcome.time_per_token is not None]
    gaps = [1000 * gap for outcome in whole for gap in outcome.gaps]
    draw_shares(per_token, {"per token": paces, "between pieces": gaps}, unit="ms")
    draw_timeline(timeline, outcomes)
    draw_rate(rate, outcomes)
    FigureCanvasAgg(figure)
    try:
        figure.savefig(path, dpi=120, format="png")
    except OSError as error:
        raise ConfigError(f"the picture cannot be written to {path}: {error.strerror}") from error


def draw_shares(axes: Axes, values: dict[str, list[float]], *, unit: str) -> None:
    """Draw which share of the values lies at or below each: read the median off at 50 %."""
    for (name, found), colour in zip(values.items(), (BLUE, ORANGE), strict=True):
        if found:
            axes.ecdf(found, color=colour, label=name)
    axes.set(xlabel=f"latency ({unit})", ylabel="share of them at or below", ylim=(0, 1.02))
    axes.set_xlim(left=0)
    for share in (0.5, 0.9, 0.99):
        axes.axhline(share, color=GREY, linewidth=0.6, linestyle=":")
    _dress(axes)


def draw_timeline(axes: Axes, outcomes: Sequence[Outcome]) -> None:
    """Draw a line for each request: grey while it waits for its first token, blue while it is answered, red if lost."""
    ordered = sorted(outcomes, key=lambda outcome: outcome.scheduled)
    step = max(-(-len(ordered) // MAX_BARS), 1)
    for row, outcome in enumerate(ordered[::step]):
        first = outcome.end if outcome.first is None else outcome.first
        axes.hlines(row, outcome.scheduled, first, color=RED if outcome.error else GREY, linewidth=1.2)
        axes.hlines(row, first, outcome.end, color=RED if outcome.error else BLUE, linewidth=1.2)
        if outcome.error:  # A refusal takes no time, so its line alone would not be seen.
            axes.plot(outcome.end, row, color=RED, marker="x", markersize=4)
    axes.plot([], [], color=GREY, label="waits")
    axes.plot([], [], color=BLUE, label="is answered")
    if any(outcome.error for outcome in ordered[::step]):
        axes.plot([], [], color=RED, label="fails")
    axes.set(xlabel="time (s)", ylabel="request" if step == 1 else f"every {step}th request")
    axes.invert_yaxis()
    _dress(axes)


def draw_rate(axes: Axes, outcomes: Sequence[Outcome]) -> None:
    """Draw tokens a second, each answer's spread evenly over the time it took, and the requests under way."""
    end = max((outcome.end for outcome in outcomes), default=0.0)
    times = np.linspace(0, end, 200)
    rate, under_way = np.zeros_like(times), np.zeros_like(times)
    for outcome in outcomes:
        under_way += (times >= outcome.scheduled) & (times < outcome.end)
        if outcome.first is not None and outcome.last is not None and outcome.last > outcome.first:
            is_answering = (times >= outcome.first) & (times < outcome.last)
            rate += is_answering * outcome.completion_tokens / (outcome.last - outcome.first)
    axes.plot(times, rate, color=GREEN, label="tokens/s")
    axes.set(xlabel="time (s)", ylabel="tokens/s", ylim=(0, None))
    beside = axes.twinx()
    beside.plot(times, under_way, color=GREY, linewidth=1.0)
    axes.plot([], [], color=GREY, label="requests under way (right)")
    beside.set_ylim(bottom=0)
    beside.spines[["top"]].set_visible(False)
    _dress(axes)


def _dress(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=9)
