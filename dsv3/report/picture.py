"""A figure by itself, as a PNG file."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dsv3.errors import ConfigError


@contextmanager
def picture(file: Path, *, width: float, height: float, dpi: int = 150) -> Iterator[Figure]:
    """Give a figure of so many inches to draw on, and write it at the end.

    Raises:
        ConfigError: the file cannot be written.
    """
    with rc_context({"font.size": 8, "font.family": "DejaVu Sans"}):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        yield figure
        try:
            figure.savefig(file, format="png", dpi=dpi)
        except OSError as error:
            raise ConfigError(f"the picture cannot be written to {file}: {error.strerror or error}") from error
