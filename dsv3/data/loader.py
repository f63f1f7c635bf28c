"""Training rows by number: a pure function of the seed and the row's index, so that resuming needs no state.

Row i of a run is the same row on any number of ranks and after any number of restarts.
"""

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int
from numpy import ndarray
from torch import Tensor

from dsv3.batch import IGNORE, TokenBatch
from dsv3.config import PretrainConfig, ShareConfig
from dsv3.data.chance import hash_parts
from dsv3.data.corpus import named_sources
from dsv3.data.mixture import AnnealedMixture, Mixture, shared_weights
from dsv3.data.packing import Packing, pack
from dsv3.data.permutation import permuted
from dsv3.data.prepared import PreparedCorpus
from dsv3.data.shards import Shard, load_array, save_array, shard_files
from dsv3.errors import ConfigError, DataError

FILLER = -1
"""Where a row has no token: at the end of the few rows that no document fills."""
MAX_OPEN_SHARDS = 64
"""Shards mapped at a time for one source; each holds a file open."""


@dataclass(frozen=True, kw_only=True)
class Location:
    """Part of a document that lies in a row."""

    source: str
    document: str
    offset: int
    """First token of the document that is in the row; BOS is token 0."""
    length: int


@dataclass(frozen=True, kw_only=True)
class _PackedShard:
    shard: Shard
    packing: Packing


@dataclass(frozen=True, kw_only=True)
class RowCounts:
    """Rows of one source."""

    rows: int
    long: int
    """Those that one document fills."""


class _SourceRows:
    """The rows of one source: shards one after the other, each packed by itself.

    With `long_first` the rows that one document fills come before all others, those of all shards.
    """

    def __init__(self, folder: Path, *, vocab_size: int, sequence_length: int, long_first: bool = False) -> None:
        self.folder = folder
        self.vocab_size = vocab_size
        self.sequence_length = sequence_length
        self.long_first = long_first
        self._open: OrderedDict[int, _PackedShard] = OrderedDict()

    @cached_property
    def files(self) -> list[Path]:
        return list(shard_files(self.folder))

    @cached_property
    def shard_rows(self) -> list[RowCounts]:
        """Rows of each shard."""
        packings = (packed_rows(Shard(file, vocab_size=self.vocab_size), self.sequence_length) for file in self.files)
        return [
            RowCounts(rows=packing.num_rows, long=packing.num_long(self.sequence_length + 1)) for packing in packings
        ]

    @cached_property
    def counts(self) -> RowCounts:
        """Of all shards."""
        return RowCounts(
            rows=sum(shard.rows for shard in self.shard_rows), long=sum(shard.long for shard in self.shard_rows)
        )

    @cached_property
    def parts(self) -> list[int]:
        """Rows that are shuffled among themselves."""
        counts = self.counts
        return [part for part in (counts.long, counts.rows - counts.long) if part] if self.long_first else [counts.rows]

    @cached_property
    def _stretches(self) -> list[tuple[int, range]]:
        """Consecutive rows within a shard, in the order in which they are counted here."""
        whole = [(shard, range(counts.rows)) for shard, counts in enumerate(self.shard_rows)]
        if not self.long_first:
            return whole
        ends = [counts.long for counts in self.shard_rows]
        return [(shard, rows[: ends[shard]]) for shard, rows in whole] + [
            (shard, rows[ends[shard] :]) for shard, rows in whole
        ]

    @cached_property
    def _last_rows(self) -> list[int]:
        """Number of rows up to and including each stretch."""
        return list(accumulate(len(rows) for _, rows in self._stretches))

    def find(self, row: int) -> tuple[_PackedShard, Int[ndarray, "piece 3"]]:
        """Return the shard that holds a row of this source, and the pieces of the row."""
        place = bisect_right(self._last_rows, row)
        shard, rows = self._stretches[place]
        if shard not in self._open:
            opened = Shard(self.files[shard], vocab_size=self.vocab_size)
            self._open[shard] = _PackedShard(shard=opened, packing=packed_rows(opened, self.sequence_length))
            if len(self._open) > MAX_OPEN_SHARDS:
                self._open.popitem(last=False)
        self._open.move_to_end(shard)
        packed = self._open[shard]
        return packed, packed.packing.row(rows[row - (self._last_rows[place - 1] if place else 0)])


