"""Text to be scored: documents as token ids, cut into stretches that a model reads in one piece.

Validation while training and the evaluation of a finished model score through here, so that their numbers agree.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from dsv3.data.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Window:
    """A stretch of one document that is scored in one piece."""

    document: int
    tokens: list[int]
    """All but the first are predicted; the first is the last of the stretch before, or the begin token."""


def encode_up_to(texts: Iterable[str], *, tokenizer: Tokenizer, count: int | None) -> list[list[int]]:
    """Encode texts in order until there are `count` tokens; the last one is cut there. None encodes them all."""
    documents = []
    for text in texts:
        if count is not None and count <= 0:
            break
        ids = tokenizer.encode(text)[:count]
        if count is not None:
            count -= len(ids)
        if ids:
            documents.append(ids)
    return documents


def cut_windows(documents: Sequence[list[int]], *, length: int) -> list[Window]:
    """Cut documents into stretches of up to `length` inputs, longest first, so that equal lengths meet in a batch."""
    windows = [
        Window(document=number, tokens=tokens[start : start + length + 1])
        for number, tokens in enumerate(documents)
        for start in range(0, len(tokens) - 1, length)
    ]
    return sorted(windows, key=lambda window: -len(window.tokens))


def batched(windows: Iterable[Window], *, max_tokens: int) -> Iterator[list[Window]]:
    """Group stretches into batches of up to `max_tokens` inputs; one that is longer stands alone."""
    batch: list[Window] = []
    held = 0
    for window in windows:
        inputs = len(window.tokens) - 1
        if batch and held + inputs > max_tokens:
            yield batch
            batch, held = [], 0
        batch.append(window)
        held += inputs
    if batch:
        yield batch
