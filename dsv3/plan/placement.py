"""Which devices hold which experts, with copies of the busy ones: the published EPLB.

A layer's experts lie in *slots*, equally many on every device; more slots than experts are room for copies.

Source: report 3.4.1 and 3.4.2, and the EPLB repository.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from heapq import heapify, heappop, heappush, heapreplace
from math import isfinite

from dsv3.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where the experts of one layer lie."""

    slots: tuple[int, ...]
    """The expert in each slot; a device has `len(slots) / num_devices` of them in a row, a node its devices."""
    num_experts: int
    num_devices: int
    num_nodes: int = 1
    """Nodes that experts keep to; 1 where copies may lie anywhere."""

    def __post_init__(self) -> None:
        _require_whole(len(self.slots), self.num_devices, what="slots", over="devices")
        _require_whole(self.num_devices, self.num_nodes, what="devices", over="nodes")
        if set(self.slots) != set(range(self.num_experts)):
            raise ConfigError(f"slots hold experts {sorted(set(self.slots))}, not each of {self.num_experts}")

    @cached_property
    def slots_per_device(self) -> int:
        """Experts that a device holds, copies included."""
        return len(self.slots) // self.num_devices

    @cached_property
    def copies(self) -> tuple[tuple[int, ...], ...]:
        """Slots of each expert, in order."""
        found: list[list[int]] = [[] for _ in range(self.num_experts)]
        for slot, expert in enumerate(self.slots):
            found[expert].append(slot)
        return tuple(map(tuple, found))

    def device_of(self, slot: int) -> int:
        """Return the device that has a slot."""
        return slot // self.slots_per_device

    def experts_of(self, device: int) -> tuple[int, ...]:
        """Return the experts on a device, slot by slot."""
        size = self.slots_per_device
        return self.slots[device * size : (device + 1) * size]

    def device_loads(self, load: Sequence[float | int]) -> tuple[float, ...]:
        """Return the load of each device where the copies of an expert share its load evenly."""
        each = [load[expert] / len(slots) for expert, slots in enumerate(self.copies)]
        return tuple(sum(each[expert] for expert in self.experts_of(device)) for device in range(self.num_devices))


def in_order(*, num_experts: int, num_devices: int) -> Placement:
    """Return the placement without copies and without balancing: experts dealt out in their order."""
    _require_whole(num_experts, num_devices, what="experts", over="devices")
    return Placement(slots=tuple(range(num_experts)), num_experts=num_experts, num_devices=num_devices)


def imbalance(loads: Sequence[float | int]) -> float:
    """Return the largest load divided by their mean: 1 when balanced, and where there is no load at all."""
    total = sum(loads)
    return max(loads) * len(loads) / total if total else 1.0


def place_experts(
    load: Sequence[float | int],
    *,
    num_slots: int,
    num_devices: int,
    num_nodes: int = 1,
    num_groups: int = 1,
    apart: bool = True,
) -> Placement:
    """Return slots filled so that the devices' loads are close, given the load of each of a layer's experts.

    Hierarchical where the groups of node-limited routing divide over the nodes: whole groups are dealt to nodes, and
    copies stay on their expert's node, so that no token crosses to more nodes. Otherwise global, over all devices.
    Ties go to the lowest index, so that equal loads give equal placements everywhere.

    `apart` keeps copies of an expert on different devices wherever there are devices enough, which the published
    algorithm does not; where that puts none together, the result is the published one.

    Source: report 3.4; the EPLB repository (`rebalance_experts`). That copies stay apart is ours.
    Raises:
        ConfigError: slots, devices, nodes, groups or experts do not divide, or a load is negative or not a number.
    """
    _require_loads(load)
    _require_whole(num_slots, num_devices, what="slots", over="devices")
    _require_whole(num_devices, num_nodes, what="devices", over="nodes")
    if num_groups < 1 or num_groups % num_nodes:
        num_groups = num_nodes = 1
    _require_whole(len(load), num_groups, what="experts", over="groups")
    if num_slots < len(load):
        raise ConfigError(
            f"{num_slots} slots for {len(load)} experts; give {num_devices * -(-len(load) // num_devices)} or more"
        )
    slots: list[int] = []
    for experts in _experts_of_nodes(load, num_groups=num_groups, num_nodes=num_nodes):
        local = _place_on_devices(
            [load[expert] for expert in experts],
            num_slots=num_slots // num_nodes,
            num_devices=num_devices // num_nodes,
            apart=apart,
        )
        slots += [experts[place] for place in local]
    return Placement(slots=tuple(slots), num_experts=len(load), num_devices=num_devices, num_nodes=num_nodes)