class RowLoader:
    """Rows of `sequence_length + 1` tokens for training, mixed by weight, shuffled within each source."""

    def __init__(self, prepared: PreparedCorpus, *, config: PretrainConfig, sequence_length: int, seed: int) -> None:
        """Open a prepared corpus.

        Weights come from `config.data.sources`; sources whose package is absent are left out.

        Raises:
            ConfigError: the configuration names other sources than the corpus holds, or weighs only some of them.
            DataError: a file of the corpus is missing or damaged.
        """
        self.sequence_length = sequence_length
        self.seed = seed
        self.sources = prepared.sources
        self._rows = [
            _SourceRows(
                prepared.source_folder(source),
                vocab_size=prepared.vocab_size,
                sequence_length=sequence_length,
                long_first=config.batch.long_documents_first,
            )
            for source in prepared.sources
        ]
        self._mixture = _mixture(prepared, config=config, sequence_length=sequence_length, seed=seed)
        weights = source_weights(prepared, config=config)
        for source, rows, weight in zip(self.sources, self._rows, weights, strict=True):
            if weight and not rows.counts.rows:
                raise DataError(f"the corpus at {prepared.folder} has no rows of '{source.name}'; prepare it again")
        self._pad_id = prepared.tokenizer().pad_id

    @property
    def rows_per_epoch(self) -> dict[str, int]:
        """Rows of each source; it begins again, in another order, when they have all been used."""
        return {source.name: rows.counts.rows for source, rows in zip(self.sources, self._rows, strict=True)}

    def rows(self, start: int, *, count: int, rank: int = 0, world_size: int = 1) -> Int[Tensor, "row length_plus_one"]:
        """Return this rank's share of rows `start` to `start + count`: every `world_size`-th from `start + rank` on.

        A place without a token holds `FILLER`, always at the end of a row; `batch` gives such places no target.
        """
        indices = range(start + rank, start + count, world_size)
        rows = np.full((len(indices), self.sequence_length + 1), FILLER, dtype=np.int64)
        for place, index in enumerate(indices):
            source, row = self._source_row(index)
            packed, pieces = self._rows[source].find(row)
            filled = 0
            for document, offset, length in pieces.tolist():
                begin = int(packed.shard.offsets[document]) + offset
                rows[place, filled : filled + length] = packed.shard.tokens[begin : begin + length]
                filled += length
        return torch.from_numpy(rows)

    def batch(self, start: int, *, count: int, rank: int = 0, world_size: int = 1) -> TokenBatch:
        """Return the same rows as a training batch; places without a token read padding and train nothing."""
        return to_batch(self.rows(start, count=count, rank=rank, world_size=world_size), pad_id=self._pad_id)

    def locate(self, row_index: int) -> list[Location]:
        """Return what lies in a row, from left to right, to name the text behind a failure."""
        source, row = self._source_row(row_index)
        packed, pieces = self._rows[source].find(row)
        return [
            Location(
                source=self.sources[source].name,
                document=packed.shard.document_name(document),
                offset=offset,
                length=length,
            )
            for document, offset, length in pieces.tolist()
        ]

    def _source_row(self, index: int) -> tuple[int, int]:
        """Return the source of a training row, and the row of that source: shuffled anew for each epoch."""
        source, drawn = self._mixture.locate(index)
        rows = self._rows[source]
        epoch, place = divmod(drawn, rows.counts.rows)
        first = 0
        for count in rows.parts:
            if place < first + count:
                break
            first += count
        return source, first + permuted(place - first, count=count, key=hash_parts("order", self.seed, source, epoch))


