"""Expert parallelism: tokens travel to the ranks that hold their experts, and their outputs travel back.

One copy of a token goes to each rank that has some of its experts, however many these are; there it is copied for each
of them, and their outputs are summed before one row goes back. Over several nodes it takes two hops (report 3.2.2): one
copy goes over the slow link to each node that has experts for it, to the rank with the sender's own place in the node,
and from there over the fast one to the ranks that hold them. On the way back a node's outputs are summed in the node
before one row leaves it. A rank holds consecutive experts, so that with `n_group` groups on as many nodes the router's
limit of `topk_group` groups is a limit of nodes.

Both are chains of the same `Hop`. DeepEP, which does it with kernels of its own, would be another `TokenDispatch`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dsv3.model.interfaces import DispatchedTokens, Routing
from dsv3.ops.permute import add_by_index
from dsv3.parallel.exchange import (
    Channel,
    Departed,
    Pending,
    PendingCounts,
    Splits,
    arrive,
    begin_counts,
    depart,
)
from dsv3.parallel.wire import AS_COMPUTED, Wire


@dataclass(kw_only=True)
class Traffic:
    """What one hop has moved since it was made, from this rank to others, in forward passes alone.

    Rows that stay on their rank are not counted. Backward passes move as many again, the other way.
    """

    tokens: int = 0
    """Rows that were to be sent from here, each to one rank or to several."""
    copies: int = 0
    """What became of them, to other ranks."""
    dispatch_bytes: int = 0
    """Rows, and which experts they are for."""
    combine_bytes: int = 0
    """Rows that went back from here."""


@dataclass(frozen=True, kw_only=True)
class Given:
    """Rows with the experts they are for, as a rank counts them: -1 where a choice is for others."""

    rows: Float[Tensor, "row hidden"]
    places: Int[Tensor, "row chosen"]
    gates: Float[Tensor, "row chosen"]


@dataclass(frozen=True, kw_only=True)
class Announced:
    """What a hop will send, of which the others are being told how much."""

    given: Given
    """The rows there are; places and gates are those of the copies."""
    origin: Int[Tensor, " sent_copy"]
    """Row that each copy is made of."""
    counts: PendingCounts


@dataclass(frozen=True, kw_only=True)
class Sent:
    """What a hop must remember to bring its rows home."""

    splits: Splits
    origin: Int[Tensor, " sent_copy"]
    num_rows: int
    """Rows there were on this rank."""


@dataclass(frozen=True, kw_only=True)
class Travelling:
    """Copies under way through one hop."""

    rows: Departed
    gates: Departed
    places: Pending
    sent: Sent


@dataclass(frozen=True, kw_only=True)
class GoingHome:
    """Rows on their way back through a hop."""

    rows: Departed
    sent: Sent


@dataclass(kw_only=True)
class Hop:
    """An all-to-all over a group, each of whose ranks stands for `experts_per_rank` consecutive experts."""

    channel: Channel
    experts_per_rank: int
    """Experts that lie behind a rank of the group: its own, or those of its whole node."""
    out: Wire = AS_COMPUTED
    """How tokens travel to experts, and the gradients of what the experts return."""
    back: Wire = AS_COMPUTED
    """How what experts return travels home, and the gradients of the tokens."""
    traffic: Traffic = field(default_factory=Traffic)

    def announce(self, given: Given) -> Announced:
        """Find the ranks that experts of each row lie behind, and begin to tell them how many rows they will get."""
        is_chosen = given.places >= 0
        target = torch.where(is_chosen, given.places // self.experts_per_rank, 0)
        goes = torch.zeros(len(given.rows), self.channel.group.size(), dtype=torch.bool, device=given.rows.device)
        goes = goes.scatter_reduce(1, target, is_chosen, reduce="amax")
        rank, origin = goes.t().nonzero(as_tuple=True)
        is_theirs = is_chosen[origin] & (target[origin] == rank[:, None])
        places = torch.where(is_theirs, given.places[origin] - rank[:, None] * self.experts_per_rank, -1)
        gates = torch.where(is_theirs, given.gates[origin], 0)
        counts = begin_counts(goes.sum(0).tolist(), channel=self.channel)
        return Announced(given=replace(given, places=places, gates=gates), origin=origin, counts=counts)

    def send(self, announced: Announced) -> Travelling:
        """Begin to send a copy of each row to every rank that some of its experts lie behind."""
        given, origin = announced.given, announced.origin
        splits = announced.counts.end()
        copies = self._elsewhere(splits.sent)
        of_choices = given.places.shape[1] * (given.places.element_size() + given.gates.element_size())
        of_row = self.out.bytes_of(given.rows.shape[1], dtype=given.rows.dtype)
        self.traffic.tokens += len(given.rows)
        self.traffic.copies += copies
        self.traffic.dispatch_bytes += copies * (of_row + of_choices)
        rows = given.rows.index_select(0, origin)
        return Travelling(
            rows=depart(rows, splits=splits, channel=self.channel, out=self.out, back=self.back),
            gates=depart(given.gates, splits=splits, channel=self.channel),
            places=self.channel.begin(given.places, splits=splits),
            sent=Sent(splits=splits, origin=origin, num_rows=len(given.rows)),
        )

    def receive(self, travelling: Travelling) -> Given:
        """Return the copies that have come here."""
        return Given(rows=arrive(travelling.rows), places=travelling.places.end(), gates=arrive(travelling.gates))

    def send_back(self, rows: Float[Tensor, "row hidden"], *, sent: Sent) -> GoingHome:
        """Begin to send a row back for each that came."""
        of_row = self.back.bytes_of(rows.shape[1], dtype=rows.dtype)
        self.traffic.combine_bytes += self._elsewhere(sent.splits.received) * of_row
        away = depart(rows, splits=sent.splits.reversed, channel=self.channel, out=self.back, back=self.out)
        return GoingHome(rows=away, sent=sent)

    def receive_back(self, going_home: GoingHome) -> Float[Tensor, "row hidden"]:
        """Return for each row that was there the sum of what has come home for it."""
        home, sent = arrive(going_home.rows), going_home.sent
        return add_by_index(home, index=sent.origin, num_sums=sent.num_rows)

    def _elsewhere(self, counts: tuple[int, ...]) -> int:
        """Return how many rows go to, or came from, other ranks."""
        return sum(counts) - counts[self.channel.group.rank()]


@dataclass(frozen=True, kw_only=True)
class ExchangedTokens(DispatchedTokens):
    """Copies that have come from all ranks."""

    num_arrived: int
    """Rows that came, before they were copied for their experts."""
    sent: tuple[Sent, ...]
    """By hop."""

    def sums(self, outputs: Float[Tensor, "row hidden"]) -> Float[Tensor, "arrived hidden"]:
        """Return the sum of the experts' outputs for each row that came."""
        return add_by_index(outputs, index=self.source, num_sums=self.num_arrived)


