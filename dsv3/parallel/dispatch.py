"""Expert parallelism: tokens travel to the ranks that hold their experts, and their outputs travel back.

One copy of a token goes to each rank that has some of its experts, however many these are; there it is copied for each
of them, and their outputs are summed before one row goes back (report 3.2.2; the order within a rank is that of the
published training trace). A rank holds consecutive experts, so that with `n_group` groups on as many nodes the router's
limit of `topk_group` groups is a limit of nodes.

This one leaves the way to the network's library, in one hop. DeepEP, which forwards within the node, would be another
`TokenDispatch` beside it.
"""

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor

from dsv3.errors import ConfigError
from dsv3.model.interfaces import DispatchedTokens, Routing
from dsv3.parallel.exchange import Splits, exchange, exchange_counts


@dataclass(kw_only=True)
class Traffic:
    """What dispatch and combine have moved since it was made, by this rank, forward passes alone.

    Rows that stay on their rank are not counted. Backward passes move as many again, the other way.
    """

    tokens: int = 0
    """Tokens that were dispatched from here."""
    copies_sent: int = 0
    """Of those, to other ranks."""
    dispatch_bytes: int = 0
    """Rows, and which experts they are for, sent to other ranks."""
    combine_bytes: int = 0
    """Rows sent back to other ranks."""


@dataclass(frozen=True, kw_only=True)
class ExchangedTokens(DispatchedTokens):
    """Copies that have come from all ranks of the group."""

    splits: Splits
    token_of_copy: Int[Tensor, " sent_copy"]
    """Token of this rank that each copy sent was made of."""
    num_tokens: int
    """Tokens of this rank."""


@dataclass(kw_only=True)
class AllToAllDispatch:
    """`TokenDispatch` over the ranks of a group; every rank makes the same calls in the same order."""

    group: dist.ProcessGroup
    num_experts: int
    """On all ranks together."""
    traffic: Traffic = field(default_factory=Traffic)

    def __post_init__(self) -> None:
        require_expert_ranks(self.group.size(), num_experts=self.num_experts)

    def dispatch(self, tokens: Float[Tensor, "token hidden"], *, routing: Routing) -> ExchangedTokens:
        """Send each token to the ranks of the experts chosen for it; return what has come, grouped by expert."""
        per_rank = self.num_experts // self.group.size()
        target = routing.experts // per_rank
        goes = torch.zeros(len(tokens), self.group.size(), dtype=torch.bool, device=tokens.device)
        goes.scatter_(1, target, True)
        rank, token = goes.t().nonzero(as_tuple=True)
        is_theirs = target[token] == rank[:, None]
        places = torch.where(is_theirs, routing.experts[token] - rank[:, None] * per_rank, -1)
        gates = torch.where(is_theirs, routing.gates[token], 0)

        splits = exchange_counts(goes.sum(0).tolist(), group=self.group)
        copies = exchange(tokens.index_select(0, token), splits=splits, group=self.group)
        places = exchange(places, splits=splits, group=self.group)
        gates = exchange(gates, splits=splits, group=self.group)
        self._count(tokens, copies=copies, places=places, gates=gates, splits=splits)

        copy, choice = (places >= 0).nonzero(as_tuple=True)
        expert = places[copy, choice]
        order = expert.argsort(stable=True)
        origin = torch.full_like(places, -1)
        origin[copy[order], choice[order]] = torch.arange(len(order), device=order.device)
        return ExchangedTokens(
            rows=copies.index_select(0, copy[order]),
            rows_per_expert=torch.bincount(expert, minlength=per_rank).tolist(),
            gates=gates[copy[order], choice[order]],
            source=copy[order],
            origin=origin,
            gathered_here=False,
            splits=splits,
            token_of_copy=token,
            num_tokens=len(tokens),
        )

    def combine(
        self, outputs: Float[Tensor, "row hidden"], *, dispatched: DispatchedTokens
    ) -> Float[Tensor, "token hidden"]:
        """Sum the outputs of each copy where they were made, send the sums home, and sum there for each token."""
        assert isinstance(dispatched, ExchangedTokens)
        splits, width = dispatched.splits, outputs.shape[1]
        sums = outputs.new_zeros(sum(splits.received), width).index_add(0, dispatched.source, outputs)
        home = exchange(sums, splits=splits.reversed, group=self.group)
        self.traffic.combine_bytes += self._bytes_elsewhere(sums, counts=splits.received)
        return outputs.new_zeros(dispatched.num_tokens, width).index_add(0, dispatched.token_of_copy, home)

    def _count(self, tokens: Tensor, *, copies: Tensor, places: Tensor, gates: Tensor, splits: Splits) -> None:
        self.traffic.tokens += len(tokens)
        self.traffic.copies_sent += sum(splits.sent) - splits.sent[self.group.rank()]
        for moved in (copies, places, gates):
            self.traffic.dispatch_bytes += self._bytes_elsewhere(moved, counts=splits.sent)

    def _bytes_elsewhere(self, rows: Tensor, *, counts: tuple[int, ...]) -> int:
        """Return the bytes of rows like these that go to other ranks."""
        elsewhere = sum(counts) - counts[self.group.rank()]
        return elsewhere * rows.shape[1:].numel() * rows.element_size()


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
