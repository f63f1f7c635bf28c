"""Pictures of a run: line charts as inline SVG, expert loads as small PNG images.

A picture takes its colours and its font from the page: matplotlib draws with stand-in colours that are then replaced
by the page's CSS variables, so one picture serves the light and the dark theme. Each line chart is drawn twice, wide
and narrow, since text in a picture that is scaled down to a phone cannot be read; the page shows the one that fits.
"""

import base64
import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.image import imsave
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

Values = npt.NDArray[np.float64]

MAX_POINTS = 400
"""Points of one line; longer ones are averaged in equal runs, or the page would grow with the training."""
NUM_COLOURS = 8
"""Series colours of the page's style sheet, `--series-0` and on."""
STAND_INS = {"ink": "#010203", "muted": "#020304", "grid": "#030405"} | {
    f"series-{index}": f"#0405{index:02x}" for index in range(NUM_COLOURS)
}
HEAT_COLUMNS = 220
"""Points in time of one heatmap."""
HEAT_COLOURS = LinearSegmentedColormap.from_list(
    "load", ["#123a8c", "#3d7be0", "#9db4d6", "#c9c9c4", "#e8b27c", "#dd6a26", "#8f1d12"], N=64
)
"""Blue for idle, grey for the fair share, red for twice that or more: a scale that reads in both themes."""
FULL_HEAT = 2.0
"""Load, in fair shares, at the end of the colour scale; fixed, so that layers and runs can be compared."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line of a chart."""

    x: Sequence[float]
    y: Sequence[float]
    label: str = ""
    """What the legend beside the picture says; lines without one are not in it."""
    colour: str = "series-0"
    """Name of a colour of the style sheet, without its leading dashes."""
    is_faint: bool = False
    """Drawn thin and pale behind the others: raw values behind their average."""


@dataclass(frozen=True, kw_only=True)
class Level:
    """A horizontal line to compare with, named at its right end."""

    value: float
    label: str


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A picture with its legend, ready for the page."""

    wide: str
    """SVG for screens."""
    narrow: str
    """The same for phones."""
    legend: tuple[tuple[str, str], ...]
    """Colour name and text of each line."""


def line_chart(
    lines: Sequence[Line],
    *,
    name: str,
    y_label: str,
    x_label: str = "step",
    levels: Sequence[Level] = (),
    y_limits: tuple[float | None, float | None] = (None, None),
    is_logarithmic: bool = False,
    x_is_logarithmic: bool = False,
    is_half: bool = False,
) -> Chart:
    """Draw a chart of lines, over training steps unless `x_label` says otherwise.

    `name` must differ between the charts of a page: the parts of an SVG refer to one another by names that all
    pictures share. `is_half` makes the wide picture fit beside another one.
    """

    def draw(width: int, height: int, variant: str) -> str:
        figure = Figure(figsize=(width / 72, height / 72))
        axes = figure.add_axes((46 / width, 36 / height, 1 - 58 / width, 1 - 62 / height))
        for line in lines:
            draw_line(axes, line)
        dress(axes, x_label=x_label, y_label=y_label, num_x_ticks=5 if width < 480 else 8)
        if is_logarithmic:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=8))
            axes.yaxis.set_minor_formatter(NullFormatter())
        if x_is_logarithmic:
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_locator(LogLocator(base=2, numticks=6 if width < 480 else 12))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_number(value)))
            axes.xaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short_number(value)))
        axes.set_ylim(bottom=y_limits[0], top=y_limits[1])
        draw_levels(axes, levels, height=height)
        return svg_of(figure, name=f"{name}-{variant}")

    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 12.0, "path.simplify": True}):
        wide = draw(430, 250, "wide") if is_half else draw(880, 320, "wide")
        narrow = draw(360, 260, "narrow")
    return Chart(wide=wide, narrow=narrow, legend=tuple((line.colour, line.label) for line in lines if line.label))


def draw_line(axes: Axes, line: Line) -> None:
    """Draw one line; a single point becomes a dot."""
    x, y = condense(np.asarray(line.x, np.float64), y=np.asarray(line.y, np.float64))
    if np.isfinite(y).sum() == 1:
        axes.plot(x, y, marker="o", markersize=4, color=STAND_INS[line.colour], linestyle="none")
        return
    width, opacity = (0.8, 0.35) if line.is_faint else (1.8, 1.0)
    axes.plot(x, y, color=STAND_INS[line.colour], linewidth=width, alpha=opacity, solid_joinstyle="round")


def draw_levels(axes: Axes, levels: Sequence[Level], *, height: int) -> None:
    """Draw the horizontal lines, with names set above their lines or, where two would overlap, below."""
    bottom, top = axes.get_ylim()
    last_place = math.inf
    for level in sorted(levels, key=lambda level: -level.value):
        if not bottom <= level.value <= top:
            continue
        axes.axhline(level.value, color=STAND_INS["muted"], linewidth=1.0, dashes=(4, 3))
        place = (level.value - bottom) / (top - bottom) * height
        is_crowded = last_place - place < 16
        axes.annotate(
            f"{level.label} {level.value:.2f}",
            (1.0, level.value),
            xycoords=("axes fraction", "data"),
            xytext=(-3, -4 if is_crowded else 4),
            textcoords="offset points",
            ha="right",
            va="top" if is_crowded else "bottom",
            color=STAND_INS["muted"],
        )
        last_place = place - (12 if is_crowded else 0)


def dress(axes: Axes, *, x_label: str, y_label: str, num_x_ticks: int) -> None:
    """Give the axes their quiet look: horizontal rules only, no box, labels in the muted ink."""
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(STAND_INS["grid"])
    axes.tick_params(which="both", length=0, colors=STAND_INS["muted"], pad=5)
    axes.grid(axis="y", color=STAND_INS["grid"], linewidth=1.0)
    axes.set_axisbelow(True)
    axes.margins(x=0.01, y=0.08)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=num_x_ticks, integer=True, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_number(value)))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 2.5, 5, 10]))
    axes.set_xlabel(x_label, color=STAND_INS["muted"], loc="right", labelpad=3)
    axes.set_title(y_label, color=STAND_INS["muted"], loc="left", fontsize=12.0, x=0.0, pad=9)


def svg_of(figure: Figure, *, name: str) -> str:
    """Return a figure as an SVG element whose colours and font are the page's."""
    buffer = io.StringIO()
    figure.patch.set_alpha(0.0)
    for axes in figure.axes:
        axes.patch.set_alpha(0.0)
    nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
    FigureCanvasSVG(figure).print_svg(buffer, metadata=nothing)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="(?:figure|axes|patch|line2d|matplotlib\.axis|xtick|ytick|text)_\d+">', "<g>", svg)
    svg = re.sub(r"font: ([0-9.]+)px [^;\"]*", r"font-size: \1px", svg)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = svg.replace('id="', f'id="{name}-').replace("url(#", f"url(#{name}-").replace('href="#', f'href="#{name}-')
    for variable, colour in STAND_INS.items():
        svg = svg.replace(colour, f"var(--{variable})")
    return re.sub(r"\n\s*", "\n", svg)