def balanced_packs(load: Sequence[float | int], *, num_packs: int) -> list[list[int]]:
    """Return the items of each pack, equally many in each: heaviest item first, into the lightest pack with room."""
    if len(load) == num_packs:
        return [[item] for item in range(num_packs)]
    room = len(load) // num_packs
    packs: list[list[int]] = [[] for _ in range(num_packs)]
    lightest = [(0.0, pack) for pack in range(num_packs)]
    for item in sorted(range(len(load)), key=lambda item: -load[item]):
        weight, pack = lightest[0]
        packs[pack].append(item)
        if len(packs[pack]) == room:
            heappop(lightest)
        else:
            heapreplace(lightest, (weight + load[item], pack))
    return packs


def copy_experts(load: Sequence[float | int], *, num_slots: int, most: int | None = None) -> list[int]:
    """Return the expert of each copy: first all, then again and again the one whose copies have most to do.

    No expert gets more than `most` copies.
    """
    copies = list(range(len(load)))
    busiest = [(-load[expert], expert) for expert in copies]
    heapify(busiest)
    count = [1] * len(load)
    while len(copies) < num_slots:
        _, expert = heappop(busiest)
        if most is None or count[expert] < most:
            copies.append(expert)
            count[expert] += 1
            heappush(busiest, (-load[expert] / count[expert], expert))
    return copies


def _experts_of_nodes(load: Sequence[float | int], *, num_groups: int, num_nodes: int) -> list[list[int]]:
    """Return the experts of each node, whole groups, group after group as they were dealt."""
    size = len(load) // num_groups
    groups = [range(group * size, (group + 1) * size) for group in range(num_groups)]
    packs = balanced_packs([sum(load[expert] for expert in group) for group in groups], num_packs=num_nodes)
    return [[expert for group in pack for expert in groups[group]] for pack in packs]


def _place_on_devices(load: Sequence[float | int], *, num_slots: int, num_devices: int, apart: bool) -> list[int]:
    can_be_apart = apart and num_slots // num_devices <= len(load)
    copies = copy_experts(load, num_slots=num_slots, most=num_devices if can_be_apart else None)
    count = [0] * len(load)
    for expert in copies:
        count[expert] += 1
    packs = balanced_packs([load[expert] / count[expert] for expert in copies], num_packs=num_devices)
    devices = [[copies[place] for place in pack] for pack in packs]
    if can_be_apart:
        _take_apart(devices, load=[weight / count[expert] for expert, weight in enumerate(load)])
    return [expert for device in devices for expert in device]


def _take_apart(devices: list[list[int]], *, load: Sequence[float | int]) -> None:
    """Exchange experts until no device has two copies of one; each time where it adds the least load.

    With no more copies than devices there is always an exchange that leaves fewer copies together: a device without
    the expert has one that this device lacks, or has two of one.
    """
    held = [sum(load[expert] for expert in device) for device in devices]
    while (found := _second_copy(devices)) is not None:
        _exchange(devices, held, device=found[0], place=found[1], load=load)


def _second_copy(devices: list[list[int]]) -> tuple[int, int] | None:
    for device, experts in enumerate(devices):
        if len(set(experts)) < len(experts):
            return device, next(place for place, expert in enumerate(experts) if expert in experts[:place])
    return None


def _exchange(
    devices: list[list[int]], held: list[float], *, device: int, place: int, load: Sequence[float | int]
) -> None:
    mine = devices[device]
    expert = mine[place]
    best: tuple[float, int, int] | None = None
    for other, theirs in enumerate(devices):
        if expert in theirs:
            continue
        for there, swapped in enumerate(theirs):
            if swapped in mine and theirs.count(swapped) == 1:
                continue
            change = load[swapped] - load[expert]
            heavier = max(held[device] + change, held[other] - change)
            if best is None or (heavier, other, there) < best:
                best = (heavier, other, there)
    assert best is not None, "copies were capped at the number of devices"
    _, other, there = best
    change = load[devices[other][there]] - load[expert]
    held[device] += change
    held[other] -= change
    mine[place], devices[other][there] = devices[other][there], expert


def _require_loads(load: Sequence[float | int]) -> None:
    wrong = next((expert for expert, value in enumerate(load) if not isfinite(value) or value < 0), None)
    if wrong is not None:
        raise ConfigError(f"expert {wrong} has load {load[wrong]}; give tokens or their share, 0 or more")
    if not load:
        raise ConfigError("loads of no expert were given; give one for each expert of the layer")


def _require_whole(count: int, size: int, *, what: str, over: str) -> None:
    if size < 1 or count % size:
        nearest = f"; use a multiple of {size} {what}" if size > 0 else ""
        raise ConfigError(f"{count} {what} do not divide over {size} {over}{nearest}")
