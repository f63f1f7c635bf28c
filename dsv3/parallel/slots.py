"""Dispatch while serving: experts lie in slots, some of them more than once, and the ranks' tokens go to one of each.

Two ways, as in the report's deployment (3.4). Reading prompts, every rank is told how many rows it will get and then
gets so many: `AllToAllDispatch`. Decoding, few tokens travel and each exchange costs its latency: `FixedDispatch` sends
as many rows to every rank in every step, so that nothing has to be told first, and shapes are always the same.

A rank chooses copies by what it sends itself, for it does not know what others send: the least loaded one, and of
equal ones that on its own device. Knowing all would take an exchange more in every layer.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dsv3.model.interfaces import DispatchedTokens, Routing, TokenDispatch
from dsv3.parallel.dispatch import ExchangedTokens, Given, by_expert
from dsv3.parallel.exchange import Channel, Pending, Splits
from dsv3.plan.copies import share_tokens
from dsv3.plan.placement import Placement


@dataclass(frozen=True, kw_only=True)
class SlotChoice:
    """How one rank chooses among the copies of an expert."""

    placement: Placement
    rank: int

    def slots_for(self, experts: Int[Tensor, "token chosen"]) -> Int[Tensor, "token chosen"]:
        """Return a slot of each chosen expert; of an expert's tokens the first ones go to its first copy, and so on."""
        if not self.has_copies:
            return self._by_expert.to(experts.device)[experts]
        counts = torch.bincount(experts.flatten(), minlength=self.placement.num_experts).tolist()
        shares = torch.tensor(share_tokens(counts, placement=self._seen_from_here)).roll(self._first)
        slots = torch.empty(experts.numel(), dtype=torch.long)
        order = experts.flatten().argsort(stable=True).cpu()
        slots[order] = torch.repeat_interleave(self._by_expert, shares[self._by_expert])
        return slots.view(experts.shape).to(experts.device)

    @property
    def has_copies(self) -> bool:
        """Whether there is anything to choose."""
        return len(self.placement.slots) > self.placement.num_experts

    @property
    def _first(self) -> int:
        return self.rank * self.placement.slots_per_device

    @cached_property
    def _by_expert(self) -> Int[Tensor, " slot"]:
        """All slots, those of expert 0 first."""
        return torch.tensor([slot for slots in self.placement.copies for slot in slots])

    @cached_property
    def _seen_from_here(self) -> Placement:
        """The placement with this rank's device as the first one, which ties go to."""
        slots = self.placement.slots
        return replace(self.placement, slots=slots[self._first :] + slots[: self._first], num_nodes=1)


@dataclass(kw_only=True)
class LayerSlots:
    """One layer's slots on one rank, and what has been asked of them since that was last taken."""

    choice: SlotChoice
    counts: Int[Tensor, " expert"] = field(init=False)
    """This rank's tokens for each expert, wherever that is."""
    num_rows: int = 0
    """Rows that all ranks' tokens had computed here."""

    def __post_init__(self) -> None:
        self.counts = torch.zeros(self.placement.num_experts, dtype=torch.long)

    @property
    def placement(self) -> Placement:
        """Where the layer's experts lie."""
        return self.choice.placement

    def move(self, placement: Placement) -> None:
        """Send tokens by another placement from now on."""
        self.choice = replace(self.choice, placement=placement)


@dataclass(kw_only=True)
class SlotDispatch:
    """`TokenDispatch` of one pass: the calls of each kind are for its layers in their order."""

    layers: Sequence[LayerSlots]
    through: TokenDispatch
    """Brings rows to slots."""
    _announced: int = 0
    _received: int = 0

    def announce(self, tokens: Float[Tensor, "token hidden"], *, routing: Routing) -> Any:
        """Choose a copy of each expert, and announce the tokens there."""
        layer = self.layers[self._announced]
        self._announced += 1
        layer.counts += routing.load.cpu()
        slots = layer.choice.slots_for(routing.experts)
        return self.through.announce(tokens, routing=replace(routing, experts=slots))

    def send(self, announced: Any) -> Any:
        """Begin to send them."""
        return self.through.send(announced)

    def receive(self, sent: Any) -> DispatchedTokens:
        """Return what has come for the slots held here."""
        dispatched = self.through.receive(sent)
        self.layers[self._received].num_rows += len(dispatched.rows)
        self._received += 1
        return dispatched

    def send_back(self, outputs: Float[Tensor, "row hidden"], *, dispatched: DispatchedTokens) -> Any:
        """Begin to send the slots' outputs home."""
        return self.through.send_back(outputs, dispatched=dispatched)

    def receive_back(self, returning: Any) -> Float[Tensor, "token hidden"]:
        """Return for each token the sum of its experts' outputs."""
        return self.through.receive_back(returning)