def condense(x: Values, *, y: Values) -> tuple[Values, Values]:
    """Average a long line in equal runs of points, so that at most `MAX_POINTS` are left; the last stays itself."""
    if len(x) <= MAX_POINTS:
        return x, y
    starts = np.linspace(0, len(x) - 1, MAX_POINTS).astype(int)
    sizes = np.diff(np.append(starts, len(x)))
    return np.add.reduceat(x, starts) / sizes, np.add.reduceat(y, starts) / sizes


def smooth(values: Sequence[float]) -> list[float]:
    """Return a running average over about a fiftieth of the line, centred, narrower at both ends."""
    array = np.asarray(values, np.float64)
    reach = max(len(array) // 100, 1)
    result = []
    for place in range(len(array)):
        near = min(reach, place, len(array) - 1 - place)
        window = array[place - near : place + near + 1]
        window = window[np.isfinite(window)]
        result.append(float(window.mean()) if len(window) else math.nan)
    return result


def heat_image(loads: npt.NDArray[np.float64]) -> str:
    """Return a data URI of the load of experts [time, expert] in fair shares: time to the right, expert 0 on top.

    Points in time beyond `HEAT_COLUMNS` are averaged.
    """
    num_columns = min(len(loads), HEAT_COLUMNS)
    columns = np.stack([part.mean(axis=0) for part in np.array_split(loads, num_columns)])
    pixels = HEAT_COLOURS(np.clip(columns.T / FULL_HEAT, 0.0, 1.0), bytes=True)[:, :, :3]
    buffer = io.BytesIO()
    imsave(buffer, pixels, format="png", metadata={"Software": "dsv3"})
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def heat_legend() -> str:
    """Return the colour scale of `heat_image` as a CSS gradient."""
    stops = [HEAT_COLOURS(place / 10, bytes=True) for place in range(11)]
    return "linear-gradient(to right, " + ", ".join(f"rgb({r} {g} {b})" for r, g, b, _ in stops) + ")"


def short_number(value: int | float) -> str:
    """Write a number as one says it: 950, 12K, 1.5M, 0.04, 3e-05."""
    if not math.isfinite(value):
        return "–"
    size = abs(value)
    if size == 0:
        return "0"
    for limit, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e4, "K")):
        if size >= limit:
            scale = 1e3 if suffix == "K" else limit
            return f"{value / scale:.3g}{suffix}" if size / scale < 1000 else f"{value / scale:.0f}{suffix}"
    if size >= 100:
        return f"{value:.0f}"
    return f"{value:.3g}" if size >= 1e-3 else f"{value:.1e}".replace("e-0", "e-")
