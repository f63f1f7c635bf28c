"""Best-fit packing: documents into rows of equal length with as few cuts as can be (report 4.1).

A document longer than a row is cut into whole rows and a remainder; the remainders are laid together by best fit,
longest first. Nothing is masked between the documents of a row, as in the report. Cutting only what is longer than a
row is the 'data integrity' the report names: packing end to end cuts a document at the end of nearly every row.

Source: report 4.1, after Ding et al. 2024, 'Fewer Truncations Improve Language Modeling'.
"""

from bisect import bisect_left, insort
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int
from numpy import ndarray


@dataclass(frozen=True, kw_only=True)
class Packing:
    """Which piece of which document lies in which row. Rows are filled from the left; what is over stays empty."""

    pieces: Int[ndarray, "piece 3"]
    """Document, first token within it, number of tokens; row after row."""
    row_starts: Int[ndarray, " row_plus_one"]
    """Where each row begins in `pieces`, and at the end their number."""

    @property
    def num_rows(self) -> int:
        """Rows."""
        return len(self.row_starts) - 1

    def num_long(self, capacity: int) -> int:
        """Return how many rows of `capacity` tokens one document fills; they come before all others."""
        return int((self.pieces[self.row_starts[:-1], 2] == capacity).sum())

    def row(self, index: int) -> Int[ndarray, "piece 3"]:
        """Return the pieces of one row."""
        return self.pieces[self.row_starts[index] : self.row_starts[index + 1]]


def pack(lengths: Int[ndarray, " document"], *, capacity: int) -> Packing:
    """Lay documents of these lengths into rows of `capacity` tokens; every token lies in exactly one row.

    A row that trains T tokens holds T + 1, so `capacity` is the sequence length plus one. Takes O(n log n).
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    whole_rows, remainders = np.divmod(lengths, capacity)
    documents = np.arange(len(lengths))
    full_document = np.repeat(documents, whole_rows)
    first_of_document = np.cumsum(whole_rows) - whole_rows
    full_offset = (np.arange(len(full_document)) - np.repeat(first_of_document, whole_rows)) * capacity

    left = documents[remainders > 0]
    left = left[np.argsort(-remainders[left], kind="stable")]
    left_rows = best_fit(remainders[left].tolist(), capacity=capacity)

    pieces = np.stack(
        [
            np.concatenate([full_document, left]),
            np.concatenate([full_offset, whole_rows[left] * capacity]),
            np.concatenate([np.full(len(full_document), capacity), remainders[left]]),
        ],
        axis=1,
    )
    rows = np.concatenate([np.arange(len(full_document)), len(full_document) + np.asarray(left_rows, dtype=np.int64)])
    order = np.argsort(rows, kind="stable")
    num_rows = int(rows.max()) + 1 if len(rows) else 0
    return Packing(pieces=pieces[order], row_starts=np.searchsorted(rows[order], np.arange(num_rows + 1)))


def best_fit(sizes: list[int], *, capacity: int) -> list[int]:
    """Return the row of each item: the fullest row that still takes it, or a new one. Sizes come longest first.

    Rows with equal space are interchangeable, so only the distinct spaces are kept in order: never more than
    `capacity` of them.
    """
    rows_with_space: dict[int, list[int]] = {}
    spaces: list[int] = []
    placed = []
    num_rows = 0
    for size in sizes:
        place = bisect_left(spaces, size)
        if place == len(spaces):
            row, space = num_rows, capacity
            num_rows += 1
        else:
            space = spaces[place]
            row = rows_with_space[space].pop()
            if not rows_with_space[space]:
                del rows_with_space[space], spaces[place]
        placed.append(row)
        space -= size
        if space:
            if space not in rows_with_space:
                rows_with_space[space] = []
                insort(spaces, space)
            rows_with_space[space].append(row)
    return placed
