"""dsv3 eval: measurements that ask a model for something and look at its answer."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dsv3.cli.columns import aligned
from dsv3.cli.generate import Weights
from dsv3.cli.group import add_group
from dsv3.errors import ConfigError

if TYPE_CHECKING:
    from dsv3.evals.needle import NeedleResult


def register(app: typer.Typer) -> None:
    """Add the verb to the command line."""
    add_group(app, name="eval", told="Ask a model for something and look at its answer.").command("needle")(needle)


def needle(
    model: Annotated[
        Path,
        typer.Argument(metavar="MODEL", help="A run folder, an export folder, or a published checkpoint's folder."),
    ],
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATH", help="Text to hide in; the held-out text of the run when left out. May be repeated."
        ),
    ] = None,
    longest: Annotated[
        int | None, typer.Option(min=1, help="Tokens of the longest prompt; all of the context when left out.")
    ] = None,
    grid: Annotated[int, typer.Option(min=1, help="Lengths, and depths of each.")] = 15,
    kinds: Annotated[str, typer.Option(help="Of number, phrase and keys, with commas between.")] = "number,phrase,keys",
    picture: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw the grid as a PNG.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    weights: Weights = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    threads: Annotated[int, typer.Option(help="CPU threads; 0 takes all that this process may use.")] = 0,
) -> None:
    """Hide facts in real text at every length and depth, and ask for them at the end.

    An answer counts if it is the hidden one, word for word. The text should be none that the model was trained on.
    """
    from dsv3.cli.evaluate import text_of
    from dsv3.config.files import read_config
    from dsv3.data.prepared import load_prepared
    from dsv3.evals.evaluation import held_out_text
    from dsv3.evals.needle import find_needles, grid_of
    from dsv3.infer.loaded import load
    from dsv3.infer.model_folder import find_model
    from dsv3.runtime.device import set_threads

    run = find_model(model).run
    if not data and run is None:
        raise ConfigError(f"{model} is not a run folder and so has no held-out text; give text with --data PATH")
    set_threads(threads)
    loaded = load(model, weights=weights, device=device)
    length = longest or loaded.config.max_position_embeddings
    grid_of(length, size=grid)  # before text is read
    if data:
        text = text_of(data, tokenizer=loaded.tokenizer, max_tokens=4 * length)
    else:
        assert run is not None
        most = max(read_config(run / "config.json").evaluation.max_tokens, 4 * length)
        text = held_out_text(load_prepared(run / "corpus"), max_tokens=most)
    haystack = [token for documents in text.documents.values() for document in documents for token in document[1:]]
    result = find_needles(loaded, haystack=haystack, longest=length, kinds=tuple(kinds.split(",")), size=grid)
    if picture is not None:
        from dsv3.report.needle import draw_needles

        draw_needles(result, file=picture, title=str(model))
    typer.echo(json.dumps(result.as_dict()) if as_json else table(result))


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
