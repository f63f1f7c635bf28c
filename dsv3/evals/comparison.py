"""A model and its baselines on the same text, in bits per byte, overall and by source."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dsv3.data.loader import FILLER, RowLoader
from dsv3.data.tokenizer import Tokenizer
from dsv3.data.windows import encode_up_to
from dsv3.errors import DataError
from dsv3.evals.balance import ExpertLoad
from dsv3.evals.baselines import NgramModel, Tokens, UnigramModel, xz_bits
from dsv3.evals.perplexity import document_bits
from dsv3.infer.runner import Runner
from dsv3.model.transformer import Transformer

ROWS_AT_ONCE = 1024
NGRAM_ORDER = 3
MAX_XZ_PREFIX_BYTES = 64 << 20
"""Training text that xz may look back to; more takes minutes and memory and hardly helps it."""


@dataclass(frozen=True, kw_only=True)
class ScoredText:
    """The text that everything is scored on."""

    documents: dict[str, list[list[int]]]
    """Token ids of each document by source, with the begin token before it. The begin token is not predicted."""
    content: dict[str, bytes]
    """The bytes of each source's documents, end to end: exactly those that the predicted tokens stand for."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """What one predictor needs for a `ScoredText`."""

    name: str
    """Short, for tables and JSON."""
    title: str
    """For a reader."""
    bits: dict[str, float]
    """Bits for each source; empty where only the whole was measured."""
    total_bits: float
    total_bytes: int
    bytes: dict[str, int]
    training_tokens: int | None = None
    """Tokens it was trained on; None for what is not trained."""

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte over all sources together."""
        return self.total_bits / self.total_bytes

    @property
    def by_source(self) -> dict[str, float]:
        """Bits per byte of each source."""
        return {name: bits / self.bytes[name] for name, bits in self.bits.items() if self.bytes[name]}

    def as_dict(self) -> dict[str, Any]:
        """Return what evaluation.json holds of it."""
        return {
            "name": self.name,
            "title": self.title,
            "bits_per_byte": self.bits_per_byte,
            "by_source": self.by_source,
            "training_tokens": self.training_tokens,
        }


def encode_texts(texts: Mapping[str, Iterable[str]], *, tokenizer: Tokenizer, max_tokens: int | None) -> ScoredText:
    """Return the tokens of texts by source, up to `max_tokens` shared evenly; a last text may be cut.

    A source with less than its share leaves the rest to those after it.

    Raises:
        DataError: there is no text at all.
    """
    documents: dict[str, list[list[int]]] = {}
    left = max_tokens
    for place, (name, source) in enumerate(texts.items()):
        share = None if left is None else left // (len(texts) - place)
        documents[name] = encode_up_to(source, tokenizer=tokenizer, count=share)
        if left is not None:
            left -= sum(len(document) for document in documents[name])
    return scored_text(documents, tokenizer=tokenizer)


def scored_text(documents: Mapping[str, list[list[int]]], *, tokenizer: Tokenizer) -> ScoredText:
    """Put a begin token before each document, and find the bytes that its tokens stand for.

    Sources without any text are left out.

    Raises:
        DataError: none has any.
    """
    kept = {name: found for name, found in documents.items() if any(found)}
    if not kept:
        raise DataError("there is no text to score: all of it is empty")
    content = {
        name: b"".join(tokenizer.token_bytes(token) for document in found for token in document)
        for name, found in kept.items()
    }
    begun = {name: [[tokenizer.bos_id, *document] for document in found] for name, found in kept.items()}
    return ScoredText(documents=begun, content=content)


def score_model(
    model: Transformer | Runner,
    *,
    text: ScoredText,
    window: int,
    load: ExpertLoad | None = None,
    on_tokens: Callable[[int], None] | None = None,
) -> Score:
    """Score a model; expert loads over all the text are added to `load`."""
    bits = {
        name: sum(document_bits(model, documents=documents, window=window, load=load, on_tokens=on_tokens))
        for name, documents in text.documents.items()
    }
    return make_score("model", title="the model", bits=bits, text=text)


def score_baselines(
    text: ScoredText,
    *,
    rows: Sequence[Tokens],
    tokenizer: Tokenizer,
    on_baseline: Callable[[str], None] | None = None,
) -> list[Score]:
    """Score the unigram, the n-gram and xz, trained on the given rows of tokens: as a rule those the model has read.

    Without rows there is nothing to train on, and xz alone is scored, on the text by itself.
    """
    scores = []
    trained_on = sum(len(row) for row in rows)
    if trained_on:
        _tell(on_baseline, "unigram")
        unigram = UnigramModel.train(rows, vocab_size=tokenizer.vocab_size)
        bits = {name: unigram.bits(documents) for name, documents in text.documents.items()}
        scores.append(
            make_score("unigram", title="unigram over the same tokens", bits=bits, text=text, tokens=trained_on)
        )
        _tell(on_baseline, "3-gram")
        ngram = NgramModel.train(rows, vocab_size=tokenizer.vocab_size, order=NGRAM_ORDER)
        bits = {name: ngram.bits(documents) for name, documents in text.documents.items()}
        scores.append(
            make_score("3-gram", title="Kneser-Ney 3-gram, same tokens", bits=bits, text=text, tokens=trained_on)
        )
    _tell(on_baseline, "xz")
    whole = b"".join(text.content.values())
    alone = xz_bits(whole)
    scores.append(make_score("xz-alone", title="xz, on this text alone", bits={}, text=text, total_bits=alone))
    if trained_on:
        table = [tokenizer.token_bytes(token) for token in range(tokenizer.vocab_size)]
        prefix = b"".join(table[token] for row in rows for token in row.tolist())[-MAX_XZ_PREFIX_BYTES:]
        after = xz_bits(whole, prefix=prefix)
        scores.append(
            make_score(
                "xz",
                title="xz, after the training text",
                bits={},
                text=text,
                total_bits=after,
                tokens=trained_on,
            )
        )
    return scores


def _tell(listener: Callable[[str], None] | None, name: str) -> None:
    if listener is not None:
        listener(name)


def make_score(
    name: str,
    *,
    title: str,
    bits: dict[str, float],
    text: ScoredText,
    total_bits: float | None = None,
    tokens: int | None = None,
) -> Score:
    """Put a score together from the bits of each source, or from those of the whole."""
    sizes = {source: len(content) for source, content in text.content.items()}
    return Score(
        name=name,
        title=title,
        bits=bits,
        total_bits=sum(bits.values()) if total_bits is None else total_bits,
        total_bytes=sum(sizes.values()),
        bytes=sizes,
        training_tokens=tokens,
    )


def rows_read(loader: RowLoader, *, tokens: int) -> list[Tokens]:
    """Return the rows that a model has read after `tokens` tokens of training, each distinct row once.

    A source that is smaller than its share comes up again and again. A model gains from reading twice; counts of
    n-grams do not, and Kneser-Ney, which lives on what occurred once, would suffer.
    """
    rows: list[Tokens] = []
    seen: set[bytes] = set()
    count = tokens // loader.sequence_length
    for start in range(0, count, ROWS_AT_ONCE):
        for row in loader.rows(start, count=min(ROWS_AT_ONCE, count - start)).numpy():
            kept = row[row != FILLER].astype(np.int64)
            key = kept.astype(np.int32).tobytes()
            if key not in seen:
                seen.add(key)
                rows.append(kept)
    return rows
