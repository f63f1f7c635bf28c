"""Which source each training row comes from, so that every stretch of training holds the sources by weight."""

from functools import cached_property

import numpy as np
from jaxtyping import Int
from numpy import ndarray

from dsv3.data.chance import hash_parts

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
        """Rows of each source in a block: by largest remainder, and at least one."""
        block = max(BLOCK_ROWS, 16 * len(self.weights))
        shares = np.asarray(self.weights, dtype=np.float64)
        shares = shares / shares.sum() * block
        rows = np.floor(shares).astype(np.int64)
        rows[np.argsort(rows - shares, kind="stable")[: block - int(rows.sum())]] += 1
        while not rows.all():
            rows[rows.argmin()] += 1
            rows[rows.argmax()] -= 1
        return rows.tolist()

    def locate(self, row: int) -> tuple[int, int]:
        """Return the source of a training row, and how many rows were drawn from that source before it."""
        block, place = divmod(row, sum(self.rows_per_block))
        sources, drawn_in_block = self._deal(block)
        source = int(sources[place])
        return source, block * self.rows_per_block[source] + int(drawn_in_block[place])

    def _deal(self, block: int) -> tuple[Int[ndarray, " row"], Int[ndarray, " row"]]:
        if self._dealt is None or self._dealt_block != block:
            sources = np.repeat(np.arange(len(self.weights)), self.rows_per_block)
            np.random.default_rng(hash_parts("mixture", self.seed, block)).shuffle(sources)
            drawn = np.empty(len(sources), dtype=np.int64)
            for source, rows in enumerate(self.rows_per_block):
                drawn[sources == source] = np.arange(rows)
            self._dealt_block, self._dealt = block, (sources, drawn)
        return self._dealt
