"""dsv3 data: corpora from raw text at any size, and what is in a training step."""

import os
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dsv3.cli.columns import aligned
from dsv3.cli.group import add_group
from dsv3.config.curation import CurationConfig, InputConfig
from dsv3.config.files import from_dict, read_json
from dsv3.config.override import apply_overrides
from dsv3.errors import ConfigError
from dsv3.recipes.curation import curation_by_name, curation_names

if TYPE_CHECKING:
    from dsv3.data.curation.cluster import ClusterOptions
    from dsv3.data.curation.evaluation_items import EvaluationItem

EXECUTORS = ("local", "slurm", "ray")
NAMED = re.compile(r"([A-Za-z0-9._-]+)=(.+)")


def register(app: typer.Typer) -> None:
    """Add the verbs to the command line."""
    group = add_group(app, name="data", told="Prepare a corpus of any size, and look into it.")
    group.command("prepare")(prepare)
    group.command("card")(card)
    group.command("trace")(trace)


def prepare(
    output: Annotated[Path, typer.Option(metavar="FOLDER", help="Where the corpus goes.")],
    inputs: Annotated[
        list[str] | None,
        typer.Option(
            "--input",
            metavar="[NAME=]PATH",
            help="A file, folder or pattern, here or at s3://, gs://, hf://; may be repeated, earlier ones win.",
        ),
    ] = None,
    recipe: Annotated[str, typer.Argument(metavar="[RECIPE]", help=", ".join(curation_names()))] = "mixed",
    tokenizer: Annotated[
        str, typer.Option(metavar="PATH", help="A tokenizer.json or its folder; trained when left out.")
    ] = "",
    eval_data: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Drop what has a question of the benchmarks in this folder.")
    ] = None,
    eval_files: Annotated[
        list[Path] | None,
        typer.Option("--eval-file", metavar="FILE", help="Drop what has a text of this file; may be repeated."),
    ] = None,
    executor: Annotated[str, typer.Option(help="local, slurm or ray.")] = "local",
    workers: Annotated[
        int, typer.Option(min=0, help="Tasks at a time; 0 takes every core, or all there is room for.")
    ] = 0,
    partition: Annotated[str, typer.Option(help="Slurm's partition.")] = "",
    time: Annotated[str, typer.Option(help="Slurm's limit for a task.")] = "20:00:00",
    memory: Annotated[int, typer.Option(min=1, metavar="GB", help="Of each task, on a cluster.")] = 4,
    activate: Annotated[str, typer.Option(metavar="COMMAND", help="What Slurm runs before a task.")] = "",
    assignments: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Change a setting, such as quality.min_words=50."),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Settings from work/settings.json of another corpus.")
    ] = None,
) -> None:
    """Read, mend, judge, mask, decontaminate, deduplicate and tokenise text of any size.

    Stopped or killed, the same command goes on and ends with the same bytes. Train on it with
    `dsv3 pretrain RECIPE --data FOLDER`.
    """
    from dsv3.data.curation.cluster import ClusterOptions

    if executor not in EXECUTORS:
        raise ConfigError(f"--executor {executor}; choose one of {', '.join(EXECUTORS)}")
    if executor != "slurm" and (partition or activate):
        raise ConfigError("--partition and --activate are for --executor slurm")
    wanted = settings(recipe, inputs=inputs or [], tokenizer=tokenizer, config=config, assignments=assignments or [])
    absent: list[str] = []
    items = _items(eval_data, files=eval_files or [], absent=absent)
    if executor == "local":
        _locally(wanted, output=output, items=items, workers=workers)
    else:
        options = ClusterOptions(
            workers=workers or -1, partition=partition, time=time, memory_gb=memory, activate=activate
        )
        _on_cluster(wanted, output=output, items=items, executor=executor, options=options)
    if absent:
        typer.echo(f"not in {eval_data}, so not looked for: {', '.join(absent)}")


def settings(
    recipe: str, *, inputs: list[str], tokenizer: str, config: Path | None, assignments: list[str]
) -> CurationConfig:
    """Return the settings of a recipe or a file, changed as asked.

    Raises:
        ConfigError: an unknown recipe or setting, or two inputs of one name.
    """
    base = from_dict(CurationConfig, read_json(config)) if config else curation_by_name(recipe)
    if inputs:
        base = replace(base, inputs=tuple(_named(inputs)))
    if tokenizer:
        base = replace(base, tokens=replace(base.tokens, tokenizer=_absolute(tokenizer)))
    return apply_overrides(base, assignments=assignments)


