"""All-to-all between the ranks of a group, with as many rows for each as there are; gradients travel back."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor

from dsv3.parallel.wire import AS_COMPUTED, Wire


@dataclass(frozen=True, kw_only=True, slots=True)
class Splits:
    """How many rows go to each rank of a group, and how many come from each."""

    sent: tuple[int, ...]
    received: tuple[int, ...]

    @property
    def reversed(self) -> "Splits":
        """The way back."""
        return Splits(sent=self.received, received=self.sent)


def exchange_counts(sent: Sequence[int], *, group: dist.ProcessGroup) -> Splits:
    """Tell every rank how many rows it will get; the one exchange that the processor has to wait for."""
    received = torch.empty(len(sent), dtype=torch.long)
    dist.all_to_all_single(received, torch.tensor(sent), group=group)
    return Splits(sent=tuple(sent), received=tuple(received.tolist()))


def exchange(
    rows: Float[Tensor, "sent column"],
    *,
    splits: Splits,
    group: dist.ProcessGroup,
    out: Wire = AS_COMPUTED,
    back: Wire = AS_COMPUTED,
) -> Float[Tensor, "received column"]:
    """Return the rows that all ranks have sent here, in order of rank; `rows` are ordered by the rank they go to.

    They travel in the form `out`, and their gradients travel back in the form `back`.
    """
    return _Exchange.apply(rows, splits, group, out, back)


def exchange_numbers(
    numbers: Int[Tensor, "sent column"], *, splits: Splits, group: dist.ProcessGroup
) -> Int[Tensor, "received column"]:
    """Do the same with whole numbers."""
    return _all_to_all(numbers, splits=splits, group=group)


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, splits: Splits, group: dist.ProcessGroup, out: Wire, back: Wire) -> Tensor:
        ctx.splits, ctx.group, ctx.back = splits, group, back
        return _travel(rows, splits=splits, group=group, wire=out)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None, None]:
        returned = _travel(gradients[0], splits=ctx.splits.reversed, group=ctx.group, wire=ctx.back)
        return returned, None, None, None, None


def _travel(rows: Tensor, *, splits: Splits, group: dist.ProcessGroup, wire: Wire) -> Tensor:
    received = _all_to_all(wire.encode(rows), splits=splits, group=group)
    return wire.decode(received, columns=rows.shape[1], dtype=rows.dtype)


def _all_to_all(rows: Tensor, *, splits: Splits, group: dist.ProcessGroup) -> Tensor:
    received = rows.new_empty(sum(splits.received), *rows.shape[1:])
    dist.all_to_all_single(received, rows.contiguous(), list(splits.received), list(splits.sent), group=group)
    return received