@dataclass(frozen=True, kw_only=True)
class Posted:
    """Tokens on their way to all ranks."""

    pending: Pending
    given: Given
    """What they are here; what comes from others has the same types."""


@dataclass(frozen=True, kw_only=True)
class Returning:
    """Sums on their way home."""

    pending: Pending
    num_tokens: int
    """Of this rank."""


@dataclass(frozen=True, kw_only=True)
class PostedTokens(ExchangedTokens):
    """Rows that have come from all ranks, `capacity` of each."""

    num_tokens: int
    """Of this rank."""


@dataclass(frozen=True, kw_only=True)
class FixedDispatch:
    """`TokenDispatch` for at most `capacity` tokens on each rank: one exchange of a fixed size each way.

    Row i of what goes to a rank is token i, with the slots it is to go to there: none for most of them, and such rows
    travel in vain. That is the price of not having to say how many there are, which is small while they are few.
    """

    channel: Channel
    slots_per_rank: int
    capacity: int

    def announce(self, tokens: Float[Tensor, "token hidden"], *, routing: Routing) -> Given:
        """Take note of them; nothing has to be told."""
        return Given(rows=tokens, places=routing.experts, gates=routing.gates)

    def send(self, announced: Given) -> Posted:
        """Begin to send each rank the tokens, and which of its slots they are for."""
        rows, places, gates = announced.rows, announced.places, announced.gates
        size, num = self.channel.group.size(), len(rows)
        assert num <= self.capacity, f"{num} tokens, and room for {self.capacity}"
        ranks = torch.arange(size, device=places.device)[:, None, None]
        theirs = torch.where(places // self.slots_per_rank == ranks, places - ranks * self.slots_per_rank, -1)
        parts = (
            self._padded(rows.expand(size, *rows.shape), filling=0),
            self._padded(theirs.to(torch.int32), filling=-1),
            self._padded(gates.expand(size, *gates.shape), filling=0),
        )
        packed = torch.cat([part.view(torch.uint8) for part in parts], dim=-1)
        return Posted(pending=self.channel.begin(packed, splits=self._splits), given=announced)

    def receive(self, sent: Posted) -> PostedTokens:
        """Return what has come for the slots held here, grouped by slot."""
        like = (sent.given.rows, sent.given.places.to(torch.int32), sent.given.gates)
        widths = [part.shape[1] * part.element_size() for part in like]
        packed = sent.pending.end().flatten(0, 1).split(widths, dim=1)
        rows, places, gates = (part.contiguous().view(one.dtype) for part, one in zip(packed, like, strict=True))
        arrived = by_expert(Given(rows=rows, places=places.long(), gates=gates), num_experts=self.slots_per_rank)
        return PostedTokens(**vars(arrived), num_tokens=len(sent.given.rows))

    def send_back(self, outputs: Float[Tensor, "row hidden"], *, dispatched: DispatchedTokens) -> Returning:
        """Begin to send home the sum of the outputs for each row that came."""
        assert isinstance(dispatched, PostedTokens)
        sums = dispatched.sums(outputs).unflatten(0, (self.channel.group.size(), self.capacity))
        return Returning(pending=self.channel.begin(sums, splits=self._splits), num_tokens=dispatched.num_tokens)

    def receive_back(self, returning: Returning) -> Float[Tensor, "token hidden"]:
        """Sum what has come home for each token, in order of the ranks."""
        return returning.pending.end()[:, : returning.num_tokens].sum(0)

    @property
    def _splits(self) -> Splits:
        each = (1,) * self.channel.group.size()
        return Splits(sent=each, received=each)

    def _padded(self, values: Tensor, *, filling: int) -> Tensor:
        room = values.new_full((values.shape[0], self.capacity, values.shape[2]), filling)
        room[:, : values.shape[1]] = values
        return room