def count_rows(prepared: PreparedCorpus, *, sequence_length: int) -> dict[str, RowCounts]:
    """Return the rows of each source, and how many of them one document fills.

    Raises:
        DataError: a file of the corpus is missing or damaged.
    """
    return {
        source.name: _SourceRows(
            prepared.source_folder(source), vocab_size=prepared.vocab_size, sequence_length=sequence_length
        ).counts
        for source in prepared.sources
    }


def to_batch(rows: Int[Tensor, "row length_plus_one"], *, pad_id: int) -> TokenBatch:
    """Turn rows into a training batch, `FILLER` into padding without a target."""
    batch = TokenBatch.from_rows(rows)
    assert batch.targets is not None
    return TokenBatch(
        tokens=batch.tokens.masked_fill(batch.tokens == FILLER, pad_id),
        positions=batch.positions,
        starts=batch.starts,
        targets=batch.targets.masked_fill(batch.targets == FILLER, IGNORE),
    )


def packed_rows(shard: Shard, sequence_length: int) -> Packing:
    """Return the packing of a shard for one sequence length; made once, then read from beside the shard."""
    pieces = shard.file.with_suffix(f".rows-{sequence_length}.pieces.npy")
    starts = shard.file.with_suffix(f".rows-{sequence_length}.starts.npy")
    if not starts.is_file():
        packing = pack(np.diff(shard.offsets), capacity=sequence_length + 1)
        try:
            save_array(packing.pieces, path=pieces)
            save_array(packing.row_starts, path=starts)
        except OSError:  # A corpus on a full or read-only disk serves all the same; it is packed again next time.
            return packing
    return Packing(pieces=load_array(pieces), row_starts=load_array(starts))


def _mixture(
    prepared: PreparedCorpus, *, config: PretrainConfig, sequence_length: int, seed: int
) -> Mixture | AnnealedMixture:
    """Return what deals rows to sources."""
    first = Mixture(source_weights(prepared, config=config), seed=seed)
    mixture = config.data.mixture
    if not mixture.annealing:
        return first
    last = Mixture(_shared(prepared, config=config, shares=mixture.annealing), seed=seed)
    from_row = -(-max(config.total_tokens - mixture.annealing_tokens, 0) // sequence_length)
    return AnnealedMixture(first, last=last, from_row=from_row)


def source_weights(prepared: PreparedCorpus, *, config: PretrainConfig) -> list[float]:
    """Return the weight of each prepared source: as configured, or its tokens where nothing says otherwise."""
    names = [source.name for source in prepared.sources]
    weights = {source.name: source.weight for source in named_sources(config.data)}
    if not any(source.domain for source in prepared.sources):
        missing = sorted(set(weights) - set(names) - {source.name for source in prepared.absent})
        unknown = sorted(set(names) - set(weights))
        if missing or unknown:
            raise ConfigError(
                f"data.sources names {', '.join(weights)}, but the corpus at {prepared.folder} was made from "
                f"{', '.join(names)}; use the settings it was made with, or another run folder"
            )
        check_weights(config)
        configured = [float(weights[name]) for name in names]
        if any(configured):
            return configured
    return _shared(prepared, config=config, shares=config.data.mixture.shares)


def _shared(prepared: PreparedCorpus, *, config: PretrainConfig, shares: Sequence[ShareConfig]) -> list[float]:
    tokens = [(source.name, float(source.tokens)) for source in prepared.sources]
    return shared_weights(tokens, shares=shares, temperature=config.data.mixture.temperature)


def check_weights(config: PretrainConfig) -> None:
    """Raise ConfigError when only some sources have a weight, or a mixture too: these are not on one scale."""
    sources = named_sources(config.data)
    mixture = config.data.mixture
    if any(source.weight for source in sources) and (mixture.shares or mixture.temperature != 1):
        raise ConfigError(
            "data.sources gives weights, and data.mixture says something else; leave out one of them "
            "(data.sources of the quickstart's corpus have weights)"
        )
    without = [source.name for source in sources if not source.weight]
    if without and len(without) < len(sources):
        raise ConfigError(
            f"data.sources gives {', '.join(without)} no weight, and others one; give every source a weight, "
            "or none to draw each by its number of tokens"
        )
