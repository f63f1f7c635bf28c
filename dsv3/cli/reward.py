"""dsv3 reward: teach a model what answers are worth, from pairs of which one is preferred."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from dsv3.cli.pretrain import INTERRUPTED
from dsv3.cli.run_settings import SetOption
from dsv3.cli.sft import BaseArgument, settings_of
from dsv3.cli.sft import tell as tell_step
from dsv3.config.override import apply_overrides
from dsv3.config.teaching import RewardConfig
from dsv3.runtime.rank import is_main_rank

DEFAULTS = RewardConfig()


def register(app: typer.Typer) -> None:
    """Add the verb to the command line."""
    app.command("reward")(reward)


def reward(
    base: BaseArgument,
    data: Annotated[
        list[str],
        typer.Option(
            "--data",
            metavar="PATH",
            help="Pairs: .jsonl, .jsonl.gz or .parquet with prompt, chosen and rejected, each a text or a list of "
            "messages; or hf://NAME. Again for more.",
        ),
    ],
    run: Annotated[Path | None, typer.Option("--run", metavar="FOLDER", help="[default: BASE/reward]")] = None,
    epochs: Annotated[int, typer.Option(min=1, help="Times that all is read.")] = DEFAULTS.epochs,
    learning_rate: Annotated[float, typer.Option(min=0.0, help="At the beginning; a cosine leads from it.")] = 5e-6,
    final_rate: Annotated[float, typer.Option(min=0.0, help="At the end.")] = 1e-6,
    pairs: Annotated[int, typer.Option(min=1, help="Of a step.")] = DEFAULTS.rows_per_step,
    length: Annotated[int, typer.Option(min=0, help="Tokens of an answer. [default: the base's row]")] = 0,
    held_out: Annotated[float, typer.Option(help="Share of the pairs that is judged, not trained.")] = 0.0,
    assignments: SetOption = None,
) -> None:
    """Train a reward model: of two answers the chosen one is to be worth more. `dsv3 grpo --reward model:RUN` uses it.

    V3 publishes no numbers for this; rates are those of fine-tuning. Called again, it goes on where it was stopped.
    """
    lesson = RewardConfig(data=tuple(data), epochs=epochs, rows_per_step=pairs, held_out_rate=held_out)
    from dsv3.posttrain.reward_model import reward_settings, teach_reward

    start = settings_of(base)
    if length:
        start = replace(start, batch=replace(start.batch, sequence_length=length))
    config = reward_settings(start, lesson=lesson, start_from=base, peak=learning_rate, floor=final_rate)
    config = apply_overrides(config, assignments=assignments or [])
    result = teach_reward(config, lesson=lesson, folder=run or base / "reward", on_record=tell)
    if not is_main_rank():
        return
    typer.echo(
        f"{len(result.rows.rows):,} pairs trained on, {len(result.rows.held_out) // 2:,} held out, "
        f"{len(result.rows.dropped):,} longer than a row and dropped"
    )
    if result.interrupted:
        typer.echo(f"stopped and saved after step {result.step:,}; the same command goes on", err=True)
        raise typer.Exit(INTERRUPTED)
    typer.echo(f"finished after {result.step:,} steps\nuse it:     dsv3 grpo BASE --reward model:{result.folder}=1")


def tell(record: dict[str, Any]) -> None:
    """Say how it goes, every few steps."""
    if record["kind"] == "reward" and is_main_rank():
        typer.echo(f"step {record['step']:,}: {record['held_out_accuracy']:.1%} of held-out pairs in the right order")
    else:
        tell_step(record)
