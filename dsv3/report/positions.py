"""Loss by position as a picture: how far a model can read, and whether it gains from what it has read."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from dsv3.evals.positions import PositionLoss
from dsv3.report.picture import picture

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
"""Okabe and Ito's, which eyes of every kind tell apart."""
HIGHEST = 4.0
"""Perplexities above this many times the best one may run out of the picture, but no curve as a whole."""


def draw_positions(results: Sequence[PositionLoss], *, file: Path, title: str, trained: int = 0) -> None:
    """Write a PNG; `trained` marks the length of pre-training's rows.

    Raises:
        ConfigError: the file cannot be written.
    """
    with picture(file, width=6.4, height=3.8) as figure:
        axes = figure.add_subplot()
        draw_curves(axes, results, trained=trained)
        axes.set_title(title)


def draw_curves(axes: Axes, results: Sequence[PositionLoss], *, trained: int = 0) -> None:
    """Draw perplexity by position, on logarithmic axes, a curve for each result."""
    for place, result in enumerate(results):
        middles = [(begin + end) / 2 for begin, end in zip(result.edges, result.edges[1:], strict=False)]
        axes.plot(
            middles,
            result.perplexity,
            color=COLOURS[place % len(COLOURS)],
            marker="o",
            markersize=3,
            linewidth=1.4,
            label=result.name,
        )
    best = min(min(result.perplexity) for result in results)
    worst = max(max(result.perplexity) for result in results)
    shown = max([HIGHEST * best] + [1.2 * min(result.perplexity) for result in results])
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_ylim(0.9 * best, min(1.1 * worst, shown))
    axes.yaxis.set_major_locator(LogLocator(subs=range(1, 10)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    if trained:
        axes.axvline(trained, color="#888888", linestyle=":", linewidth=1)
        axes.annotate(" rows of pre-training end", (trained, axes.get_ylim()[1]), va="top", fontsize=7, color="#555555")
    axes.grid(alpha=0.25)
    axes.set_xlabel("position, in tokens")
    axes.set_ylabel("perplexity")
    if len(results) > 1:
        axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
