"""dsv3 pretrain: train a recipe in a run folder, and go on with it when called again."""

import shlex
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dsv3.cli.run_settings import (
    ConfigOption,
    DataOption,
    MoreData,
    RecipeArgument,
    RunOption,
    RunSettings,
    SetOption,
    run_settings,
)
from dsv3.errors import ConfigError
from dsv3.runtime.rank import is_main_rank, num_ranks

if TYPE_CHECKING:
    from dsv3.model.transformer import Transformer
    from dsv3.train.event import TrainEvent
    from dsv3.train.loop import PretrainResult

INTERRUPTED = 130
"""Exit status of a run that a signal has ended, as shells have it for Ctrl-C."""


def register(app: typer.Typer) -> None:
    """Add the verb to the command line."""
    app.command("pretrain")(pretrain)


def pretrain(
    recipe: RecipeArgument = None,
    more_data: MoreData = None,
    run: RunOption = None,
    data: DataOption = None,
    assignments: SetOption = None,
    config: ConfigOption = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only print what each rank would hold, for as many as --ranks says.")
    ] = False,
    ranks: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="With --dry-run: ranks there would be; left out, this one.")
    ] = None,
) -> None:
    """Train a recipe from text to an exported model.

    Prepares the corpus, trains, validates and saves as the settings say. Ctrl-C finishes the step at hand and saves;
    the same command goes on from the newest snapshot, as does `dsv3 pretrain --run FOLDER`.

    On many ranks: torchrun --nproc-per-node N --no-python -- dsv3 pretrain ..., all of which see the same run folder.
    """
    wanted = run_settings(recipe, more_data=more_data, run=run, data=data, config_file=config, assignments=assignments)
    if dry_run:
        from dsv3.cli.dry_run import describe_plan

        typer.echo(describe_plan(wanted.config, ranks=ranks or num_ranks()))
        return
    if ranks is not None:
        raise ConfigError("--ranks is for --dry-run; how many ranks train is torchrun's to say: --nproc-per-node N")
    try:
        result = train(wanted)
    except KeyboardInterrupt:
        typer.echo(f"stopped at once; {how_to_go_on(wanted.folder)}", err=True)
        raise
    if not is_main_rank():
        return
    if result.interrupted:
        typer.echo(f"stopped and saved after step {result.step:,}; {how_to_go_on(wanted.folder)}", err=True)
        raise typer.Exit(INTERRUPTED)
    typer.echo(closing_words(result))


def train(wanted: RunSettings) -> "PretrainResult":
    """Train with a view of it: a picture in a terminal, lines elsewhere."""
    from rich.console import Console

    from dsv3.cli.progress import Progress, StageState, shown
    from dsv3.train.loop import pretrain

    progress = Progress(
        title=f"dsv3 pretrain: {wanted.config.recipe or 'run'}, in {wanted.folder}",
        stages=[
            StageState(name="corpus", title="Corpus and tokenizer"),
            StageState(name="train", title="Pre-training"),
            StageState(name="export", title="Export"),
        ],
        total_tokens=wanted.config.total_tokens,
    )

    def follow(event: "TrainEvent") -> None:
        running = progress.running
        if running is None or running.name != event.stage:
            if running is not None:
                progress.finish(running.name)
            progress.start(event.stage)
        progress.train(event)

    with shown(progress, console=Console(quiet=not is_main_rank())):
        try:
            result = pretrain(wanted.config, folder=wanted.folder, on_event=follow, sampler=greedy_sampler(wanted))
        except BaseException:
            if progress.running is not None:
                progress.stop(progress.running.name)
            raise
        if progress.running is not None:
            close = progress.finish if result.finished else progress.stop
            close(progress.running.name)
    return result


SAMPLE_CACHE_TOKENS = 4096
"""Room for a prompt that validation continues, and for what follows it."""


def greedy_sampler(wanted: RunSettings) -> "Callable[[Transformer, str], str]":
    """Return what continues the prompts at each validation: always the likeliest token, so that steps compare."""
    from dsv3.data.tokenizer import Tokenizer
    from dsv3.infer.loaded import LoadedModel
    from dsv3.infer.runner import TorchRunner

    @cache
    def tokenizer() -> Tokenizer:
        return Tokenizer.from_file(wanted.folder / "corpus" / "tokenizer")

    def sample(model: "Transformer", prompt: str) -> str:
        loaded = LoadedModel(
            TorchRunner(model),
            tokenizer=tokenizer(),
            source=str(wanted.folder),
            is_base=True,
            trained_length=wanted.config.batch.sequence_length,
            cache_tokens=min(model.config.max_position_embeddings, SAMPLE_CACHE_TOKENS),
        )
        return loaded.generate(prompt, max_tokens=wanted.config.evaluation.sample_tokens, temperature=0.0)

    return sample


def how_to_go_on(folder: Path) -> str:
    """Say which command goes on."""
    return f"go on with the same command, or with: dsv3 pretrain --run {shlex.quote(str(folder))}"


def closing_words(result: "PretrainResult") -> str:
    """Say what there is now, and what can be done with it."""
    quality = "" if result.validation is None else f", {result.validation.bits_per_byte:.3f} bits per held-out byte"
    folder = shlex.quote(str(result.folder))
    return (
        f"finished after {result.step:,} steps and {result.tokens:,} tokens{quality}\n"
        f"the model:       {result.export}\n"
        f"talk to it:      dsv3 chat {folder}\n"
        f"see how it went: dsv3 report {folder}"
    )
