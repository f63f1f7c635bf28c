"""dsv3 report: one page on a training run."""

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add the verb to the command line."""
    app.command("report")(report)


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, finished or not, such as runs/quickstart.")],
) -> None:
    """Write report.html into a run folder: curves, expert load, corpus, samples and settings on one page."""
    from dsv3.report.page import write_report

    typer.echo(write_report(run))
