"""Ranks that share the tokens of every row: context parallelism, for rows too long for one device.

Each of R ranks has two pieces of every row, of 2R equal ones the one as far from the beginning as the other is from the
end: what they attend to adds up to the same for all. Every rank computes its own tokens; only attention looks further,
and what it needs of the others is their latents, which all ranks gather: 576 numbers a token and layer in the published
model, where keys and values of all heads are 40,960. Ours; the report shares no rows between ranks.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor

from dsv3.batch import TokenBatch
from dsv3.parallel.link import Link, all_gather_single, reduce_scatter_single


@dataclass(frozen=True, kw_only=True)
class ContextGroup:
    """The ranks that share rows, this one among them."""

    group: dist.ProcessGroup
    size: int
    place: int
    link: Link

    def share(self, rows: TokenBatch) -> TokenBatch:
        """Return the tokens of whole rows that are this rank's."""
        cuts = tuple(cuts_of(length, ranks=self.size) for length in rows.lengths)
        return PiecesOfRows(rows=rows, cuts=cuts, ranks=self).batch()


def cuts_of(length: int, *, ranks: int) -> tuple[int, ...]:
    """Return where a row of so many tokens is cut into 2 x `ranks` pieces, its ends included."""
    return tuple(length * piece // (2 * ranks) for piece in range(2 * ranks + 1))


def pieces_of(rank: int, *, ranks: int) -> tuple[int, int]:
    """Return which two pieces of each row a rank has."""
    return rank, 2 * ranks - 1 - rank


@dataclass(frozen=True, kw_only=True)
class PiecesOfRows:
    """Rows whose tokens are spread over ranks: `SharedRows` of dsv3.batch."""

    rows: TokenBatch
    """Whole, on every rank: tokens are only numbers."""
    cuts: tuple[tuple[int, ...], ...]
    """Of each row."""
    ranks: ContextGroup

    def batch(self) -> TokenBatch:
        """Return this rank's tokens."""
        rows, own = self.rows, self._own_places.to(self.rows.tokens.device)
        pieces = list(self._pieces(self.ranks.place))
        return TokenBatch(
            tokens=rows.tokens[own],
            positions=rows.positions[own],
            starts=torch.tensor([0, *(len(places) for _, places in pieces)]).cumsum(0),
            targets=None if rows.targets is None else rows.targets[own],
            weights=None if rows.weights is None else rows.weights[own],
            first_positions=tuple(places.start for _, places in pieces),
            shared=self,
            experts=None if rows.experts is None else rows.experts[own],
        )

    def to(self, device: torch.device | str) -> "PiecesOfRows":
        """Move the tokens of the rows to a device."""
        return replace(self, rows=self.rows.to(device))

    def ahead(self) -> TokenBatch:
        """Return `TokenBatch.ahead` of the rows, of which each rank has the places that it had."""
        cuts = tuple(
            tuple(min(cut, max(length - 1, 0)) for cut in cuts)
            for cuts, length in zip(self.cuts, self.row_lengths, strict=True)
        )
        return PiecesOfRows(rows=self.rows.ahead(), cuts=cuts, ranks=self.ranks).batch()

    @property
    def row_lengths(self) -> tuple[int, ...]:
        """Tokens of each row, on all ranks together."""
        return self.rows.lengths

    @cached_property
    def row_of_token(self) -> Int[Tensor, " token"]:
        """Which row each of this rank's tokens belongs to."""
        return torch.cat([torch.full((len(places),), row) for row, places in self._pieces(self.ranks.place)])

    @cached_property
    def not_last(self) -> Int[Tensor, " kept"]:
        """Indices of this rank's tokens that are not the last of their row."""
        lasts = self.rows.starts[1:][self.rows.starts.diff() > 0] - 1
        return (~torch.isin(self._own_places, lasts)).nonzero().squeeze(1).to(self.rows.tokens.device)

    @property
    def key_lengths(self) -> tuple[int, ...]:
        """Tokens that each of this rank's pieces may look at: those of its row as far as it goes."""
        return tuple(places.stop for _, places in self._pieces(self.ranks.place))

    @property
    def key_positions(self) -> Int[Tensor, " key"]:
        """Their positions, piece after piece."""
        return torch.cat([torch.arange(length) for length in self.key_lengths]).to(self.rows.tokens.device)

    def gather(self, values: Float[Tensor, "token dim"]) -> Float[Tensor, "key dim"]:
        """Return what all ranks have computed for the tokens that this rank's pieces may look at, piece after piece.

        The gradient of a token's values is summed on the rank that has computed them.
        """
        everyone = _GatheredRows.apply(values, self.ranks, max(self._counts))
        return everyone.index_select(0, self._places_of_keys.to(values.device))

    def total(self, counts: Tensor) -> Tensor:
        """Return numbers summed over the ranks that share the rows; they pass no gradient."""
        sums = counts.detach().clone()
        with self.ranks.link.waiting():
            dist.all_reduce(sums, group=self.ranks.group)
        return sums

    def _pieces(self, rank: int) -> Iterator[tuple[int, range]]:
        """Yield the pieces of a rank as the row and places within it."""
        for row, cuts in enumerate(self.cuts):
            for piece in pieces_of(rank, ranks=self.ranks.size):
                yield row, range(cuts[piece], cuts[piece + 1])

    def _places(self, rank: int) -> Int[Tensor, " token"]:
        """Return where the tokens of a rank lie in the rows, end to end."""
        starts: Sequence[int] = self.rows.starts.tolist()
        return torch.cat([torch.arange(places.start, places.stop) + starts[row] for row, places in self._pieces(rank)])

    @cached_property
    def _own_places(self) -> Int[Tensor, " token"]:
        return self._places(self.ranks.place)

    @cached_property
    def _counts(self) -> list[int]:
        """Tokens of each rank."""
        return [sum(len(places) for _, places in self._pieces(rank)) for rank in range(self.ranks.size)]

    @cached_property
    def _places_of_keys(self) -> Int[Tensor, " key"]:
        """Where each key lies in what all ranks have sent, each as much as the one with most."""
        found = torch.empty(self.rows.num_tokens, dtype=torch.long)
        for rank, count in enumerate(self._counts):
            found[self._places(rank)] = torch.arange(count) + rank * max(self._counts)
        starts: Sequence[int] = self.rows.starts.tolist()
        pieces = self._pieces(self.ranks.place)
        return torch.cat([found[starts[row] : starts[row] + places.stop] for row, places in pieces])


class _GatheredRows(torch.autograd.Function):
    """All ranks' rows one after the other, each padded to `room`; backward, the sums of what all ranks ask of them."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, ranks: ContextGroup, room: int) -> Tensor:
        ctx.ranks, ctx.count = ranks, len(rows)
        padded = rows.new_zeros(room, rows.shape[1])
        padded[: len(rows)] = rows
        everyone = rows.new_empty(ranks.size * room, rows.shape[1])
        with ranks.link.waiting():
            all_gather_single(everyone, padded, group=ranks.group)
        return everyone

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = gradients
        ranks: ContextGroup = ctx.ranks
        own = gradient.new_empty(len(gradient) // ranks.size, gradient.shape[1])
        with ranks.link.waiting():
            reduce_scatter_single(own, gradient.contiguous(), group=ranks.group)
        return own[: ctx.count], None, None