def by_expert(given: Given, *, num_experts: int, sent: tuple[Sent, ...] = ()) -> ExchangedTokens:
    """Return a copy of each row for every one of the experts here that it is for, grouped by expert."""
    row, choice = (given.places >= 0).nonzero(as_tuple=True)
    expert = given.places[row, choice]
    order = expert.argsort(stable=True)
    row, choice = row[order], choice[order]
    origin = torch.full_like(given.places, -1)
    origin[row, choice] = torch.arange(len(order), device=order.device)
    return ExchangedTokens(
        rows=given.rows.index_select(0, row),
        rows_per_expert=torch.bincount(expert, minlength=num_experts).tolist(),
        gates=given.gates[row, choice],
        source=row,
        origin=origin,
        gathered_here=False,
        num_arrived=len(given.rows),
        sent=sent,
    )


@dataclass(kw_only=True)
class AllToAllDispatch:
    """`TokenDispatch` over the ranks that share the experts; every one of them makes the same calls, in one order.

    What travels while something else is computed is what the first hop moves, over the slow link.
    """

    hops: Sequence[Hop]
    """The last one ends at the ranks that hold the experts."""

    def announce(self, tokens: Float[Tensor, "token hidden"], *, routing: Routing) -> Announced:
        """Begin to tell the first hop's ranks how many rows they will get."""
        return self.hops[0].announce(Given(rows=tokens, places=routing.experts, gates=routing.gates))

    def send(self, announced: Announced) -> Travelling:
        """Begin to send the first hop's copies."""
        return self.hops[0].send(announced)

    def receive(self, sent: Travelling) -> ExchangedTokens:
        """Take what has come through the other hops; return what ends here, grouped by expert."""
        given, records = self.hops[0].receive(sent), [sent.sent]
        for hop in self.hops[1:]:
            further = hop.send(hop.announce(given))
            given = hop.receive(further)
            records.append(further.sent)
        return by_expert(given, num_experts=self.hops[-1].experts_per_rank, sent=tuple(records))

    def send_back(self, outputs: Float[Tensor, "row hidden"], *, dispatched: DispatchedTokens) -> GoingHome:
        """Sum the outputs of each row that came, bring the sums through the inner hops, and begin the first's."""
        assert isinstance(dispatched, ExchangedTokens)
        sums = dispatched.sums(outputs)
        for hop, sent in zip(self.hops[:0:-1], dispatched.sent[:0:-1], strict=True):
            sums = hop.receive_back(hop.send_back(sums, sent=sent))
        return self.hops[0].send_back(sums, sent=dispatched.sent[0])

    def receive_back(self, returning: GoingHome) -> Float[Tensor, "token hidden"]:
        """Sum what has come home for each token."""
        return self.hops[0].receive_back(returning)
