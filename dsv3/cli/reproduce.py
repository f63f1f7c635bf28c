"""dsv3 reproduce: tables and figures of the report, made again in small."""

import json
from pathlib import Path
from typing import Annotated

import typer

from dsv3.cli.columns import aligned
from dsv3.errors import ConfigError
from dsv3.reproduce.catalogue import EXPERIMENTS, find
from dsv3.reproduce.experiment import Experiment

SCALES = ("small", "full")


def register(app: typer.Typer) -> None:
    """Add the verb to the command line."""
    app.command("reproduce")(reproduce)


def reproduce(
    names: Annotated[list[str] | None, typer.Argument(metavar="[NAME]...", help=f"{', '.join(EXPERIMENTS)}.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="All of them, one after the other.")] = False,
    show: Annotated[bool, typer.Option("--list", help="Say what there is, and about how long each takes.")] = False,
    seeds: Annotated[
        int | None, typer.Option(min=1, help="Repetitions of each training run; as --list says when left out.")
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(min=1, help="Of each training run; as --list says when left out.")
    ] = None,
    scale: Annotated[
        str, typer.Option(metavar="SCALE", help="small runs it here; full writes settings and commands for a cluster.")
    ] = "small",
    root: Annotated[Path, typer.Option("--runs", metavar="FOLDER", help="For what is made.")] = Path("runs/reproduce"),
    page: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a page (Markdown) of all that has been made.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the records as one JSON object.")] = False,
) -> None:
    """Make tables and figures of the report again in small, and say whether they come out as published.

    Each NAME writes result.json and pictures into runs/reproduce/NAME, with a verdict: what the report says, what was
    seen, and the spread over seeds. A run that was stopped goes on with the same command.
    """
    if scale not in SCALES:
        raise ConfigError(f"--scale {scale}; use {' or '.join(SCALES)}")
    wanted = [find(name) for name in names or []]
    if everything and wanted:
        raise ConfigError("--all runs all of them; leave out the names, or --all")
    wanted = list(EXPERIMENTS.values()) if everything else wanted
    if show:
        typer.echo(listing())
        return
    if not wanted and page is None:
        raise ConfigError(f"which one? There are {', '.join(EXPERIMENTS)}; --all runs all, --list tells more")
    if scale == "full":
        _write_full(wanted, root=root)
        return
    _run([one.name for one in wanted], root=root, seeds=seeds, tokens=tokens, as_json=as_json)
    if page is not None:
        from dsv3.reproduce.page import write_page

        made = write_page(page, root=root)
        typer.echo(f"{page} has {len(made)} of {len(EXPERIMENTS)} experiments: {', '.join(made)}", err=as_json)


def listing() -> str:
    """Return a line for each experiment."""
    rows = [("name", "report", "seeds", "tokens a run", "minutes")]
    for one in EXPERIMENTS.values():
        cells = (str(one.seeds or ""), f"{one.tokens:,}" if one.tokens else "", f"{one.minutes:g}")
        rows.append((one.name, one.source, *cells))
    return "\n".join(aligned(rows))


def _run(names: list[str], *, root: Path, seeds: int | None, tokens: int | None, as_json: bool) -> None:
    from dsv3.reproduce.running import reproduce as run_one
    from dsv3.reproduce.running import verdict_text

    records = {}
    for name in names:
        # Of several, those that draw nothing have no use for --seeds; of one alone that is a mistake, and told.
        experiment, alone = find(name), len(names) == 1
        records[name] = run_one(
            experiment,
            root=root,
            seeds=seeds if alone or experiment.seeds else None,
            tokens=tokens if alone or experiment.tokens else None,
            tell=lambda line: typer.echo(line, err=True),
        )
        if not as_json:
            typer.echo(verdict_text(records[name]) + f"\n  {root / name}\n")
    if as_json:
        typer.echo(json.dumps(records, indent=2))


def _write_full(wanted: list[Experiment], *, root: Path) -> None:
    from dsv3.reproduce.full_scale import full_scale_text

    for one in wanted:
        typer.echo(full_scale_text(one.name, folder=root / one.name / "full") + "\n")
