"""What has to move from one placement of experts to the next, with as much left in place as can be."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from heapq import heappop, heappush

from dsv3.errors import ConfigError
from dsv3.plan.placement import Placement


@dataclass(frozen=True)
class Move:
    """The weights of one expert that go into a slot of another device."""

    expert: int
    source: int
    """A slot that has them in the old placement; one on the same node, if there is any."""
    target: int


def kept_in_place(new: Placement, *, old: Placement) -> Placement:
    """Return `new` with its devices, and their slots, renamed so that the fewest weights move from `old`.

    No device's load changes by it. Which new device takes which old one's place is solved exactly; nodes first, where
    placements keep to them.

    Source: report 3.4.1 has experts re-arranged without raising traffic between nodes; the renaming is ours.
    Raises:
        ConfigError: the placements are not of the same experts, devices, slots and nodes.
    """
    _require_alike(new, old)
    size = new.num_devices // new.num_nodes
    held = [Counter(old.experts_of(device)) for device in range(old.num_devices)]
    wanted = [Counter(new.experts_of(device)) for device in range(new.num_devices)]
    nodes = [range(node * size, (node + 1) * size) for node in range(new.num_nodes)]
    pairs = [[_most_shared([wanted[d] for d in here], [held[d] for d in there]) for there in nodes] for here in nodes]
    by_node = best_matching(
        [{there: kept for there, (kept, _) in enumerate(row)} for row in pairs], num_columns=len(nodes)
    )
    slots = list(old.slots)
    for node, there in enumerate(by_node):
        for device, place in zip(nodes[node], pairs[node][there][1], strict=True):
            target = nodes[there][place]
            start = target * new.slots_per_device
            slots[start : start + new.slots_per_device] = _keep_slots(
                new.experts_of(device), held=old.experts_of(target)
            )
    return replace(new, slots=tuple(slots))


def moves_between(old: Placement, new: Placement) -> tuple[Move, ...]:
    """Return the weights that move, slot by slot. All sources are as they were before the first move.

    An expert that its device has already, in another slot, is a move too, with a source on the same device.

    Raises:
        ConfigError: the placements are not of the same experts, devices, slots and nodes.
    """
    _require_alike(new, old)
    return tuple(
        Move(expert, _nearest(old.copies[expert], target=slot, placement=old), slot)
        for slot, (before, expert) in enumerate(zip(old.slots, new.slots, strict=True))
        if before != expert
    )


def best_matching(weights: Sequence[Mapping[int, int]], *, num_columns: int) -> list[int]:
    """Return a column for each row, each taken once, so that the sum of the weights is largest.

    `weights` has the columns of each row with a weight above zero; rows and columns are equally many. Shortest
    augmenting paths over these entries alone, so that few entries are solved fast.
    """
    num_rows = len(weights)
    # A row that gets nothing has a column of its own behind the real ones, of weight 0.
    edges = [{**row, num_columns + place: 0} for place, row in enumerate(weights)]
    price = [0] * (num_columns + num_rows)
    gain = [max(row.values()) for row in edges]
    row_of = [-1] * (num_columns + num_rows)
    for start in range(num_rows):
        _augment(start, edges=edges, gain=gain, price=price, row_of=row_of)
    found = [-1] * num_rows
    for column, row in enumerate(row_of[:num_columns]):
        if row >= 0:
            found[row] = column
    free = iter([column for column in range(num_columns) if row_of[column] < 0])
    return [next(free) if column < 0 else column for column in found]


def _augment(
    start: int, *, edges: Sequence[Mapping[int, int]], gain: list[int], price: list[int], row_of: list[int]
) -> None:
    """Give row `start` a column, and move other rows along the path that costs least (Dijkstra, reduced costs)."""
    distance: dict[int, int] = {}
    came_from: dict[int, int] = {}
    final: dict[int, int] = {}
    ahead: list[tuple[int, int]] = []
    row, reached, column = start, 0, -1
    while True:
        for there, weight in edges[row].items():
            cost = reached + gain[row] + price[there] - weight
            if there not in final and cost < distance.get(there, cost + 1):
                distance[there] = cost
                came_from[there] = row
                heappush(ahead, (cost, there))
        while True:
            reached, column = heappop(ahead)
            if column not in final:
                break
        final[column] = reached
        if row_of[column] < 0:
            break
        row = row_of[column]
    for there, cost in final.items():
        price[there] += reached - cost
        if row_of[there] >= 0:
            gain[row_of[there]] -= reached - cost
    gain[start] -= reached
    while True:
        row = came_from[column]
        previous = next((there for there in final if row_of[there] == row and there != column), -1)
        row_of[column] = row
        if row == start:
            return
        column = previous


def _most_shared(wanted: Sequence[Counter[int]], held: Sequence[Counter[int]]) -> tuple[int, list[int]]:
    """Return how many experts stay if each new device takes the place of an old one, and which one's."""
    holders: dict[int, list[int]] = {}
    for place, experts in enumerate(held):
        for expert in experts:
            holders.setdefault(expert, []).append(place)
    weights = []
    for experts in wanted:
        shared: Counter[int] = Counter()
        for expert, count in experts.items():
            for place in holders.get(expert, ()):
                shared[place] += min(count, held[place][expert])
        weights.append(shared)
    places = best_matching(weights, num_columns=len(held))
    return sum(weights[row][place] for row, place in enumerate(places)), places


def _keep_slots(experts: Sequence[int], *, held: Sequence[int]) -> list[int]:
    left = Counter(experts)
    stays: list[int | None] = []
    for expert in held:
        stays.append(expert if left[expert] else None)
        left[expert] -= bool(left[expert])
    coming = left.elements()
    return [next(coming) if expert is None else expert for expert in stays]


def _nearest(sources: Sequence[int], *, target: int, placement: Placement) -> int:
    device = placement.device_of(target)
    per_node = placement.num_devices // placement.num_nodes

    def distance(slot: int) -> tuple[bool, bool, int]:
        there = placement.device_of(slot)
        return there != device, there // per_node != device // per_node, slot

    return min(sources, key=distance)


def _require_alike(new: Placement, old: Placement) -> None:
    def shape(placement: Placement) -> tuple[int, ...]:
        return placement.num_experts, len(placement.slots), placement.num_devices, placement.num_nodes

    if shape(new) != shape(old):
        raise ConfigError(
            f"placements of {shape(old)} and {shape(new)} experts, slots, devices and nodes; both must be alike"
        )
