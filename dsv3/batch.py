"""TokenBatch: the one record that every forward pass eats.

Pre-training, prefill, decode and the policy update all read it, so the model has no modes. Sequences lie end to end
in flat tensors; `starts` says where each begins. A packed row of pre-training is one sequence, since the report
masks nothing between the documents of a row (4.1); SFT samples in a row are several.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, chain
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

IGNORE = -100
"""A target that is not trained on."""


@runtime_checkable
class SharedRows(Protocol):
    """Rows of which the tokens of a batch are pieces, the others being on other ranks (context parallelism)."""

    @property
    def row_of_token(self) -> Int[Tensor, " token"]:
        """Which row each token belongs to."""
        ...

    @property
    def not_last(self) -> Int[Tensor, " kept"]:
        """Indices of the tokens here that are not the last of their row."""
        ...

    @property
    def row_lengths(self) -> tuple[int, ...]:
        """Tokens of each row, on all ranks together."""
        ...

    @property
    def key_lengths(self) -> tuple[int, ...]:
        """Tokens that each piece here may look at: those of its row as far as it goes."""
        ...

    @property
    def key_positions(self) -> Int[Tensor, " key"]:
        """Their positions, piece after piece."""
        ...

    def gather(self, values: Float[Tensor, "token dim"]) -> Float[Tensor, "key dim"]:
        """Return what all ranks have computed for those tokens."""
        ...

    def total(self, counts: Tensor) -> Tensor:
        """Return numbers summed over the ranks that share the rows; they pass no gradient."""
        ...

    def ahead(self) -> "TokenBatch":
        """Return `TokenBatch.ahead` of the rows, of which each rank has the places that it had."""
        ...

    def to(self, device: torch.device | str) -> "SharedRows":
        """Move to a device what is best there."""
        ...


@dataclass(frozen=True, kw_only=True)
class TokenBatch:
    """Sequences of tokens laid end to end."""

    tokens: Int[Tensor, " token"]
    positions: Int[Tensor, " token"]
    """Position of each token within its own sequence. A sequence that starts above 0 continues a cached one."""
    starts: Int[Tensor, " sequence_plus_one"]
    """Where each sequence begins in `tokens`, and at the end their number. Always on the CPU: lengths decide shapes."""
    targets: Int[Tensor, " token"] | None = None
    """The token to predict at each place; `IGNORE` is not trained on."""
    weights: Float[Tensor, " token"] | None = None
    """Weight of each target in the loss; absent means 1."""
    first_positions: tuple[int, ...] | None = None
    """Position of the first token of each sequence, where the caller knows it; see `firsts`."""
    shared: SharedRows | None = None
    """What the sequences are pieces of; None where they are whole, or go on after what is cached."""
    experts: Int[Tensor, "token layer chosen"] | None = None
    """The experts that each token goes to, in every layer of the main model that has some; absent, routers choose."""

    @classmethod
    def from_rows(cls, rows: Int[Tensor, "row length_plus_one"]) -> "TokenBatch":
        """Make a training batch from packed rows of T + 1 tokens: T inputs, each with the next token as target."""
        num_rows, length = rows.shape[0], rows.shape[1] - 1
        return cls(
            tokens=rows[:, :-1].reshape(-1),
            positions=torch.arange(length, device=rows.device).repeat(num_rows),
            starts=torch.arange(num_rows + 1) * length,
            targets=rows[:, 1:].reshape(-1),
            first_positions=(0,) * num_rows,
        )

    @classmethod
    def from_sequences(cls, sequences: list[list[int]]) -> "TokenBatch":
        """Make a batch without targets from lists of token ids, each starting at position 0."""
        return cls.from_pieces(sequences, firsts=(0,) * len(sequences))

    @classmethod
    def from_pieces(cls, pieces: Sequence[Sequence[int]], *, firsts: Sequence[int]) -> "TokenBatch":
        """Make a batch without targets from pieces of sequences, each going on at its first position."""
        places = [range(first, first + len(piece)) for piece, first in zip(pieces, firsts, strict=True)]
        return cls(
            tokens=torch.tensor(list(chain.from_iterable(pieces)), dtype=torch.long),
            positions=torch.tensor(list(chain.from_iterable(places)), dtype=torch.long),
            starts=torch.tensor([0, *accumulate(map(len, pieces))]),
            first_positions=tuple(firsts),
        )

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each sequence."""
        return tuple(self.starts.diff().tolist())

    @cached_property
    def firsts(self) -> tuple[int, ...]:
        """Position of the first token of each sequence, 0 for an empty one; on the CPU, so that no layer waits."""
        if self.first_positions is not None:
            return self.first_positions
        positions = self.positions.tolist()
        starts = self.starts.tolist()
        return tuple(positions[start] if length else 0 for start, length in zip(starts, self.lengths, strict=False))

    @property
    def ends(self) -> tuple[int, ...]:
        """One more than the position of the last token of each sequence."""
        return tuple(first + length for first, length in zip(self.firsts, self.lengths, strict=True))

    @property
    def num_tokens(self) -> int:
        """Tokens of all sequences."""
        return self.tokens.shape[0]

    @property
    def num_rows(self) -> int:
        """Sequences, or rows that they are pieces of."""
        return len(self.lengths) if self.shared is None else len(self.shared.row_lengths)

    @property
    def row_length(self) -> int | None:
        """Common length of all sequences, or None when they differ; equal rows take the batched path of attention."""
        lengths = set(self.lengths)
        return lengths.pop() if len(lengths) == 1 else None

    def to(self, device: torch.device | str) -> "TokenBatch":
        """Move to a device everything but `starts`."""
        return replace(
            self,
            tokens=self.tokens.to(device),
            positions=self.positions.to(device),
            targets=None if self.targets is None else self.targets.to(device),
            weights=None if self.weights is None else self.weights.to(device),
            first_positions=self.firsts,
            shared=None if self.shared is None else self.shared.to(device),
            experts=None if self.experts is None else self.experts.to(device),
        )

    @cached_property
    def not_last(self) -> Int[Tensor, " kept"]:
        """Indices of all tokens but the last of each sequence, or of the row it is a piece of."""
        if self.shared is not None:
            return self.shared.not_last
        keep = torch.ones(self.num_tokens, dtype=torch.bool)
        ends = self.starts[1:][self.starts.diff() > 0]
        keep[ends - 1] = False
        return keep.nonzero().squeeze(1).to(self.tokens.device)

    def ahead(self) -> "TokenBatch":
        """What the next MTP module eats: tokens and targets one further on, positions as they are, last places gone.

        Row j of the result stands for place `not_last[j]` of this batch, and must be joined with the hidden state
        of that place. Source: report 2.2, eq. 21: h^k_i reads Emb(t_{i+k}) and has t_{i+k+1} as its target.
        """
        if self.shared is not None:
            return self.shared.ahead()
        keep = self.not_last
        shortened = torch.tensor([0] + [max(length - 1, 0) for length in self.lengths]).cumsum(0)
        return TokenBatch(
            tokens=self.tokens[keep + 1],
            positions=self.positions[keep],
            starts=shortened,
            targets=None if self.targets is None else self.targets[keep + 1],
            weights=None if self.weights is None else self.weights[keep + 1],
            first_positions=self.firsts,
        )
