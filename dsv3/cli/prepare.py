"""dsv3 prepare: the corpus of a run and its tokenizer, without training."""

from typing import TYPE_CHECKING

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

if TYPE_CHECKING:
    from dsv3.data.document import Remark
    from dsv3.data.prepared import PreparedCorpus


def register(app: typer.Typer) -> None:
    """Add the verb to the command line."""
    app.command("prepare")(prepare)


def prepare(
    recipe: RecipeArgument = None,
    more_data: MoreData = None,
    run: RunOption = None,
    data: DataOption = None,
    assignments: SetOption = None,
    config: ConfigOption = None,
) -> None:
    """Read the text, train the tokenizer and write token shards; `dsv3 pretrain` then begins with the first step.

    Says what was read, what was skipped and why. Stopped, the same command goes on.
    """
    from dsv3.report.data_card import CARD, write_card

    wanted = run_settings(recipe, more_data=more_data, run=run, data=data, config_file=config, assignments=assignments)
    corpus = build(wanted)
    for line in composition(corpus):
        typer.echo(line)
    if (corpus.folder / CARD).is_file():  # A corpus of `dsv3 data prepare` has its own, beside its shards.
        typer.echo(f"what became of every document: {write_card(corpus.folder)}")


def build(wanted: RunSettings) -> "PreparedCorpus":
    """Prepare the corpus with a view of it."""
    from rich.console import Console

    from dsv3.cli.progress import Progress, StageState, shown
    from dsv3.data.prepare import prepare_corpus
    from dsv3.train.run_folder import open_run_folder

    stages = [StageState(name="corpus", title="Corpus and tokenizer")]
    progress = Progress(title=f"dsv3 prepare: {wanted.config.recipe or 'run'}, in {wanted.folder}", stages=stages)
    with open_run_folder(wanted.folder, config=wanted.config), shown(progress, console=Console()):
        progress.start("corpus")
        try:
            corpus = prepare_corpus(wanted.config, folder=wanted.folder / "corpus", progress=progress.count)
        except BaseException:
            progress.stop("corpus")
            raise
        progress.finish("corpus")
    return corpus


def composition(corpus: "PreparedCorpus") -> list[str]:
    """Return lines that tell what the corpus is made of, and what is not in it."""
    lines = [f"{corpus.folder}: vocabulary of {corpus.vocab_size:,}"]
    for source in corpus.sources:
        lines.append(
            f"  {source.name}: {source.documents:,} documents, {source.bytes / 1e6:,.1f} MB, {source.tokens:,} tokens; "
            f"{source.held_out_documents:,} held out for validation"
        )
        if source.duplicates:
            lines.append(f"    {source.duplicates:,} duplicates dropped")
        lines += [f"    skipped {remark_line(remark)}" for remark in source.skipped]
        lines += [f"    changed {remark_line(remark)}" for remark in source.changed]
    lines += [f"  {absent.name}: left out, {absent.reason}" for absent in corpus.absent]
    return lines


def remark_line(remark: "Remark") -> str:
    """Return how often something happened, what, and where first."""
    more = ", ..." if remark.count > len(remark.examples) else ""
    return f"{remark.count:,}: {remark.reason} ({', '.join(remark.examples)}{more})"
