"""A training run, scored: the model and its baselines on the run's own held-out text."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dsv3.checkpoint.snapshot_folder import latest_snapshot
from dsv3.config import PretrainConfig
from dsv3.data.loader import RowLoader
from dsv3.data.prepared import PreparedCorpus
from dsv3.data.tokenizer import Tokenizer
from dsv3.errors import DataError
from dsv3.evals.balance import ExpertLoad
from dsv3.evals.baselines import Tokens
from dsv3.evals.comparison import Score, ScoredText, rows_read, score_baselines, score_model, scored_text
from dsv3.infer.runner import Runner
from dsv3.model.transformer import Transformer
from dsv3.train.validation import held_out_documents

EvaluationProgress = Callable[[str, int, int], None]
"""Called with what is being scored, how many tokens of it are done, and how many there are."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Scores on one text, comparable with one another."""

    model: Score
    max_violation: list[float]
    """MaxVio of each MoE layer over the whole text."""
    baselines: list[Score] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Return what evaluation.json holds."""
        return {
            "model": {**self.model.as_dict(), "max_violation": self.max_violation},
            "baselines": [score.as_dict() for score in self.baselines],
        }


def evaluate(
    model: Transformer | Runner,
    *,
    text: ScoredText,
    tokenizer: Tokenizer,
    window: int,
    rows: list[Tokens] | None,
    progress: EvaluationProgress | None = None,
) -> Evaluation:
    """Score a model on a text and, unless `rows` is None, the baselines trained on those rows."""
    load = ExpertLoad()
    total = sum(len(document) - 1 for documents in text.documents.values() for document in documents)
    done = 0

    def count(tokens: int) -> None:
        nonlocal done
        done += tokens
        if progress is not None:
            progress("scoring the model", done, total)

    def announce(name: str) -> None:
        if progress is not None:
            progress(f"scoring the baseline {name}", 0, 0)

    score = score_model(model, text=text, window=window, load=load, on_tokens=count)
    baselines = [] if rows is None else score_baselines(text, rows=rows, tokenizer=tokenizer, on_baseline=announce)
    return Evaluation(model=score, max_violation=load.max_violations(), baselines=baselines)


def held_out_text(corpus: PreparedCorpus, *, max_tokens: int) -> ScoredText:
    """Return the held-out text of a run's corpus: the documents that its validation scores.

    Raises:
        DataError: nothing was held out.
    """
    tokenizer = corpus.tokenizer()
    documents = held_out_documents(corpus, tokenizer=tokenizer, max_tokens=max_tokens)
    if not documents:
        raise DataError(
            f"the corpus at {corpus.folder} has no held-out text; give text to score with --data PATH, or raise "
            "data.held_out_rate in a new run"
        )
    return scored_text(documents, tokenizer=tokenizer)


def training_rows(corpus: PreparedCorpus, *, config: PretrainConfig, tokens: int) -> list[Tokens]:
    """Return the distinct rows that a run has read after `tokens` tokens, as its loader dealt them."""
    length = config.batch.sequence_length
    loader = RowLoader(corpus, config=config, sequence_length=length, seed=config.runtime.seed)
    return rows_read(loader, tokens=tokens)


def tokens_read(run_folder: Path) -> int:
    """Return the tokens that the weights which `dsv3.load` takes from a run have been trained on."""
    return int(last_step(run_folder)["tokens"])


def last_step(run_folder: Path) -> dict[str, Any]:
    """Return the metrics of the step whose weights `dsv3.load` takes from a run: its export, or its newest snapshot.

    A run that was killed may have recorded steps after its newest snapshot; they are not in those weights.

    Raises:
        DataError: metrics.jsonl does not hold that step.
    """
    file = run_folder / "metrics.jsonl"
    snapshot = latest_snapshot(run_folder / "snapshots")
    is_finished = (run_folder / "export" / "config.json").exists()
    wanted = None if is_finished or snapshot is None else int(snapshot.name.rpartition("-")[2])
    found: dict[str, Any] = {}
    try:
        with file.open(encoding="utf-8") as lines:
            for line in lines:
                if not line.endswith("\n"):  # cut off by a kill
                    continue
                entry = json.loads(line)
                if entry["kind"] == "step" and (wanted is None or entry["step"] <= wanted):
                    found = entry
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"cannot tell from {file} how much the model has read ({error})") from error
    if not found:
        raise DataError(f"{file} holds no training step, so it does not tell how much the model has read")
    return found
