"""Texts that are the same or nearly so: signatures, pairs by band, groups, and which documents are dropped.

One band more than MinHash has holds a hash of the whole text, so that exact copies take the same way. Of every group
the first document stays, in the order of the inputs.

Source: Broder 1997 (MinHash); Leskovec et al., 'Mining of Massive Datasets', chapter 3 (bands).
"""

from collections import Counter
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int, Shaped, UInt32, UInt64
from numpy import ndarray

from dsv3.config.curation import DuplicateConfig
from dsv3.data.curation.words import MULTIPLIER, Words, mixed
from dsv3.data.shards import load_array, save_array

SHINGLES_AT_A_TIME = 512
"""A table of so many shingles by all hash functions stays in a cache: four times as fast as one of 4,096."""
NEAR, EXACT = "nearly the same text", "the same text"
LARGEST_GROUPS = 20
"""Groups of which the card shows a document."""


def probability_of_a_find(similarity: float, *, config: DuplicateConfig) -> float:
    """Return how likely MinHash finds two texts with this share of common shingles (Jaccard)."""
    return 1 - (1 - similarity**config.rows) ** config.bands


class Signer:
    """Makes signatures."""

    def __init__(self, config: DuplicateConfig) -> None:
        self.config = config
        generator = np.random.default_rng(config.seed)
        count = config.bands * config.rows
        self._factors = generator.integers(0, 2**63, size=count, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
        self._terms = generator.integers(0, 2**63, size=count, dtype=np.uint64)

    def sign(self, text: str, *, words: Words) -> UInt32[ndarray, "band row"]:
        """Return the signature of a text, a band a row; the last band is a hash of the text itself."""
        exact = np.frombuffer(_digest(text, size=4 * self.config.rows), dtype=np.uint32)
        if not self.config.near:
            return exact[None]
        size = min(self.config.shingle_words, len(words))
        if not size or len(words) < self.config.min_near_words:
            # A text without a word, or with few, is like no other; its own hash in every band says so.
            return np.tile(exact, (self.config.bands + 1, 1))
        least = self._least(np.unique(words.rows(size)))
        return np.concatenate([least.reshape(self.config.bands, self.config.rows), exact[None]])

    def _least(self, shingles: UInt64[ndarray, " shingle"]) -> UInt32[ndarray, " function"]:
        least = np.full(len(self._factors), 2**64 - 1, dtype=np.uint64)
        for start in range(0, len(shingles), SHINGLES_AT_A_TIME):
            hashed = shingles[start : start + SHINGLES_AT_A_TIME, None] * self._factors
            hashed += self._terms
            np.minimum(least, hashed.min(axis=0), out=least)
        return (least >> np.uint64(32)).astype(np.uint32)


def _digest(text: str, *, size: int) -> bytes:
    whole = blake2b(text.strip().encode("utf-8", "surrogatepass")).digest()
    return (whole * -(-size // len(whole)))[:size]


def bands_of(config: DuplicateConfig) -> int:
    """Return how many bands a signature has, the exact one with them."""
    return (config.bands if config.near else 0) + 1


def save_signatures(signatures: list[UInt32[ndarray, "band row"]], *, folder: Path, task: int, bands: int) -> None:
    """Write the signatures of a task's documents, band after band, so that each lies in one piece."""
    folder.mkdir(parents=True, exist_ok=True)
    table = np.stack(signatures, axis=1) if signatures else np.empty((bands, 0, 1), dtype=np.uint32)
    save_array(table, path=folder / f"{task:05d}.npy")


def find_pairs(folder: Path, *, band: int, tasks: int) -> Int[ndarray, "pair 2"]:
    """Return neighbours with the same signature in a band, as numbers of documents over all tasks, the lower first.

    Holds the hashes of one band in memory: 16 bytes a document.
    """
    files = (load_array(folder / f"{task:05d}.npy") for task in range(tasks))
    hashed = np.concatenate([_one_number(file[band]) for file in files])
    order = np.argsort(hashed, kind="stable")  # Stable: documents with one signature stay in their order.
    same = hashed[order[1:]] == hashed[order[:-1]]
    return np.stack([order[:-1][same], order[1:][same]], axis=1)


def _one_number(rows: Shaped[ndarray, "document row"]) -> UInt64[ndarray, " document"]:
    """Return 64 bits for each row of a band: two of a billion documents share them by chance once in 40 corpora."""
    if not len(rows):
        return np.empty(0, dtype=np.uint64)
    columns = np.asarray(rows).T.astype(np.uint64)
    hashed = np.zeros(len(rows), dtype=np.uint64)
    for column in columns:
        hashed = mixed(hashed * MULTIPLIER + column)
    return hashed


def group_roots(pairs: Int[ndarray, "pair 2"]) -> tuple[Int[ndarray, " node"], Int[ndarray, " node"]]:
    """Return the documents that are in any pair, in order, and the first document of the group of each.

    Every node takes the lowest root it can see, until nothing changes: logarithmically many sweeps.
    """
    nodes, places = np.unique(pairs, return_inverse=True)
    ends = places.reshape(-1, 2)
    roots = np.arange(len(nodes))
    while True:
        lowest = np.minimum(roots[ends[:, 0]], roots[ends[:, 1]])
        before = roots.copy()
        # The root of each end, and the end itself, learn of the lower root.
        for end in (0, 1):
            np.minimum.at(roots, before[ends[:, end]], lowest)
            np.minimum.at(roots, ends[:, end], lowest)
        while (roots[roots] != roots).any():
            roots = roots[roots]
        if (roots == before).all():
            return nodes, nodes[roots]


@dataclass(frozen=True, kw_only=True)
class Dropped:
    """The documents of one task that are dropped."""

    index: Int[ndarray, " document"]
    """Their numbers within the task."""
    first: Int[ndarray, " document"]
    """The document that stays in the place of each: its number over all tasks."""
    is_exact: Bool[ndarray, " document"]
    """Whether it is the same text as an earlier one."""


@dataclass(frozen=True, kw_only=True)
class Grouping:
    """What the pairs of all bands make."""

    dropped: list[Dropped]
    """By task."""
    group_sizes: Counter[int]
    """Documents of a group -> how many groups have so many."""
    largest: list[tuple[int, int]]
    """First document and size of the largest groups."""


def group(near: list[Int[ndarray, "_ 2"]], *, exact: Int[ndarray, "pair 2"], documents: list[int]) -> Grouping:
    """Join pairs into groups, and divide what is dropped among the tasks, which have so many documents each."""
    starts = np.cumsum([0, *documents])
    copies = set_of_copies(exact)
    nodes, roots = group_roots(np.concatenate([*near, exact]))
    groups, sizes = np.unique(roots, return_counts=True)
    gone = nodes != roots
    index, first = nodes[gone], roots[gone]
    bounds = np.searchsorted(index, starts)
    largest = np.argsort(-sizes, kind="stable")[:LARGEST_GROUPS]
    return Grouping(
        dropped=[
            Dropped(
                index=index[begin:end] - start,
                first=first[begin:end],
                is_exact=np.isin(index[begin:end], copies, assume_unique=True),
            )
            for begin, end, start in zip(bounds[:-1], bounds[1:], starts[:-1], strict=True)
        ],
        group_sizes=Counter(sizes.tolist()),
        largest=[(int(groups[place]), int(sizes[place])) for place in largest],
    )


def set_of_copies(exact: Int[ndarray, "pair 2"]) -> Int[ndarray, " document"]:
    """Return the documents that are the same as an earlier one, in order."""
    nodes, roots = group_roots(exact)
    return nodes[nodes != roots]
