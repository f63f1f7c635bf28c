"""Experts that move between ranks while these serve: load is counted, placed anew, and weights follow (EPLB).

Rank 0 decides when to look. Then the ranks sum up what they have counted, rank 0 works out a placement beside its
passes, and tells it to all; from then on a few experts' weights travel during each pass. A layer goes over to its new
placement between two passes, on all ranks the same two, once all it needs has come. Until then weights that arrive lie
beside those that are in use, so that a rank needs room for what one layer receives.

Source: report 3.4.1 and 3.4.2. How weights move without stopping is not published.
"""

import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist
from torch import Tensor

from dsv3.infer.events import ExpertStats
from dsv3.model.moe import Experts
from dsv3.parallel.slots import LayerSlots
from dsv3.plan.moves import Move, moves_between
from dsv3.plan.placement import Placement, imbalance
from dsv3.plan.rebalance import FadingLoad, ReplanRule, changes
from dsv3.runtime.log import get_logger

log = get_logger(__name__)

COUNT, PLACE = 1, 2
"""Orders: to sum up what was counted, and to take the new placement."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """New placements, and what they are expected to bring."""

    placements: dict[int, Placement]
    """By layer, of those that change."""
    before: list[float]
    """Load of each device, averaged over the layers; 1 is its fair share."""
    after: list[float]
    balance_before: float
    """Mean load of a device divided by the largest, averaged over the layers."""
    balance_after: float


@dataclass(kw_only=True)
class Moving:
    """A layer whose experts are on their way."""

    layer: int
    placement: Placement
    ahead: deque[Move]
    """Not begun."""
    arrived: dict[int, list[Tensor]] = field(default_factory=dict)
    """Weights for slots of this rank, by its own number of the slot."""


class Balancer:
    """One rank's part of it. All ranks make the same calls between the same passes."""

    def __init__(
        self,
        layers: Sequence[LayerSlots],
        *,
        experts: Sequence[Experts],
        group: dist.ProcessGroup,
        every_seconds: float,
        bytes_per_round: int,
    ) -> None:
        self._layers = layers
        self._experts = experts
        self._group = group
        self._every_seconds = every_seconds
        self._looked = time.monotonic()
        self._load = FadingLoad(
            num_layers=len(layers),
            num_experts=layers[0].placement.num_experts,
            half_life=every_seconds or 1.0,
        )
        self._planning: Planning | None = None
        self._moving: deque[Moving] = deque()
        self._works: list[dist.Work] = []
        self._bytes_per_expert = sum(one[0].nbytes for one in _weights(experts[0]))
        self._moves_per_round = max(1, bytes_per_round // self._bytes_per_expert)
        self._stats = ExpertStats()

    @property
    def is_moving(self) -> bool:
        """Whether weights are on their way, on any rank."""
        return bool(self._moving)

    def stats(self) -> ExpertStats:
        """Return counts since the start, and what the newest look has found."""
        return replace(self._stats, num_rows=self._stats.num_rows + sum(layer.num_rows for layer in self._layers))

    def order(self) -> int:
        """Return what all ranks are to do next, 0 for nothing; only rank 0 ever says otherwise."""
        if self._group.rank() or not self._every_seconds or self._moving:
            return 0
        if self._planning is not None:
            return PLACE if self._planning.is_done else 0
        return COUNT if time.monotonic() - self._looked >= self._every_seconds else 0

    def obey(self, order: int) -> None:
        """Do with all ranks what rank 0 has ordered."""
        if order == COUNT:
            self._count()
        elif order == PLACE:
            self._take_plan()

    # ---- load ----

    def _count(self) -> None:
        """Sum up what all ranks have counted since the last look; rank 0 begins to plan."""
        counts = torch.stack([layer.counts for layer in self._layers])
        dist.all_reduce(counts, group=self._group)
        rows = torch.tensor([layer.num_rows for layer in self._layers])
        everyone = rows.new_empty(self._group.size(), len(rows))
        dist.all_gather(list(everyone), rows, group=self._group)
        for layer in self._layers:
            layer.counts.zero_()
            layer.num_rows = 0
        self._stats.num_rows += int(rows.sum())
        self._stats.balance = _balance(everyone.t().double().tolist())
        if self._group.rank() == 0:
            now = time.monotonic()
            self._load.add(counts.tolist(), passed=now - self._looked)
            self._looked = now
            placements = [layer.placement for layer in self._layers]
            self._planning = Planning(self._load.loads, placements=placements)

    def _take_plan(self) -> None:
        """Hear the new placement from rank 0, and queue what has to move."""
        told: list[Plan | None] = [None]
        if self._planning is not None:
            told, self._planning = [self._planning.plan], None
        dist.broadcast_object_list(told, group=self._group, group_src=0)
        plan = told[0]
        if plan is None:
            return
        rank = self._group.rank()
        self._stats.load_before, self._stats.load_after = plan.before[rank], plan.after[rank]
        self._stats.balance_before, self._stats.balance_after = plan.balance_before, plan.balance_after
        self._stats.num_changes += bool(plan.placements)
        for layer, placement in plan.placements.items():
            moves = moves_between(self._layers[layer].placement, placement)
            self._moving.append(Moving(layer=layer, placement=placement, ahead=deque(moves)))
        if rank == 0 and plan.placements:
            log.info(
                "experts of %d layers move, %d in all: mean load of a device by the largest %.3f, then %.3f",
                len(plan.placements),
                sum(len(moving.ahead) for moving in self._moving),
                plan.balance_before,
                plan.balance_after,
            )

    # ---- weights ----

    def begin_moves(self) -> None:
        """Send some experts' weights on their way; they travel while the next pass is run."""
        if not self._moving:
            return
        moving = self._moving[0]
        for _ in range(min(self._moves_per_round, len(moving.ahead))):
            self._begin(moving.ahead.popleft(), moving=moving)

    def end_moves(self) -> None:
        """Wait for what is under way, and go over to the new placement of a layer that has all it needs."""
        for work in self._works:
            work.wait()
        self._works = []
        if not self._moving or self._moving[0].ahead:
            return
        moving = self._moving.popleft()
        for slot, arrived in moving.arrived.items():
            for weight, new in zip(_weights(self._experts[moving.layer]), arrived, strict=True):
                weight[slot].copy_(new)
        self._layers[moving.layer].move(moving.placement)
        self._stats.num_moves += len(moving.arrived)
        self._stats.moved_bytes += len(moving.arrived) * self._bytes_per_expert

    def _begin(self, move: Move, *, moving: Moving) -> None:
        size, rank = moving.placement.slots_per_device, self._group.rank()
        source, target = move.source // size, move.target // size
        weights = _weights(self._experts[moving.layer])
        if rank == source:
            sent = [weight[move.source % size] for weight in weights]
            if rank == target:
                moving.arrived[move.target % size] = [one.clone() for one in sent]
            else:
                self._works += [_work(dist.isend(one, group=self._group, group_dst=target)) for one in sent]
        elif rank == target:
            room = [torch.empty_like(weight[0]) for weight in weights]
            moving.arrived[move.target % size] = room
            self._works += [_work(dist.irecv(one, group=self._group, group_src=source)) for one in room]


class Planning:
    """A plan that is being made in a thread of its own."""

    def __init__(self, loads: Sequence[Sequence[float]], *, placements: Sequence[Placement]) -> None:
        self.plan: Plan | None = None
        self._loads, self._placements = loads, placements
        self._thread = threading.Thread(target=self._make, daemon=True)
        self._thread.start()

    @property
    def is_done(self) -> bool:
        """Whether `plan` is all that will come."""
        return not self._thread.is_alive()

    def _make(self) -> None:
        self.plan = make_plan(self._loads, placements=self._placements)


def make_plan(loads: Sequence[Sequence[float]], *, placements: Sequence[Placement]) -> Plan:
    """Return the placements that are worth it; moves cost nothing here, for they are hidden behind passes."""
    rule = ReplanRule(tokens_until_next=1.0, seconds_per_token=1.0, seconds_per_move=0.0)
    found = {change.layer: change.placement for change in changes(loads, placements=placements, rule=rule)}
    new = [found.get(layer, placement) for layer, placement in enumerate(placements)]
    old_loads, new_loads = (
        [placement.device_loads(load) for placement, load in zip(some, loads, strict=True)]
        for some in (placements, new)
    )
    return Plan(
        placements=found,
        before=_shares(old_loads),
        after=_shares(new_loads),
        balance_before=_balance(old_loads),
        balance_after=_balance(new_loads),
    )


def _balance(loads: Sequence[Sequence[float]]) -> float:
    """Return mean divided by largest load of a device, averaged over the layers."""
    return sum(1 / imbalance(layer) for layer in loads) / len(loads)


def _shares(loads: Sequence[Sequence[float]]) -> list[float]:
    """Return each device's load, in fair shares, averaged over the layers that have any."""
    used = [[len(layer) * load / sum(layer) for load in layer] for layer in loads if sum(layer)]
    return [sum(device) / len(used) for device in zip(*used, strict=True)] if used else [1.0] * len(loads[0])


def _weights(experts: Experts) -> list[Tensor]:
    return [parameter.detach() for parameter in experts.parameters()]


def _work(work: dist.Work | None) -> dist.Work:
    assert work is not None, "this rank is one of the group"
    return work
