"""dsv3 evaluate: bits per byte of a model, beside what simple predictors need."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dsv3.cli.columns import aligned
from dsv3.cli.generate import Weights
from dsv3.errors import ConfigError, DataError

if TYPE_CHECKING:
    from dsv3.data.tokenizer import Tokenizer
    from dsv3.evals.baselines import Tokens
    from dsv3.evals.comparison import ScoredText
    from dsv3.evals.evaluation import Evaluation

DEFAULT_MAX_TOKENS = 200_000
"""Tokens scored of text given with --data."""


def register(app: typer.Typer) -> None:
    """Add the verb to the command line."""
    app.command("evaluate")(evaluate)


def evaluate(
    model: Annotated[
        Path,
        typer.Argument(metavar="MODEL", help="A run folder, an export folder, or a published checkpoint's folder."),
    ],
    more_data: Annotated[list[str] | None, typer.Argument(hidden=True)] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(metavar="PATH...", help="Text to score; the held-out text of the run when left out."),
    ] = None,
    baselines: Annotated[
        bool, typer.Option("--baselines", help="Score a unigram, an n-gram and xz on the same text.")
    ] = False,
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens scored at most; as in training for the text of a run.")
    ] = None,
    window: Annotated[
        int | None, typer.Option(min=1, help="Tokens the model sees at once; the length of its training rows.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    weights: Weights = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    threads: Annotated[int, typer.Option(help="CPU threads; 0 takes all that this process may use.")] = 0,
) -> None:
    """Score a model in bits per byte of text: fewer is better, whatever the tokenizer.

    Of a run folder, the held-out text of its corpus is scored; with --baselines, and as it was scored in training, the
    result goes to evaluation.json, where the report finds it. The n-gram baselines are trained on the rows that the
    run has read, so they need a run folder; without one, only xz stands beside the model.
    """
    if more_data and not data:
        raise ConfigError(f"what is '{more_data[0]}'? Text to score is given as --data {' '.join(more_data)}")

    from dsv3.config.files import read_config
    from dsv3.data.prepared import load_prepared
    from dsv3.evals.evaluation import evaluate as score_all
    from dsv3.evals.evaluation import held_out_text, tokens_read, training_rows
    from dsv3.infer.loaded import load
    from dsv3.runtime.atomic import write_json
    from dsv3.runtime.device import set_threads

    paths = [*(data or []), *(more_data or [])]
    run = run_to_read(model, paths=paths)
    set_threads(threads)
    # As a rule the model that trains is scored, which tells how it loads its experts; a format as it would be served.
    loaded = load(model, weights=weights, device=device, plain=weights == "auto")
    config = None if run is None else read_config(run / "config.json")
    corpus = None if run is None or (paths and not baselines) else load_prepared(run / "corpus")
    if paths:
        text = text_of(paths, tokenizer=loaded.tokenizer, max_tokens=max_tokens or DEFAULT_MAX_TOKENS)
    else:
        assert corpus is not None
        assert config is not None
        text = held_out_text(corpus, max_tokens=max_tokens or config.evaluation.max_tokens)
    rows: list[Tokens] | None = [] if baselines else None
    if baselines and run is not None and corpus is not None and config is not None:
        rows = training_rows(corpus, config=config, tokens=tokens_read(run))
    found = score_all(
        loaded.runner if weights != "auto" else loaded.model,
        text=text,
        tokenizer=loaded.tokenizer,
        window=min(window or loaded.trained_length, loaded.config.max_position_embeddings),
        rows=rows,
    )
    if run is not None and not paths and baselines and max_tokens is None and window is None and weights == "auto":
        write_json(found.as_dict(), path=run / "evaluation.json")
    typer.echo(json.dumps(found.as_dict(), ensure_ascii=False) if as_json else table(found))


def run_to_read(model: Path, *, paths: list[str]) -> Path | None:
    """Return the run that a model is of, or None where there is none and other text is given.

    Raises:
        ConfigError: there is no text: it is of no run, and none is given.
    """
    from dsv3.infer.model_folder import find_model

    run = find_model(model).run
    if not paths and run is None:
        raise ConfigError(f"{model} is not a run folder and so has no held-out text; give text with --data PATH")
    return run


def text_of(paths: list[str], *, tokenizer: "Tokenizer", max_tokens: int) -> "ScoredText":
    """Read text to score; each path is a source of its own. What could not be read is said on the error stream.

    Raises:
        DataError: there is nothing to score.
    """
    from dsv3.config import DataConfig, SourceConfig
    from dsv3.data.corpus import named_sources, read_documents
    from dsv3.data.document import ReadingLog
    from dsv3.evals.comparison import encode_texts

    log = ReadingLog()
    sources = named_sources(DataConfig(sources=tuple(SourceConfig(path=path) for path in paths)))
    texts = {source.name: (document.text for document in read_documents(source, log=log)) for source in sources}
    try:
        text = encode_texts(texts, tokenizer=tokenizer, max_tokens=max_tokens)
    except DataError as error:
        reasons = "; ".join(remark.reason for remark in log.skipped_remarks())
        raise DataError(f"{error}{f' ({reasons})' if reasons else ''}") from None
    for remark in log.skipped_remarks():
        typer.echo(f"left out: {remark.reason}: {', '.join(remark.examples)} ({remark.count} in all)", err=True)
    return text


def table(found: "Evaluation") -> str:
    """Return the scores as a table of predictors by sources, the best last."""
    sources = list(found.model.by_source)
    header = ["bits per byte", "all", *(sources if len(sources) > 1 else [])]
    scores = sorted([found.model, *found.baselines], key=lambda score: -score.bits_per_byte)
    rows = [
        [score.title, f"{score.bits_per_byte:.3f}"]
        + [f"{score.by_source[name]:.3f}" if name in score.by_source else "-" for name in header[2:]]
        for score in scores
    ]
    lines = aligned([header, *rows])
    if found.max_violation:
        mean = sum(found.max_violation) / len(found.max_violation)
        lines.append(f"\nMaxVio over this text: {mean:.3f} (mean of {len(found.max_violation)} layers; 0 is even)")
    return "\n".join(lines)