def _named(inputs: list[str]) -> Iterator[InputConfig]:
    for given in inputs:
        match = NAMED.fullmatch(given)
        name, path = (match[1], match[2]) if match and not Path(given).exists() else ("", given)
        last = path.rstrip("/").rsplit("/", 1)[-1]
        yield InputConfig(
            name=name or re.sub(r"[^A-Za-z0-9._-]+", "-", last).strip("-") or "root", path=_absolute(path)
        )


def _absolute(path: str) -> str:
    return path if "://" in path else str(Path(path).expanduser().absolute())


def _items(data: Path | None, *, files: list[Path], absent: list[str]) -> "Iterator[EvaluationItem]":
    """Yield what evaluations ask; nothing is read before the first is asked for."""
    from dsv3.data.curation.evaluation_items import items_of_file
    from dsv3.evals.asked import asked_items

    if data is not None:
        if not data.is_dir():
            raise ConfigError(
                f"{data} is no folder; --eval-data takes the one in which the folders of the benchmarks lie"
            )
        yield from asked_items(data, absent=absent)
    for file in files:
        yield from items_of_file(file)


def _locally(config: CurationConfig, *, output: Path, items: "Iterator[EvaluationItem]", workers: int) -> None:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

    from dsv3.data.curation.pipeline import curate

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console) as progress:
        shown: dict[str, TaskID] = {}

        def told(stage: str, done: int, total: int) -> None:
            if stage not in shown:
                shown[stage] = progress.add_task(stage, total=total)
            progress.update(shown[stage], completed=done)

        curate(config, output=output, items=items, workers=workers or _cores(), progress=told)
    _tell(output)


def _tell(output: Path) -> None:
    """Say what a finished corpus is made of."""
    from dsv3.report.data_card import write_card

    page = write_card(output)
    for line in composition(output):
        typer.echo(line)
    typer.echo(f"what was dropped and why: {page}")


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _on_cluster(
    config: CurationConfig,
    *,
    output: Path,
    items: "Iterator[EvaluationItem]",
    executor: str,
    options: "ClusterOptions",
) -> None:
    from dsv3.data.curation.cluster import run_on_ray, submit_to_slurm
    from dsv3.data.curation.pipeline import WORK, begin, stages
    from dsv3.runtime.hold import hold_folder

    with hold_folder(output, lock=".lock", doing="preparing a corpus", option="--output"):
        tasks = begin(config, output=output, items=items)
        if tasks is not None:
            wanted = stages(config, folder=(output / WORK).absolute(), tasks=tasks)
            if executor == "slurm":
                jobs = submit_to_slurm(wanted, output=output.absolute(), options=options)
                typer.echo("submitted " + ", ".join(jobs) if jobs else "every stage is done")
                typer.echo(f"at the end: dsv3 data card {output}; after a failure, the same command goes on")
                return
            run_on_ray(wanted, output=output.absolute(), options=options)
    _tell(output)


def composition(output: Path) -> list[str]:
    """Return lines that tell what a prepared corpus is made of."""
    from dsv3.data.prepared import load_prepared

    corpus = load_prepared(output)
    lines = [f"{output}: vocabulary of {corpus.vocab_size:,}"]
    for source in corpus.sources:
        lines.append(
            f"  {source.name}: {source.documents:,} documents, {source.bytes / 1e6:,.1f} MB, {source.tokens:,} tokens; "
            f"{source.held_out_documents:,} held out for validation"
        )
    return lines


def card(
    output: Annotated[Path, typer.Argument(metavar="FOLDER", help="A corpus of dsv3 data prepare.")],
) -> None:
    """Write the data card of a corpus: `data_card.html`, from `data_card.json`."""
    from dsv3.report.data_card import write_card

    typer.echo(str(write_card(output)))


def trace(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")],
    step: Annotated[int, typer.Option(min=1, help="An optimizer step, counted from 1.")],
    rank: Annotated[int, typer.Option(min=0, help="Of several ranks of data, the rows of this one.")] = 0,
    ranks: Annotated[int, typer.Option(min=1, help="How many of them there are; 1 lists all rows.")] = 1,
) -> None:
    """List the documents of a training step, in the order of its rows: what lies behind a spike."""
    from dsv3.train.traced import rows_of_step

    if rank >= ranks:
        raise ConfigError(f"--rank {rank} of --ranks {ranks}; ranks count from 0")
    rows = [("row", "source", "document", "first token", "tokens")]
    for number, (row, places) in enumerate(rows_of_step(run, step=step)):
        for place in places if number % ranks == rank else ():
            rows.append((str(row), place.source, place.document, str(place.offset), str(place.length)))
    typer.echo("\n".join(aligned(rows)))
