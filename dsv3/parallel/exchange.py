"""All-to-all between the ranks of a group, with as many rows for each as there are; gradients travel back.

Every exchange is begun and ended by two calls, and so is that of its gradients: what ends it forward begins it in the
backward pass. Between the two something else can be computed.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from dsv3.parallel.link import Link, Message
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


@dataclass(frozen=True, kw_only=True)
class Channel:
    """A group of ranks, and the network between them."""

    group: dist.ProcessGroup
    link: Link = field(default_factory=Link)

    def begin(self, rows: Tensor, *, splits: Splits) -> "Pending":
        """Begin to exchange rows, which are ordered by the rank they go to."""
        rows = rows.contiguous()
        received = rows.new_empty(sum(splits.received), *rows.shape[1:])
        message = self.link.begin(rows.nbytes)
        work = dist.all_to_all_single(
            received, rows, list(splits.received), list(splits.sent), group=self.group, async_op=True
        )
        return Pending(channel=self, work=work, message=message, received=received, sent=rows)


@dataclass(frozen=True, kw_only=True)
class Pending:
    """Rows under way."""

    channel: Channel
    work: dist.Work
    message: Message
    received: Tensor
    sent: Tensor
    """Kept until they have gone."""

    def end(self) -> Tensor:
        """Return the rows that all ranks have sent here, in order of rank."""
        self.channel.link.end(self.work, message=self.message)
        return self.received


@dataclass(frozen=True, kw_only=True)
class PendingCounts:
    """Numbers of rows under way."""

    sent: tuple[int, ...]
    pending: Pending

    def end(self) -> Splits:
        """Return them; the one time that the processor has to wait before it can go on."""
        return Splits(sent=self.sent, received=tuple(self.pending.end().tolist()))


def begin_counts(sent: Sequence[int], *, channel: Channel) -> PendingCounts:
    """Begin to tell every rank how many rows it will get."""
    one = Splits(sent=(1,) * len(sent), received=(1,) * len(sent))
    return PendingCounts(sent=tuple(sent), pending=channel.begin(torch.tensor(sent), splits=one))


@dataclass(kw_only=True)
class Flight:
    """Rows under way, and in the backward pass their gradients: once there, once back."""

    channel: Channel
    splits: Splits
    out: Wire
    back: Wire
    columns: int
    dtype: torch.dtype
    pending: Pending | None = None

    def depart(self, rows: Tensor) -> None:
        """Begin to send rows."""
        self.pending = self.channel.begin(self.out.encode(rows), splits=self.splits)

    def arrive(self) -> Tensor:
        """Return the rows that have come."""
        return self.out.decode(self._landed(), columns=self.columns, dtype=self.dtype)

    def depart_back(self, gradients: Tensor) -> None:
        """Begin to send the gradients of the rows that came."""
        self.pending = self.channel.begin(self.back.encode(gradients), splits=self.splits.reversed)

    def arrive_back(self) -> Tensor:
        """Return the gradients of the rows that were sent."""
        return self.back.decode(self._landed(), columns=self.columns, dtype=self.dtype)

    def _landed(self) -> Tensor:
        assert self.pending is not None, "nothing is under way"
        pending, self.pending = self.pending, None
        return pending.end()


@dataclass(frozen=True, kw_only=True)
class Departed:
    """Rows under way, as autograd sees them."""

    ticket: Float[Tensor, ""]
    """Stands for them in the graph; a number of no meaning."""
    flight: Flight


def depart(
    rows: Float[Tensor, "sent column"],
    *,
    splits: Splits,
    channel: Channel,
    out: Wire = AS_COMPUTED,
    back: Wire = AS_COMPUTED,
) -> Departed:
    """Begin to send rows, ordered by the rank they go to, in the form `out`; gradients will come in the form `back`."""
    flight = Flight(channel=channel, splits=splits, out=out, back=back, columns=rows.shape[1], dtype=rows.dtype)
    return Departed(ticket=_Depart.apply(rows, flight), flight=flight)


def arrive(departed: Departed) -> Float[Tensor, "received column"]:
    """Return the rows that all ranks have sent here, in order of rank."""
    return _Arrive.apply(departed.ticket, departed.flight)


class _Depart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, flight: Flight) -> Tensor:
        ctx.flight = flight
        flight.depart(rows)
        return rows.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *tickets: Tensor) -> tuple[Tensor, None]:
        del tickets
        return ctx.flight.arrive_back(), None


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ticket: Tensor, flight: Flight) -> Tensor:
        del ticket
        ctx.flight = flight
        return flight.arrive()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        ctx.flight.depart_back(gradients[0])
        return gradients[0].new_zeros(()), None
