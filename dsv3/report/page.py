"""From a run folder to report.html: one file that needs nothing else to be read, sent or kept."""

import math
import os
import shlex
import time
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment

from dsv3.config import ModelConfig, PretrainConfig
from dsv3.config.files import from_dict
from dsv3.data.loader import count_rows, source_weights
from dsv3.errors import ConfigError, Dsv3Error
from dsv3.evals.results import table_beside_published, what_is_missing
from dsv3.plan.counts import count_parameters
from dsv3.report import figures
from dsv3.report.charts import heat_legend, short_number
from dsv3.report.record import Entry, RunRecord, number, numbers, read_run

MAX_SAMPLE_STEPS = 5
"""Steps at which one prompt's continuations are shown, from the first to the last."""
MAX_REMARKS = 100
"""Remarks on the reading of the corpus that are listed."""


@dataclass(frozen=True, kw_only=True)
class Tile:
    """One number of the summary."""

    what: str
    value: str
    more: str = ""
    unit: str = ""


def write_report(run_folder: Path) -> Path:
    """Write `report.html` into a run folder and return its path.

    Works for a run that is going on, was stopped or lacks parts: the page then says what is missing. The page holds
    no outside addresses, and all text of the run is escaped.

    Raises:
        ConfigError: there is no such folder, it holds nothing of a run, or it cannot be written to.
    """
    if not run_folder.is_dir():
        raise ConfigError(f"{run_folder} is not a folder; a report is made from a run folder, such as runs/quickstart")
    if not (run_folder / "config.json").exists() and not (run_folder / "metrics.jsonl").exists():
        raise ConfigError(f"{run_folder} holds neither config.json nor metrics.jsonl, so it is not a run folder")
    page = render(read_run(run_folder))
    path = run_folder / "report.html"
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(page, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise ConfigError(f"cannot write the report to {path}: {error.strerror}") from error
    return path


def render(record: RunRecord) -> str:
    """Return the page of a run."""
    parts = {
        "comparison": comparison(record),
        "learning": list(
            filter(
                None,
                [
                    figures.bits_per_byte_picture(record),
                    figures.source_picture(record),
                    figures.loss_picture(record),
                    figures.mtp_picture(record),
                ],
            )
        ),
        "violation": figures.violation_picture(record),
        "heatmaps": figures.heatmaps(record),
        "answers": figures.answer_pictures(record.taught or record),
        "exchanges": prompts(record.taught) if record.taught is not None else [],
        "machinery": [*figures.schedule_pictures(record), *figures.health_pictures(record)],
        "positions": figures.position_picture(record),
        "benchmarks": benchmarks(record),
        "corpus": corpus(record),
        "prompts": prompts(record),
        "settings": settings(record.config),
    }
    anchors = [
        ("baselines", "Baselines", parts["comparison"]),
        ("learning", "Learning", parts["learning"]),
        ("answers", "Answers", parts["answers"]),
        ("experts", "Experts", parts["violation"] or parts["heatmaps"]),
        ("machinery", "Schedules", parts["machinery"]),
        ("context", "Long context", parts["positions"]),
        ("benchmarks", "Benchmarks", parts["benchmarks"]),
        ("corpus", "Corpus", parts["corpus"]),
        ("samples", "Samples", parts["prompts"]),
        ("settings", "Settings", parts["settings"]),
        ("next", "Go on", True),
    ]
    package = resources.files("dsv3.report")
    environment = Environment(autoescape=True, trim_blocks=True)
    template = environment.from_string((package / "page.html").read_text(encoding="utf-8"))
    shown = len(record.loads[-1]["load"]) if parts["heatmaps"] else 0
    return template.render(
        **parts,
        title=title(record),
        lead=lead(record),
        state=state(record),
        notes=record.notes,
        tiles=tiles(record),
        sections=[(anchor, text) for anchor, text, part in anchors if part],
        style=(package / "style.css").read_text(encoding="utf-8"),
        balance_words=balance_words(record),
        heat_legend=heat_legend(),
        heat_first=record.loads[0].get("step", "") if record.loads else "",
        heat_last=record.loads[-1].get("step", "") if record.loads else "",
        hidden_layers=max(shown - figures.MAX_HEATMAPS, 0),
        folder=display_folder(record.folder),
        commands=commands(record),
        footer=f"Written by dsv3 on {time.strftime('%-d %B %Y, %H:%M')} from {display_folder(record.folder)}.",
    )


def title(record: RunRecord) -> str:
    """Name the run by its folder and recipe."""
    recipe = str(record.config.get("recipe") or "")
    name = record.folder.resolve().name
    return f"{name}: a {recipe} DeepSeek-V3 model" if recipe else f"{name}: a DeepSeek-V3 model"


def lead(record: RunRecord) -> str:
    """Say in two sentences what happened."""
    if record.iterations:
        last = record.iterations[-1]
        words = f"The model has answered problems in {last.get('iteration', '?')} iterations"
        words += " and learned from what the answers were worth."
        scores = record.trials[-1].get("scores") if record.trials else None
        if isinstance(scores, dict) and scores:
            told = ", ".join(f"{name} {number(score):.2f}" for name, score in scores.items())
            words += f" Held-out problems, answered greedily, now score: {told}."
        return words
    if not record.steps:
        return "This run has not taken a training step yet."
    words = (
        f"The model has read {short_number(record.tokens)} tokens in {record.steps[-1].get('step', '?')} steps "
        f"and {duration(record.seconds)}."
    )
    bits = held_out_bits(record)
    if not math.isfinite(bits):
        return words + " It has not been scored on held-out text yet."
    words += f" It now needs {bits:.2f} bits for each byte of text it has never seen"
    best = min(record.baselines, key=lambda row: number(row.get("bits_per_byte")), default=None)
    if best is None:
        return words + "."
    mark = number(best.get("bits_per_byte"))
    name = str(best.get("title", "the best baseline"))
    if bits < mark:
        return words + f", {100 * (1 - bits / mark):.0f} % fewer than the best baseline ({name}: {mark:.2f})."
    return words + f"; the best baseline ({name}) still needs fewer: {mark:.2f}."


def state(record: RunRecord) -> str:
    """Say that a run is not finished; empty when it is, or when its length is not known."""
    if record.is_finished or not record.total_tokens or record.lesson:
        return ""
    share = 100 * record.tokens / record.total_tokens
    return (
        f"This run is not finished: {short_number(record.tokens)} of {short_number(record.total_tokens)} tokens "
        f"({share:.0f} %). The same command that began it goes on from its newest snapshot."
    )


def held_out_bits(record: RunRecord) -> float:
    """Bits per byte from the evaluation, or else from the last validation."""
    ours = record.evaluation.get("model")
    if isinstance(ours, dict) and math.isfinite(number(ours.get("bits_per_byte"))):
        return number(ours.get("bits_per_byte"))
    return number(record.validations[-1].get("bits_per_byte")) if record.validations else math.nan


def tiles(record: RunRecord) -> list[Tile]:
    """The numbers of the summary."""
    shown = [*parameter_tiles(record)]
    if record.steps:
        total = record.total_tokens
        share = f"{100 * min(record.tokens / total, 1.0):.0f} % of the run" if total else ""
        shown.append(Tile(what="Tokens read", value=short_number(record.tokens), more=share))
        speeds = [number(step.get("tokens_per_second")) for step in record.steps]
        finite = [speed for speed in speeds if math.isfinite(speed)]
        more = f"{short_number(sum(finite) / len(finite))} tokens per second" if finite else ""
        minutes = record.seconds / 60
        if minutes < 1:
            shown.append(Tile(what="Training time", value=f"{record.seconds:.0f}", unit="seconds", more=more))
        elif minutes < 120:
            shown.append(Tile(what="Training time", value=f"{minutes:.1f}", unit="minutes", more=more))
        else:
            shown.append(Tile(what="Training time", value=f"{minutes / 60:.1f}", unit="hours", more=more))
    bits = held_out_bits(record)
    if math.isfinite(bits):
        marks = ", ".join(
            f"{row.get('name', '?')} {number(row['bits_per_byte']):.2f}" for row in record.trained_baselines
        )
        shown.append(Tile(what="Held-out text", value=f"{bits:.2f}", unit="bits/byte", more=marks))
    violation = next(
        (values for entry in reversed(record.validations) if (values := numbers(entry.get("max_violation")))), []
    )
    if violation:
        mean = sum(violation) / len(violation)
        shown.append(
            Tile(
                what="Imbalance on held-out text",
                value=f"{mean:.2f}",
                unit="MaxVio",
                more="mean over layers; 0 is even",
            )
        )
    return shown


def parameter_tiles(record: RunRecord) -> list[Tile]:
    """Parameters in all and at work for one token, counted from the configuration."""
    try:
        counts = count_parameters(from_dict(ModelConfig, record.config["model"]))
    except (ConfigError, KeyError):
        return []
    more = f"{short_number(counts.active)} at work for each token"
    if counts.mtp:
        more += f"; {short_number(counts.mtp)} on top for multi-token prediction"
    return [Tile(what="Parameters", value=short_number(counts.total), more=more)]


def comparison(record: RunRecord) -> dict[str, Any] | None:
    """The model among its baselines, overall and by source."""
    ours = record.evaluation.get("model")
    if not isinstance(ours, dict) or not math.isfinite(number(ours.get("bits_per_byte"))):
        return None
    rows = [{**ours, "title": "this model", "is_ours": True}, *record.baselines]
    rows.sort(key=lambda row: -number(row["bits_per_byte"]))
    highest = max(number(row["bits_per_byte"]) for row in rows)
    by_source = {str(name) for row in rows if isinstance(row.get("by_source"), dict) for name in row["by_source"]}
    order = [source.name for source in record.corpus.sources] if record.corpus else []
    known = [name for name in order if name in by_source]
    names = [*known, *sorted(by_source - set(known))] if len(by_source) > 1 else []
    cells = {
        name: [
            number(row["by_source"].get(name)) if isinstance(row.get("by_source"), dict) else math.nan for row in rows
        ]
        for name in names
    }
    best = {name: min((value for value in values if math.isfinite(value)), default=0) for name, values in cells.items()}
    return {
        "words": (
            "Every row below predicts the same held-out text, counted in the same unit, so that the numbers can be "
            "compared at a glance. The unigram and the n-gram use the model's own tokens and have read exactly the "
            "rows the model has read; xz is the general compressor. The model should need the fewest bits."
        ),
        "sources": names,
        "rows": [
            {
                "title": str(row.get("title", "?")),
                "is_ours": bool(row.get("is_ours")),
                "has_sources": any(math.isfinite(values[place]) for values in cells.values()),
                "value": f"{number(row['bits_per_byte']):.3f}",
                "share": 82 * number(row["bits_per_byte"]) / highest,
                "cells": [
                    {
                        "text": f"{cells[name][place]:.2f}" if math.isfinite(cells[name][place]) else "–",
                        "is_best": cells[name][place] == best[name],
                    }
                    for name in names
                ],
            }
            for place, row in enumerate(rows)
        ],
    }


def benchmarks(record: RunRecord) -> dict[str, Any] | None:
    """Scores of the report's benchmarks beside those published, and what is missing."""
    if not record.benchmarks:
        return None
    try:
        header, *rows = table_beside_published(record.benchmarks)
        missing = what_is_missing(record.benchmarks)
    except (KeyError, TypeError, ValueError, AttributeError):
        return {"words": "evaluation/results.json is not as dsv3 eval run writes it, and so is not shown."}
    limit = record.benchmarks.get("limit")
    return {
        "words": (
            "The report's benchmarks, with their standard errors, beside the scores that the report has for its own "
            "model and others." + (f" Of each task the first {limit} items were asked." if limit else "")
        ),
        "header": header,
        "rows": rows,
        "missing": missing,
    }


def balance_words(record: RunRecord) -> str:
    """Say how this run kept its experts busy."""
    balance = record.config.get("balance", {})
    model = record.config.get("model", {})
    method = balance.get("method") if isinstance(balance, dict) else None
    start = (
        f"Each token goes to {model.get('num_experts_per_tok', '?')} of {model.get('n_routed_experts', '?')} experts "
        "in every such layer. "
    )
    ways = {
        "bias": (
            "Balance comes from a bias on each expert's score that steers who is chosen and never how much they "
            "count: raised a little after a step in which the expert had too few tokens, lowered after one with too "
            "many (report 2.1.2)."
        ),
        "sequence_loss": "Balance comes from an auxiliary loss within each sequence, without biases.",
        "batch_loss": "Balance comes from an auxiliary loss over the whole batch, without biases.",
        "v2_losses": "Balance comes from the three auxiliary losses of DeepSeek-V2.",
        "none": "Nothing keeps the experts in balance in this run.",
    }
    return start + ways.get(str(method), "")


def corpus(record: RunRecord) -> dict[str, Any] | None:
    """The composition of the training text."""
    if record.corpus is None:
        return None
    sources = record.corpus.sources
    num_bytes = sum(source.bytes for source in sources)
    num_tokens = sum(source.tokens for source in sources)
    kinds = "one source" if len(sources) == 1 else f"{len(sources)} sources"
    remarks = [
        (f"{source.name}: {what}", f"{remark.reason}: {remark.count:,} ({', '.join(remark.examples)})")
        for source in sources
        for what, remarks in (("left out", source.skipped), ("changed", source.changed))
        for remark in remarks
    ]
    remarks += [
        (f"{source.name}: left out", f"the same text had come before: {source.duplicates:,}")
        for source in sources
        if source.duplicates
    ]
    remarks += [(f"{source.name}: absent", source.reason) for source in record.corpus.absent]
    filled = rows_of_one_document(record)
    return {
        "words": (
            f"{byte_size(num_bytes)} of text from {kinds}, {short_number(num_tokens)} tokens. Held-out documents are "
            "chosen by a hash of their text and never trained on. More bytes per token means that the tokenizer knows "
            "a source better; the last column is how often each source comes up in training."
        ),
        "rows_words": (
            "Each row of training has text of one source. Those that one document fills come first, then rows of "
            "several shorter ones, laid end to end."
            if record.config.get("batch", {}).get("long_documents_first")
            else ""
        ),
        "rows": [
            {
                "name": source.name,
                "documents": f"{source.documents:,}",
                "bytes": byte_size(source.bytes),
                "tokens": short_number(source.tokens),
                "bytes_per_token": f"{source.bytes / source.tokens:.2f}" if source.tokens else "–",
                "held_out": f"{source.held_out_documents:,}",
                "filled": filled.get(source.name, "–"),
                "share": 100 * share,
                "share_text": f"{100 * share:.1f} %",
            }
            for source, share in zip(sources, row_shares(record), strict=True)
        ],
        "remarks": remarks[:MAX_REMARKS],
    }


def rows_of_one_document(record: RunRecord) -> dict[str, str]:
    """Return for each source how many of its rows one document fills, of how many; nothing where nobody can tell."""
    assert record.corpus is not None
    try:
        counts = count_rows(record.corpus, sequence_length=record.config["batch"]["sequence_length"])
    except (Dsv3Error, OSError, KeyError, TypeError):
        return {}
    return {name: f"{found.long:,} of {found.rows:,}" for name, found in counts.items()}


def row_shares(record: RunRecord) -> list[float]:
    """Share of the training rows of each source, as the loader draws them."""
    assert record.corpus is not None
    try:
        weights = source_weights(record.corpus, config=from_dict(PretrainConfig, record.config))
    except ConfigError:
        weights = [float(source.tokens) for source in record.corpus.sources]
    total = sum(weights) or 1.0
    return [weight / total for weight in weights]


def prompts(record: RunRecord) -> list[dict[str, Any]]:
    """Continuations of each prompt, at a few steps side by side."""
    by_prompt: dict[str, list[Entry]] = {}
    for entry in record.samples:
        by_prompt.setdefault(str(entry.get("prompt", "")), []).append(entry)
    return [
        {
            "text": prompt,
            "samples": [
                {"where": where(entries[place]), "text": str(entries[place].get("text", ""))}
                for place in figures.spread(len(entries), at_most=MAX_SAMPLE_STEPS)
            ],
        }
        for prompt, entries in by_prompt.items()
    ]


def where(sample: Entry) -> str:
    """Say at which point of the run a sample was made, and how."""
    step = "at the end" if sample.get("step") is None else f"step {sample['step']}"
    temperature = number(sample.get("temperature"))
    return f"{step}, temperature {temperature:g}" if math.isfinite(temperature) else step


def settings(config: dict[str, Any]) -> list[dict[str, Any]]:
    """The configuration in groups of dotted names."""
    groups = []
    single = [(key, value) for key, value in config.items() if not isinstance(value, dict)]
    if single:
        groups.append({"name": "run", "hint": "", "rows": [(key, plain(value)) for key, value in single]})
    for key, value in config.items():
        if isinstance(value, dict):
            rows = list(flatten(value, path=key))
            groups.append({"name": key, "hint": f"{len(rows)} settings", "rows": rows})
    return groups


def flatten(values: dict[str, Any], *, path: str) -> Iterable[tuple[str, str]]:
    """Yield dotted names and values of nested settings."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from flatten(value, path=f"{path}.{key}")
        else:
            yield f"{path}.{key}", plain(value)


def plain(value: object) -> str:
    """Write a setting for a reader: large numbers with separators, lists with commas."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        return ", ".join(plain(item) for item in value) if value else "(none)"
    if isinstance(value, dict):
        return ", ".join(f"{key}: {plain(item)}" for key, item in value.items())
    return str(value) if value != "" else "(empty)"


def commands(record: RunRecord) -> list[tuple[str, str]]:
    """What to do next, as commands."""
    folder = shlex.quote(display_folder(record.folder))
    recipe = str(record.config.get("recipe") or "tiny")
    return [
        ("Talk to it", f"dsv3 chat {folder}"),
        ("Let it continue a text", f'dsv3 generate {folder} --prompt "In the beginning" --temperature 0.8'),
        ("Score it on your own text, beside the baselines", f"dsv3 evaluate {folder} --data notes.txt --baselines"),
        ("Train the same model on your own text", "dsv3 quickstart --run runs/mine --data PATH"),
        (
            "See what balancing does: the same run without it",
            f"dsv3 pretrain {recipe} --run runs/unbalanced --set balance.method=none",
        ),
        (
            "See every setting that differs from the published recipe, and why",
            f"dsv3 inspect {recipe} --against report",
        ),
    ]


def display_folder(folder: Path) -> str:
    """Write a folder as one would type it here: relative where it lies below the working folder."""
    try:
        return str(folder.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(folder)


def byte_size(count: int) -> str:
    """Write a number of bytes: 812 B, 35.1 KB, 7.2 MB."""
    for limit, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "KB")):
        if count >= limit:
            return f"{count / limit:.1f} {unit}"
    return f"{count} B"


def duration(seconds: int | float) -> str:
    """Write a time as one says it."""
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    if seconds < 5400:
        return f"{seconds / 60:.1f} minutes"
    return f"{seconds / 3600:.1f} hours"
