"""Load of each expert on each kind of text as a picture, as the report's Figure 9."""

from collections.abc import Sequence
from pathlib import Path

from dsv3.evals.specialisation import DomainLoad
from dsv3.report.picture import picture

HIGHEST = 10.0
"""Times an even share, of the darkest colour in Figure 9; a model with few experts reaches less."""
MOST_LAYERS = 8


def draw_loads(loads: Sequence[DomainLoad], *, layers: Sequence[int], most: float, file: Path, title: str) -> None:
    """Write a PNG: a panel a layer, a row a domain, a column an expert. `most` is what one expert can have at most.

    Of more than eight layers, eight are shown, from the first to the last.

    Raises:
        ConfigError: the file cannot be written.
    """
    places = _spread(len(layers), most=MOST_LAYERS)
    experts = len(loads[0].relative[0])
    width, height = 2.6 + min(10.0, max(3.0, 0.12 * experts)), 0.7 + len(places) * (0.45 + 0.16 * len(loads))
    with picture(file, width=width, height=height) as figure:
        panels = figure.subplots(len(places), 1, sharex=True, squeeze=False)[:, 0]
        for axes, place in zip(panels, places, strict=True):
            image = axes.imshow(
                [load.relative[place] for load in loads], cmap="Blues", vmin=0, vmax=min(HIGHEST, most), aspect="auto"
            )
            axes.set_yticks(range(len(loads)), [load.name for load in loads])
            axes.set_title(f"layer {layers[place]}", loc="left", fontsize=7)
        panels[-1].set_xlabel("expert")
        figure.suptitle(title)
        figure.colorbar(image, ax=list(panels), label="load, in even shares")


def _spread(count: int, *, most: int) -> list[int]:
    """Return up to `most` places of `count`, evenly apart, the first and the last among them."""
    if count <= most:
        return list(range(count))
    return [round(place * (count - 1) / (most - 1)) for place in range(most)]
