"""dsv3 sft: teach a base model to answer, from conversations."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from dsv3.cli.pretrain import INTERRUPTED
from dsv3.cli.run_settings import SetOption
from dsv3.config import PretrainConfig
from dsv3.config.files import read_config, read_json
from dsv3.config.override import apply_overrides
from dsv3.config.published import model_config_from_published
from dsv3.config.teaching import SftConfig
from dsv3.errors import ConfigError
from dsv3.runtime.rank import is_main_rank

TELL_EVERY_STEPS = 10
BaseArgument = Annotated[
    Path, typer.Argument(metavar="BASE", help="A run, or a model in the published format, to begin with.")
]


def register(app: typer.Typer) -> None:
    """Add the verb to the command line."""
    app.command("sft")(sft)


def sft(
    base: BaseArgument,
    data: Annotated[
        list[str],
        typer.Option(
            "--data",
            metavar="PATH",
            help="Conversations: .jsonl, .jsonl.gz or .parquet with messages, prompt and completion, or ShareGPT's "
            "conversations; or hf://NAME. Again for more.",
        ),
    ],
    run: Annotated[Path | None, typer.Option("--run", metavar="FOLDER", help="[default: BASE/sft]")] = None,
    epochs: Annotated[int, typer.Option(min=1, help="Times that all is read.")] = 2,
    learning_rate: Annotated[float, typer.Option(min=0.0, help="At the beginning; a cosine leads from it.")] = 5e-6,
    final_rate: Annotated[float, typer.Option(min=0.0, help="At the end.")] = 1e-6,
    rows: Annotated[int, typer.Option(min=1, help="Packed rows of a step.")] = 8,
    length: Annotated[int, typer.Option(min=0, help="Tokens of a row. [default: the base's]")] = 0,
    too_long: Annotated[str, typer.Option(help="What happens to longer conversations: drop or cut.")] = "drop",
    train_prompts: Annotated[bool, typer.Option(help="Train on what was asked, too.")] = False,
    held_out: Annotated[float, typer.Option(help="Share of the conversations that is scored, not trained.")] = 0.0,
    assignments: SetOption = None,
) -> None:
    """Fine-tune on conversations: answers are trained, several conversations share a row and do not see each other.

    Rates and epochs are the report's (5.1); what it leaves open is an option, or a setting of the base that --set
    changes. Called again, it goes on where it was stopped.
    """
    lesson = SftConfig(
        data=tuple(data),
        epochs=epochs,
        rows_per_step=rows,
        too_long=too_long,
        train_prompts=train_prompts,
        held_out_rate=held_out,
    )
    from dsv3.posttrain.sft import sft as teach
    from dsv3.posttrain.sft import sft_settings

    start = settings_of(base)
    if length:
        start = replace(start, batch=replace(start.batch, sequence_length=length))
    config = sft_settings(start, lesson=lesson, start_from=base, peak=learning_rate, floor=final_rate)
    config = apply_overrides(config, assignments=assignments or [])
    result = teach(config, lesson=lesson, folder=run or base / "sft", on_record=tell)
    if not is_main_rank():
        return
    typer.echo(result.rows.told())
    if result.interrupted:
        typer.echo(f"stopped and saved after step {result.step:,}; the same command goes on", err=True)
        raise typer.Exit(INTERRUPTED)
    typer.echo(
        f"finished after {result.step:,} steps\nthe model:  {result.export}\ntalk to it: dsv3 chat {result.folder}"
    )


def settings_of(base: Path) -> PretrainConfig:
    """Return the settings that a base was trained with; of a model in the published format, what it is and defaults.

    Raises:
        ConfigError: the folder is neither.
    """
    if not (base / "config.json").is_file():
        raise ConfigError(f"{base} is neither a run nor a model: it has no config.json")
    values = read_json(base / "config.json")
    if isinstance(values.get("model"), dict):
        return read_config(base / "config.json")
    model, _ = model_config_from_published(values)
    start = PretrainConfig()
    length = min(start.batch.sequence_length, model.max_position_embeddings)
    return PretrainConfig(model=model, batch=replace(start.batch, sequence_length=length))


def tell(record: dict[str, Any]) -> None:
    """Say how it goes, every few steps."""
    if not is_main_rank():
        return
    if record["kind"] == "step" and (record["step"] == 1 or record["step"] % TELL_EVERY_STEPS == 0):
        rate, loss = record["learning_rate"], record["loss"]
        typer.echo(
            f"step {record['step']:,}: loss {loss:.3f}, rate {rate:.2g}, {record['tokens_per_second']:,.0f} tokens/s"
        )
    elif record["kind"] == "sft":
        typer.echo(f"step {record['step']:,}: held-out loss {record['held_out_loss']:.3f}")
