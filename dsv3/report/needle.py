"""Needles in a haystack as a picture: found or not, by length and depth, as the report's Figure 8."""

from pathlib import Path

from matplotlib.colors import LinearSegmentedColormap

from dsv3.evals.needle import NeedleResult
from dsv3.report.picture import picture

COLOURS = LinearSegmentedColormap.from_list("found", ["#b2182b", "#f7f7f7", "#4393c3"])
"""From none to all, apart for eyes that do not tell red from green."""
LEAST_HEIGHT = 2.4
"""Inches, so that the scale beside the grid can be read."""


def draw_needles(result: NeedleResult, *, file: Path, title: str) -> None:
    """Write a PNG.

    Raises:
        ConfigError: the file cannot be written.
    """
    width, height = 2.2 + 0.42 * len(result.lengths), max(LEAST_HEIGHT, 1.6 + 0.26 * len(result.depths))
    scores = {(cell.length, cell.depth): cell.score for cell in result.cells}
    grid = [[scores[length, depth] for length in result.lengths] for depth in result.depths]
    with picture(file, width=width, height=height) as figure:
        axes = figure.add_subplot()
        image = axes.imshow(grid, cmap=COLOURS, vmin=0, vmax=1, aspect="auto")
        axes.set_xticks(
            range(len(result.lengths)), [f"{length:,}" for length in result.lengths], rotation=45, ha="right"
        )
        axes.set_yticks(range(len(result.depths)), [f"{depth:.0%}" for depth in result.depths])
        axes.set_xlabel("tokens")
        axes.set_ylabel("depth of the needle")
        axes.set_title(f"{title}: {result.score:.1%} found")
        figure.colorbar(image, ax=axes, label="needles found", format="{x:.0%}")
