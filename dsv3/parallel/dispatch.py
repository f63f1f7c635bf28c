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
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor

from dsv3.errors import ConfigError
from dsv3.model.interfaces import DispatchedTokens, Routing
from dsv3.parallel.exchange import Splits, exchange, exchange_counts, exchange_numbers
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
class Sent:
    """What a hop must remember to bring its rows home."""

    splits: Splits
    origin: Int[Tensor, " sent_copy"]
    """Row on this rank that each copy sent was made of."""
    num_rows: int
    """Rows there were on this rank."""


@dataclass(frozen=True, kw_only=True)
class Arrived:
    """Rows with the experts they are for, as this rank counts them after a hop: -1 where a choice is for others."""

    rows: Float[Tensor, "row hidden"]
    places: Int[Tensor, "row chosen"]
    gates: Float[Tensor, "row chosen"]


@dataclass(kw_only=True)
class Hop:
    """An all-to-all over a group, each of whose ranks stands for `experts_per_rank` consecutive experts."""

    group: dist.ProcessGroup
    experts_per_rank: int
    """Experts that lie behind a rank of the group: its own, or those of its whole node."""
    out: Wire = AS_COMPUTED
    """How tokens travel to experts, and the gradients of what the experts return."""
    back: Wire = AS_COMPUTED
    """How what experts return travels home, and the gradients of the tokens."""
    traffic: Traffic = field(default_factory=Traffic)

    def send(self, given: Arrived) -> tuple[Arrived, Sent]:
        """Send a copy of each row to every rank that some of its experts lie behind; return what has come here."""
        is_chosen = given.places >= 0
        target = torch.where(is_chosen, given.places // self.experts_per_rank, 0)
        goes = torch.zeros(len(given.rows), self.group.size(), dtype=torch.bool, device=given.rows.device)
        goes = goes.scatter_reduce(1, target, is_chosen, reduce="amax")
        rank, origin = goes.t().nonzero(as_tuple=True)
        is_theirs = is_chosen[origin] & (target[origin] == rank[:, None])
        places = torch.where(is_theirs, given.places[origin] - rank[:, None] * self.experts_per_rank, -1)
        gates = torch.where(is_theirs, given.gates[origin], 0)

        splits = exchange_counts(goes.sum(0).tolist(), group=self.group)
        arrived = Arrived(
            rows=exchange(
                given.rows.index_select(0, origin), splits=splits, group=self.group, out=self.out, back=self.back
            ),
            places=exchange_numbers(places, splits=splits, group=self.group),
            gates=exchange(gates, splits=splits, group=self.group),
        )
        copies = self._elsewhere(splits.sent)
        of_choices = places.shape[1] * (places.element_size() + gates.element_size())
        of_row = self.out.bytes_of(given.rows.shape[1], dtype=given.rows.dtype)
        self.traffic.tokens += len(given.rows)
        self.traffic.copies += copies
        self.traffic.dispatch_bytes += copies * (of_row + of_choices)
        return arrived, Sent(splits=splits, origin=origin, num_rows=len(given.rows))

    def bring_home(self, rows: Float[Tensor, "row hidden"], *, sent: Sent) -> Float[Tensor, "row hidden"]:
        """Send a row back for each that came, and sum what comes home for each that was there."""
        home = exchange(rows, splits=sent.splits.reversed, group=self.group, out=self.back, back=self.out)
        of_row = self.back.bytes_of(rows.shape[1], dtype=rows.dtype)
        self.traffic.combine_bytes += self._elsewhere(sent.splits.received) * of_row
        return rows.new_zeros(sent.num_rows, rows.shape[1]).index_add(0, sent.origin, home)

    def _elsewhere(self, counts: tuple[int, ...]) -> int:
        """Return how many rows go to, or came from, other ranks."""
        return sum(counts) - counts[self.group.rank()]


@dataclass(frozen=True, kw_only=True)
class ExchangedTokens(DispatchedTokens):
    """Copies that have come from all ranks."""

    num_arrived: int
    """Rows that came, before they were copied for their experts."""
    sent: tuple[Sent, ...]
    """By hop."""


@dataclass(kw_only=True)
class AllToAllDispatch:
    """`TokenDispatch` over the ranks that share the experts; every one of them makes the same calls, in one order."""

    hops: Sequence[Hop]
    """The last one ends at the ranks that hold the experts."""

    def dispatch(self, tokens: Float[Tensor, "token hidden"], *, routing: Routing) -> ExchangedTokens:
        """Send each token to the ranks of the experts chosen for it; return what has come, grouped by expert."""
        arrived = Arrived(rows=tokens, places=routing.experts, gates=routing.gates)
        sent = []
        for hop in self.hops:
            arrived, record = hop.send(arrived)
            sent.append(record)
        row, choice = (arrived.places >= 0).nonzero(as_tuple=True)
        expert = arrived.places[row, choice]
        order = expert.argsort(stable=True)
        row, choice = row[order], choice[order]
        origin = torch.full_like(arrived.places, -1)
        origin[row, choice] = torch.arange(len(order), device=order.device)
        return ExchangedTokens(
            rows=arrived.rows.index_select(0, row),
            rows_per_expert=torch.bincount(expert, minlength=self.hops[-1].experts_per_rank).tolist(),
            gates=arrived.gates[row, choice],
            source=row,
            origin=origin,
            gathered_here=False,
            num_arrived=len(arrived.rows),
            sent=tuple(sent),
        )

    def combine(
        self, outputs: Float[Tensor, "row hidden"], *, dispatched: DispatchedTokens
    ) -> Float[Tensor, "token hidden"]:
        """Sum the outputs of each row that came, and bring the sums home, summing again wherever they meet."""
        assert isinstance(dispatched, ExchangedTokens)
        sums = outputs.new_zeros(dispatched.num_arrived, outputs.shape[1])
        sums = sums.index_add(0, dispatched.source, outputs)
        for hop, sent in zip(reversed(self.hops), reversed(dispatched.sent), strict=True):
            sums = hop.bring_home(sums, sent=sent)
        return sums


def require_expert_ranks(size: int, *, num_experts: int) -> None:
    """Refuse a number of ranks that experts do not divide over.

    Raises:
        ConfigError: names the nearest numbers that they do.
    """
    if size >= 1 and num_experts % size == 0:
        return
    divisors = [number for number in range(1, num_experts + 1) if num_experts % number == 0]
    nearest = sorted(sorted(divisors, key=lambda number: abs(number - size))[:2])
    raise ConfigError(
        f"{num_experts} routed experts do not divide over an expert axis of {size} ranks; use a divisor of "
        f"{num_experts}, such as {' or '.join(map(str, nearest))}"
    )
