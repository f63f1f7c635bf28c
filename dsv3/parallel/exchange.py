"""All-to-all between the ranks of a group, with as many rows for each as there are; gradients travel back."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Shaped
from torch import Tensor


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
    rows: Shaped[Tensor, "sent ..."], *, splits: Splits, group: dist.ProcessGroup
) -> Shaped[Tensor, "received ..."]:
    """Return the rows that all ranks have sent here, in order of rank; `rows` are ordered by the rank they go to."""
    return _Exchange.apply(rows, splits, group)


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, splits: Splits, group: dist.ProcessGroup) -> Tensor:
        ctx.splits, ctx.group = splits, group
        return _all_to_all(rows, splits=splits, group=group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return _all_to_all(gradients[0], splits=ctx.splits.reversed, group=ctx.group), None, None


def _all_to_all(rows: Tensor, *, splits: Splits, group: dist.ProcessGroup) -> Tensor:
    received = rows.new_empty(sum(splits.received), *rows.shape[1:])
    dist.all_to_all_single(received, rows.contiguous(), list(splits.received), list(splits.sent), group=group)
    return received
