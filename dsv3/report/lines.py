"""Curves over steps, depths or lengths, as a PNG."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dsv3.report.bars import COLOURS, DPI
from dsv3.report.picture import picture


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One line."""

    name: str
    """Empty leaves it out of the legend, as a further seed of the one before it, in whose colour it is drawn."""
    x: Sequence[float]
    y: Sequence[float]


def draw_lines(
    curves: Sequence[Curve],
    *,
    x_label: str,
    y_label: str,
    title: str,
    file: Path,
    levels: Mapping[str, float] | None = None,
    is_logarithmic: bool = False,
) -> None:
    """Write a PNG of curves, with horizontal lines to compare with. Both scales are logarithmic or neither.

    Raises:
        ConfigError: the file cannot be written.
    """
    with picture(file, width=6.2, height=3.2, dpi=DPI) as figure:
        axes = figure.add_subplot()
        colour = -1
        for curve in curves:
            colour += bool(curve.name)
            marker = "o" if len(curve.x) <= 20 else None
            axes.plot(
                curve.x,
                curve.y,
                label=curve.name or None,
                color=COLOURS[colour % len(COLOURS)],
                marker=marker,
                markersize=3.5,
                linewidth=1.3,
            )
        for name, value in (levels or {}).items():
            axes.axhline(value, color="grey", linewidth=0.8, linestyle=":")
            axes.text(0.01, value, name, transform=axes.get_yaxis_transform(), color="grey", fontsize=7, va="bottom")
        if is_logarithmic:
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.set_title(title, loc="left", fontsize=9)
        axes.grid(color="#e4e4e4", linewidth=0.7)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        axes.legend(frameon=False, fontsize=7)
