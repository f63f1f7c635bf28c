"""Which source each training row comes from, so that every stretch of training holds the sources by weight."""

from collections.abc import Sequence
from functools import cached_property

import numpy as np
from jaxtyping import Int
from numpy import ndarray

from dsv3.config import ShareConfig
from dsv3.data.chance import hash_parts
from dsv3.errors import ConfigError

BLOCK_ROWS = 1024
"""Rows over which the shares hold exactly, to one part in this many."""


class Mixture:
    """Deals rows to sources: in every block each source gets the same number of rows, in a shuffled order.

    A pure function of the seed and the row's number, so that it needs no state to resume. The report's own mixture
    is unpublished.
    """

    def __init__(self, weights: list[float], *, seed: int) -> None:
        self.weights = weights
        self.seed = seed
        self._dealt_block = -1
        self._dealt: tuple[Int[ndarray, " row"], Int[ndarray, " row"]] | None = None

    @cached_property
    def rows_per_block(self) -> list[int]:
        """Rows of each source in a block: by largest remainder, and at least one of each that has a weight."""
        block = max(BLOCK_ROWS, 16 * len(self.weights))
        shares = np.asarray(self.weights, dtype=np.float64)
        shares = shares / shares.sum() * block
        rows = np.floor(shares).astype(np.int64)
        rows[np.argsort(rows - shares, kind="stable")[: block - int(rows.sum())]] += 1
        for source in np.flatnonzero((rows == 0) & (shares > 0)):
            rows[source] += 1
            rows[rows.argmax()] -= 1
        return rows.tolist()

    def locate(self, row: int) -> tuple[int, int]:
        """Return the source of a training row, and how many rows were drawn from that source before it."""
        block, place = divmod(row, sum(self.rows_per_block))
        sources, drawn_in_block = self._deal(block)
        source = int(sources[place])
        return source, block * self.rows_per_block[source] + int(drawn_in_block[place])

    def drawn(self, row: int) -> list[int]:
        """Return how many rows of each source come before a training row."""
        block, place = divmod(row, sum(self.rows_per_block))
        counts = np.bincount(self._deal(block)[0][:place], minlength=len(self.weights))
        return (block * np.asarray(self.rows_per_block) + counts).tolist()

    def _deal(self, block: int) -> tuple[Int[ndarray, " row"], Int[ndarray, " row"]]:
        if self._dealt is None or self._dealt_block != block:
            sources = np.repeat(np.arange(len(self.weights)), self.rows_per_block)
            np.random.default_rng(hash_parts("mixture", self.seed, block)).shuffle(sources)
            drawn = np.empty(len(sources), dtype=np.int64)
            for source, rows in enumerate(self.rows_per_block):
                drawn[sources == source] = np.arange(rows)
            self._dealt_block, self._dealt = block, (sources, drawn)
        return self._dealt


class AnnealedMixture:
    """One mixture up to a row, and another from there on, which goes on in each source where the first has stopped."""

    def __init__(self, first: Mixture, *, last: Mixture, from_row: int) -> None:
        self.first, self.last, self.from_row = first, last, from_row
        self._before = first.drawn(from_row)

    def locate(self, row: int) -> tuple[int, int]:
        """Return the source of a training row, and how many rows were drawn from that source before it."""
        if row < self.from_row:
            return self.first.locate(row)
        source, drawn = self.last.locate(row - self.from_row)
        return source, self._before[source] + drawn


def shared_weights(
    sources: Sequence[tuple[str, float]], *, shares: Sequence[ShareConfig], temperature: float
) -> list[float]:
    """Return the weight of each source, given its name and its tokens.

    A name may be 'source/domain'; a share of that name counts before one of the source, and that before one of the
    domain.

    Raises:
        ConfigError: a share is of nothing there is, or, with weights, a source has none.
    """
    owners = [_share_of(name, shares=shares) for name, _ in sources]
    unused = [share.of for share in shares if share not in owners]
    names = ", ".join(name for name, _ in sources)
    if unused:
        raise ConfigError(f"data.mixture has a share of {', '.join(unused)}; the corpus has {names}")
    scaled = [tokens ** (1 / temperature) for _, tokens in sources]
    if not any(share.weight for share in shares):
        return [size * (owner.epochs if owner else 1.0) for size, owner in zip(scaled, owners, strict=True)]
    without = [name for (name, _), owner in zip(sources, owners, strict=True) if owner is None]
    if without:
        raise ConfigError(f"data.mixture gives {', '.join(without)} no weight; give each one, 0 to leave it out")
    totals = {
        share: sum(size for size, owner in zip(scaled, owners, strict=True) if owner == share) for share in shares
    }
    return [
        share.weight * size / totals[share] for size, share in zip(scaled, owners, strict=True) if share is not None
    ]


def _share_of(name: str, *, shares: Sequence[ShareConfig]) -> ShareConfig | None:
    source, _, domain = name.rpartition("/")
    for wanted in (name, source, domain):
        for share in shares:
            if share.of == wanted:
                return share
    return None
