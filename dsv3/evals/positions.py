"""How well a model predicts at each distance from the beginning of its text: a context that is used lowers the loss.

Beyond the positions it can read, the loss of a model rises at once; so the curve shows what an extension is worth.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean, stdev

import torch

from dsv3.batch import TokenBatch
from dsv3.errors import DataError
from dsv3.model.transformer import Transformer
from dsv3.ops.cross_entropy import token_nll

FIRST_EDGE = 16
"""Tokens of the first bucket; each further one ends at twice as many."""


@dataclass(frozen=True, kw_only=True)
class PositionLoss:
    """Mean loss in each bucket of positions."""

    name: str
    edges: tuple[int, ...]
    """Bucket k has the positions from `edges[k]` to below `edges[k + 1]`."""
    nats: tuple[float, ...]
    """A token."""
    errors: tuple[float, ...]
    """Standard error of each over the rows; 0 where there is one row."""
    rows: int

    @property
    def perplexity(self) -> tuple[float, ...]:
        """e to the loss."""
        return tuple(math.exp(min(loss, 700.0)) for loss in self.nats)

    def as_dict(self) -> dict[str, object]:
        """Return it for JSON."""
        return {
            "name": self.name,
            "edges": list(self.edges),
            "nats": list(self.nats),
            "perplexity": list(self.perplexity),
            "errors": list(self.errors),
            "rows": self.rows,
        }


def edges_of(length: int) -> tuple[int, ...]:
    """Return where buckets of so many positions begin and end: twice as far each time."""
    edges = [0]
    while (edge := max(FIRST_EDGE, 2 * edges[-1])) < length:
        edges.append(edge)
    return (*edges, length)


def whole_rows(documents: Mapping[str, Sequence[Sequence[int]]], *, length: int, most: int) -> list[list[int]]:
    """Return up to `most` rows of `length` + 1 tokens, of long documents before short ones laid end to end.

    A row has text of one source only. Every source gives as many rows as any other, as far as it has them.

    Raises:
        DataError: no source fills a row.
    """
    by_source = []
    for texts in documents.values():
        whole = [text[at : at + length + 1] for text in texts for at in range(0, len(text) - length, length + 1)]
        short = [token for text in texts if len(text) <= length for token in text]
        joined = [short[at : at + length + 1] for at in range(0, len(short) - length, length + 1)]
        by_source.append([list(row) for row in (*whole, *joined)])
    rows: list[list[int]] = []
    while len(rows) < most and any(by_source):
        for source in by_source:
            if source and len(rows) < most:
                rows.append(source.pop(0))
    if not rows:
        most_tokens = max((sum(map(len, texts)) for texts in documents.values()), default=0)
        raise DataError(
            f"no source has text for a row of {length} tokens (the longest has {most_tokens}); give longer text with "
            "--data PATH, or ask for fewer with --longest"
        )
    return rows


def loss_by_position(model: Transformer, *, rows: Sequence[Sequence[int]], name: str) -> PositionLoss:
    """Return the loss in each bucket of positions, over rows of equal length, each read by itself and whole."""
    edges = edges_of(len(rows[0]) - 1)
    by_row: list[list[float]] = []
    for row in rows:
        batch = TokenBatch.from_sequences([list(row[:-1])]).to(model.device)
        with torch.inference_mode():
            targets = torch.tensor(row[1:], device=model.device)
            losses = token_nll(model(batch).hidden, weight=model.lm_head.weight, targets=targets).double()
        by_row.append([losses[begin:end].mean().item() for begin, end in pairwise(edges)])
    columns = list(zip(*by_row, strict=True))
    return PositionLoss(
        name=name,
        edges=edges,
        nats=tuple(fmean(column) for column in columns),
        errors=tuple(stdev(column) / math.sqrt(len(column)) if len(column) > 1 else 0.0 for column in columns),
        rows=len(rows),
    )
