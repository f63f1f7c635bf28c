"""Numbers side by side: groups of bars, or of one dot a seed where there are several."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from matplotlib.axes import Axes

from dsv3.report.picture import picture

COLOURS = ("#4c72b0", "#dd8452", "#55a868", "#8172b3", "#c44e52")
DPI = 110
"""So that a picture of a page stays well below 100 kB."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """Bars that stand together, one for each label."""

    name: str
    values: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One quantity of several settings: a dot a seed, a line at the mean."""

    title: str
    values: dict[str, tuple[float, ...]]
    """By setting, seed by seed."""


def draw_bars(
    groups: Sequence[Group],
    *,
    labels: Sequence[str],
    title: str,
    y_label: str,
    file: Path,
    is_logarithmic: bool = False,
) -> None:
    """Write a PNG: the bars of each group beside each other, with their numbers above.

    Raises:
        ConfigError: the file cannot be written.
    """
    with picture(
        file, width=max(4.5, 1.5 + 0.9 * len(groups) * max(1.0, 0.6 * len(labels))), height=3.0, dpi=DPI
    ) as figure:
        axes = figure.add_subplot()
        width = 0.8 / len(labels)
        for place, label in enumerate(labels):
            across = [number + (place - (len(labels) - 1) / 2) * width for number in range(len(groups))]
            bars = axes.bar(
                across,
                [group.values[place] for group in groups],
                width=0.92 * width,
                color=COLOURS[place % len(COLOURS)],
                label=label,
            )
            axes.bar_label(bars, fmt="{:,.4g}", fontsize=6.5, padding=2)
        if is_logarithmic:
            axes.set_yscale("log")
        axes.margins(y=0.12 if len(labels) == 1 else 0.25)
        axes.set_xticks(range(len(groups)), [group.name for group in groups])
        _dress(axes, title=title, y_label=y_label)
        if len(labels) > 1:
            axes.legend(frameon=False, loc="upper right", ncols=len(labels))


def draw_seeds(panels: Sequence[Panel], *, title: str, file: Path) -> None:
    """Write a PNG: a panel a quantity, a column a setting, a dot a seed.

    Raises:
        ConfigError: the file cannot be written.
    """
    most = max(len(panel.values) for panel in panels)
    with picture(file, width=max(3.6, 0.9 * most + 0.9) * len(panels), height=3.0, dpi=DPI) as figure:
        for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            for number, values in enumerate(panel.values.values()):
                colour = COLOURS[number % len(COLOURS)]
                axes.plot([number - 0.25, number + 0.25], [fmean(values)] * 2, color=colour, linewidth=2)
                axes.plot([number] * len(values), values, "o", color=colour, markersize=5, alpha=0.65)
                axes.annotate(
                    f"{fmean(values):.4g}", (number + 0.28, fmean(values)), fontsize=6.5, va="center", color=colour
                )
            axes.set_xlim(-0.6, len(panel.values) - 0.2)
            axes.set_xticks(range(len(panel.values)), list(panel.values))
            axes.margins(y=0.15)
            _dress(axes, title=panel.title, y_label="")
        figure.suptitle(title, fontsize=9)


def _dress(axes: Axes, *, title: str, y_label: str) -> None:
    axes.set_ylabel(y_label)
    axes.set_title(title, loc="left", fontsize=9)
    axes.grid(axis="y", color="#e4e4e4", linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
