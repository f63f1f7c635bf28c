"""dsv3 eval: measurements that ask a model for something and look at its answer."""

import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dsv3.cli import eval_run
from dsv3.cli.columns import aligned
from dsv3.cli.eval_domains import domains
from dsv3.cli.generate import Weights
from dsv3.cli.group import add_group
from dsv3.errors import ConfigError

if TYPE_CHECKING:
    from dsv3.data.tokenizer import Tokenizer
    from dsv3.evals.needle import NeedleResult
    from dsv3.evals.positions import PositionLoss


def register(app: typer.Typer) -> None:
    """Add the verbs to the command line."""
    told = "Ask a model for something and look at its answer; for benchmarks, 'run' may be left out."
    group = add_group(app, name="eval", told=told, usual="run")
    group.command("domains")(domains)
    group.command("needle")(needle)
    group.command("positions")(positions)
    group.command("run")(eval_run.run)
    group.command("compare")(eval_run.compare)


Model = Annotated[
    Path, typer.Argument(metavar="MODEL", help="A run folder, an export folder, or a published checkpoint's folder.")
]
Text = Annotated[
    list[str] | None,
    typer.Option(metavar="PATH", help="Text to read; the held-out text of the run when left out. May be repeated."),
]
Longest = Annotated[int | None, typer.Option(min=1, help="Tokens to read at most; all of the context when left out.")]
Picture = Annotated[Path | None, typer.Option(metavar="FILE", help="Draw it as a PNG.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Threads = Annotated[int, typer.Option(help="CPU threads; 0 takes all that this process may use.")]


def needle(
    model: Model,
    data: Text = None,
    longest: Longest = None,
    grid: Annotated[int, typer.Option(min=1, help="Lengths, and depths of each.")] = 15,
    kinds: Annotated[str, typer.Option(help="Of number, phrase and keys, with commas between.")] = "number,phrase,keys",
    picture: Picture = None,
    as_json: AsJson = False,
    weights: Weights = "auto",
    device: Device = "auto",
    threads: Threads = 0,
) -> None:
    """Hide facts in real text at every length and depth, and ask for them at the end.

    An answer counts if it is the hidden one, word for word. The text should be none that the model was trained on.
    """
    from dsv3.cli.evaluate import run_to_read
    from dsv3.evals.needle import find_needles, grid_of
    from dsv3.infer.loaded import load
    from dsv3.runtime.device import set_threads

    run = run_to_read(model, paths=data or [])
    set_threads(threads)
    loaded = load(model, weights=weights, device=device)
    length = longest or loaded.config.max_position_embeddings
    grid_of(length, size=grid)  # before text is read
    documents = _text(run, data=data, tokenizer=loaded.tokenizer, tokens=4 * length)
    haystack = [token for texts in documents.values() for document in texts for token in document[1:]]
    result = find_needles(loaded, haystack=haystack, longest=length, kinds=tuple(kinds.split(",")), size=grid)
    if picture is not None:
        from dsv3.report.needle import draw_needles

        draw_needles(result, file=picture, title=str(model))
    typer.echo(json.dumps(result.as_dict()) if as_json else table(result))


def positions(
    model: Model,
    data: Text = None,
    longest: Longest = None,
    rows: Annotated[int, typer.Option(min=1, help="Rows of text to read, each as long as that.")] = 32,
    scalings: Annotated[
        str,
        typer.Option(
            metavar="NAME,NAME",
            help="Compare instead what the weights do, as they are, under none, linear, ntk and yarn.",
        ),
    ] = "",
    trained: Annotated[
        int | None,
        typer.Option(min=1, help="With --scalings: tokens of a row in training; those of the run when left out."),
    ] = None,
    picture: Picture = None,
    as_json: AsJson = False,
    device: Device = "auto",
    threads: Threads = 0,
) -> None:
    """Show the perplexity at each distance from the beginning of a text.

    It falls as long as a model gains from what it has read, and jumps where it can read no further. With --scalings,
    positions beyond those of training are shown to the same weights in several ways.
    """
    from dsv3.cli.evaluate import run_to_read
    from dsv3.evals.positions import loss_by_position, whole_rows
    from dsv3.evals.scaling import scale_positions
    from dsv3.infer.loaded import load
    from dsv3.runtime.device import set_threads

    run = run_to_read(model, paths=data or [])
    if trained is not None and not scalings:
        raise ConfigError("--trained says what --scalings scale from; give both, or neither")
    set_threads(threads)
    loaded = load(model, plain=True, device=device)
    yarn = loaded.config.rope_scaling
    known = yarn.original_max_position_embeddings if yarn else loaded.trained_length
    trained, length = trained or known, longest or loaded.config.max_position_embeddings
    if length > loaded.config.max_position_embeddings and not scalings:
        raise ConfigError(f"{length} tokens, and {model} has {loaded.config.max_position_embeddings} positions")
    documents = _text(run, data=data, tokenizer=loaded.tokenizer, tokens=2 * rows * length)
    read = whole_rows(documents, length=length, most=rows)
    if not scalings:
        results = [loss_by_position(loaded.model, rows=read, name=str(model))]
    else:
        results = []
        for scaling in scalings.split(","):
            scale_positions(loaded.model, scaling=scaling, factor=max(1.0, length / trained), trained=trained)
            results.append(loss_by_position(loaded.model, rows=read, name=scaling))
    if picture is not None:
        from dsv3.report.positions import draw_positions

        draw_positions(results, file=picture, title=str(model), trained=trained if trained < length else 0)
    typer.echo(
        json.dumps({"trained": trained, "curves": [result.as_dict() for result in results]})
        if as_json
        else _curves(results)
    )


def _text(
    run: Path | None, *, data: list[str] | None, tokenizer: "Tokenizer", tokens: int
) -> "Mapping[str, Sequence[list[int]]]":
    """Return documents by source, of files, or what a run has held out; about so many tokens."""
    from dsv3.cli.evaluate import text_of
    from dsv3.config.files import read_config
    from dsv3.data.prepared import load_prepared
    from dsv3.evals.evaluation import held_out_text

    if data:
        return text_of(data, tokenizer=tokenizer, max_tokens=tokens).documents
    assert run is not None, "run_to_read refuses a model without text"
    most = max(read_config(run / "config.json").evaluation.max_tokens, tokens)
    return held_out_text(load_prepared(run / "corpus"), max_tokens=most).documents


def _curves(results: "Sequence[PositionLoss]") -> str:
    """Return a row a bucket of positions, a column a curve."""
    edges = results[0].edges
    lines = [["positions", *(result.name for result in results)]]
    for bucket, (begin, end) in enumerate(pairwise(edges)):
        lines.append([f"{begin:,} to {end - 1:,}", *(f"{result.perplexity[bucket]:.2f}" for result in results)])
    return "\n".join([*aligned(lines), f"\nperplexity, over {results[0].rows} rows"])


def table(result: "NeedleResult") -> str:
    """Return the share of needles found: a row a length, a column a depth."""
    cells = {(cell.length, cell.depth): cell for cell in result.cells}
    header = ["tokens", *(f"{depth:.0%}" for depth in result.depths), "all"]
    rows = [
        [f"{length:,}", *(f"{cells[length, depth].score:.0%}" for depth in result.depths), f"{mean:.0%}"]
        for length, mean in result.by_length().items()
    ]
    longest = f"\nfound: {result.score:.1%} of {sum(len(cell.found) for cell in result.cells):,}"
    if result.haystack_tokens < result.lengths[-1]:
        longest += f"; the text has {result.haystack_tokens:,} tokens and is in longer prompts more than once"
    return "\n".join([*aligned([header, *rows]), longest])
