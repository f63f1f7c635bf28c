"""Needles in a haystack as a picture: found or not, by length and depth, as the report's Figure 8."""

from pathlib import Path

from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from dsv3.errors import ConfigError
from dsv3.evals.needle import NeedleResult

COLOURS = LinearSegmentedColormap.from_list("found", ["#b2182b", "#f7f7f7", "#4393c3"])
"""From none to all, apart for eyes that do not tell red from green."""


def draw_needles(result: NeedleResult, *, file: Path, title: str) -> None:
    """Write a PNG.

    Raises:
        ConfigError: the file cannot be written.
    """
    scores = {(cell.length, cell.depth): cell.score for cell in result.cells}
    grid = [[scores[length, depth] for length in result.lengths] for depth in result.depths]
    with rc_context({"font.size": 8, "font.family": "DejaVu Sans"}):
        figure = Figure(
            figsize=(1.8 + 0.42 * len(result.lengths), 1.6 + 0.26 * len(result.depths)), layout="constrained"
        )
        axes = figure.add_subplot()
        image = axes.imshow(grid, cmap=COLOURS, vmin=0, vmax=1, aspect="auto")
        axes.set_xticks(
            range(len(result.lengths)), [f"{length:,}" for length in result.lengths], rotation=45, ha="right"
        )
        axes.set_yticks(range(len(result.depths)), [f"{depth:.0%}" for depth in result.depths])
        axes.set_xlabel("tokens")
        axes.set_ylabel("depth of the needle")
        axes.set_title(f"{title}: {result.score:.1%} found")
        figure.colorbar(image, ax=axes, label="share of the needles that were found")
        FigureCanvasAgg(figure)
        try:
            figure.savefig(file, format="png", dpi=150)
        except OSError as error:
            raise ConfigError(f"the picture cannot be written to {file}: {error.strerror or error}") from error
