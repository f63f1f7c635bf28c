"""dsv3 extend: lengthen the context of a finished run, phase by phase."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from dsv3.cli.pretrain import INTERRUPTED, closing_words, train
from dsv3.cli.run_settings import RunSettings, SetOption
from dsv3.config import PretrainConfig
from dsv3.config.files import read_config
from dsv3.config.override import apply_overrides
from dsv3.errors import ConfigError
from dsv3.recipes.extension import STEPS, extension
from dsv3.runtime.rank import is_main_rank
from dsv3.train.run_folder import lend_corpus

ROWS_COMPARED = 8
"""Long rows that are read before and after."""


def register(app: typer.Typer) -> None:
    """Add the verb to the command line."""
    app.command("extend")(extend)


def extend(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run that has finished.")],
    lengths: Annotated[
        str, typer.Option(metavar="N,N", help="Tokens of a row in each phase; 8 and 32 times the run's when left out.")
    ] = "",
    steps: Annotated[int, typer.Option(min=1, help="Steps of each phase.")] = STEPS,
    learning_rate: Annotated[
        float, typer.Option(min=0.0, help="Of all steps; the last one of the run when left out.")
    ] = 0.0,
    assignments: SetOption = None,
) -> None:
    """Train on over longer rows with YaRN, as the report does: 4K to 32K, then to 128K.

    Each phase is a run of its own in RUN/extended-LENGTH, with the run's corpus, and starts from the weights of the one
    before it. Called again, it goes on where it was stopped; phases that are finished are passed over. Then all of them
    read the same long rows of held-out text, and the run's report shows the perplexity at each distance.
    """
    if not (run / "config.json").is_file():
        raise ConfigError(f"{run} is no run folder: it has no config.json; train one with dsv3 pretrain")
    config = read_config(run / "config.json")
    if not (run / "export" / "config.json").is_file():
        raise ConfigError(f"the run in {run} has not finished; go on with: dsv3 pretrain --run {run}")
    try:
        wanted = tuple(int(length) for length in lengths.split(",") if length)
    except ValueError:
        raise ConfigError(f"--lengths {lengths}; give whole numbers, as in --lengths 2048,8192") from None
    phases = extension(config, lengths=wanted, steps=steps, learning_rate=learning_rate)
    settings = phase_settings(run, phases=phases, assignments=assignments or [])
    for phase in settings:
        result = train(phase)
        if not is_main_rank():
            continue
        if result.interrupted:
            typer.echo(
                f"stopped and saved after step {result.step:,} of {phase.folder}; the same command goes on", err=True
            )
            raise typer.Exit(INTERRUPTED)
        typer.echo(closing_words(result))
    if is_main_rank():
        from dsv3.evals.extension import compare_phases

        folders = [phase.folder for phase in settings]
        compare_phases(run, phases=folders, rows=ROWS_COMPARED, device=config.runtime.device)
        typer.echo(f"before and after: dsv3 report {run}")


def phase_settings(run: Path, *, phases: Sequence[PretrainConfig], assignments: list[str]) -> list[RunSettings]:
    """Return the phases as runs, each with a folder that has the run's corpus, each beginning where the last ends."""
    settings: list[RunSettings] = []
    for phase in phases:
        before = settings[-1].folder if settings else run
        config = apply_overrides(replace(phase, start_from=str(before.absolute())), assignments=assignments)
        folder = run / f"extended-{phase.batch.sequence_length}"
        if is_main_rank():
            # Its own, which is prepared for any length of rows.
            lend_corpus(Path("..") / "corpus", folder=folder)
        settings.append(RunSettings(config=config, folder=folder))
    return settings
