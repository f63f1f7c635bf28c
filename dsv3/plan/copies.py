"""Which copy of an expert computes which tokens: the least loaded one, or the best choice there is.

Source: report 3.4.1, "dynamic redundancy": more experts hosted than active, and the globally optimal choice worked out
before each layer's all-to-all. How is not published; this is ours.
"""

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import count

from dsv3.errors import ConfigError
from dsv3.plan.placement import Placement


@dataclass(frozen=True, kw_only=True)
class Share:
    """Tokens that each slot computes."""

    tokens: tuple[int, ...]
    """Of each slot."""
    largest: int
    """Tokens of the device that has most."""
    least_possible: int
    """No choice could do with fewer on its busiest device, even without a limit of active experts."""


def share_tokens(counts: Sequence[int], *, placement: Placement) -> tuple[int, ...]:
    """Return the tokens of each slot: those of an expert go to its copies on the least loaded devices.

    Experts with one copy first, then the others, the largest first; each raises the lowest of its devices to one level.
    Ties go to the lowest index. Fast and the same everywhere, so that ranks agree without talking; `best_share` is
    better by what this cannot see ahead.

    Raises:
        ConfigError: not one count of 0 or more for each expert.
    """
    _require_counts(counts, placement)
    loads = [0] * placement.num_devices
    tokens = [0] * len(placement.slots)
    order = sorted(range(len(counts)), key=lambda expert: (len(placement.copies[expert]) > 1, -counts[expert]))
    for expert in order:
        slots = placement.copies[expert]
        for slot, more in zip(
            slots, _raise_lowest(counts[expert], slots=slots, loads=loads, of=placement), strict=True
        ):
            tokens[slot] += more
            loads[placement.device_of(slot)] += more
    return tuple(tokens)


def best_share(counts: Sequence[int], *, placement: Placement) -> Share:
    """Return the tokens of each slot such that the busiest device has as few as can be, which is proven.

    From every expert on one copy, tokens flow from devices above a level to those below it, over experts that both
    have. Where no flow is left, the devices reached keep all their tokens among themselves whatever is chosen, so the
    level rises to their mean. At the end few experts are split: what ties devices together has no circle.

    Raises:
        ConfigError: not one count of 0 or more for each expert.
    """
    found = _solve(counts, placement=placement, allowed=placement.copies)
    assert found is not None, "every expert has a slot"
    return found


def best_active(counts: Sequence[int], *, placement: Placement, most_active: int, tries: int = 2000) -> Share:
    """Return the same where no device may compute more than `most_active` of the experts that it hosts.

    Exact: where a device has too many active, one of them must be idle there, and each is tried, the most promising
    choice first. `best_share` seldom leaves any device with too many, since all but few experts are on one copy.

    Source: report 3.4.1: each device hosts for instance 16 experts, of which 9 are active in a step.
    Raises:
        ConfigError: there is no such choice, or none was found in `tries`; counts are not as they must be.
    """
    first = best_share(counts, placement=placement)
    order = count()
    ahead: list[tuple[int, int, Share, tuple[tuple[int, ...], ...]]] = [
        (first.largest, next(order), first, placement.copies)
    ]
    for _ in range(tries):
        if not ahead:
            raise ConfigError(
                f"no choice of copies has at most {most_active} active experts on each of {placement.num_devices} "
                "devices; allow more, or host more copies"
            )
        _, _, share, allowed = heappop(ahead)
        active = _too_many_active(share, placement=placement, most=most_active)
        if not active:
            return Share(tokens=share.tokens, largest=share.largest, least_possible=first.largest)
        for idle in active:
            expert = placement.slots[idle]
            fewer = tuple(
                tuple(slot for slot in slots if slot != idle) if place == expert else slots
                for place, slots in enumerate(allowed)
            )
            solved = _solve(counts, placement=placement, allowed=fewer)
            if solved is not None:
                heappush(ahead, (solved.largest, next(order), solved, fewer))
    raise ConfigError(f"no choice with at most {most_active} active experts a device was found in {tries} tries")


def device_tokens(tokens: Sequence[int], *, placement: Placement) -> list[int]:
    """Return the tokens of each device, from those of each slot."""
    size = placement.slots_per_device
    return [sum(tokens[device * size : (device + 1) * size]) for device in range(placement.num_devices)]


def _raise_lowest(number: int, *, slots: Sequence[int], loads: Sequence[int], of: Placement) -> list[int]:
    """Return what each of an expert's slots gets, such that the lowest of their devices come to one level."""
    order = sorted(range(len(slots)), key=lambda place: (loads[of.device_of(slots[place])], place))
    heights = [loads[of.device_of(slots[place])] for place in order]
    lowest = len(order)
    while number + sum(heights[:lowest]) <= lowest * heights[lowest - 1] and lowest > 1:
        lowest -= 1
    level, left = divmod(number + sum(heights[:lowest]), lowest)
    given = [0] * len(slots)
    for rank, place in enumerate(order[:lowest]):
        given[place] = level - heights[rank] + (rank < left)
    return given


@dataclass
class _Flow:
    """Tokens of each slot, and the load of each device, while they flow from one to the other."""

    placement: Placement
    allowed: tuple[tuple[int, ...], ...]
    tokens: list[int]
    loads: list[int] = field(init=False)
    homes: tuple[tuple[tuple[int, int], ...], ...] = field(init=False)
    """Allowed slots of each expert, each with its device."""

    def __post_init__(self) -> None:
        self.homes = tuple(tuple((slot, self.placement.device_of(slot)) for slot in slots) for slots in self.allowed)
        self.loads = device_tokens(self.tokens, placement=self.placement)

    def lower(self) -> int:
        """Lower the busiest devices as far as can be, and return the load that they are left with."""
        level = -(-sum(self.loads) // len(self.loads))
        while max(self.loads) > level:
            reached = self._push(level)
            if reached is not None:
                level = -(-sum(self.loads[device] for device in reached) // len(reached))
        return level

    def _push(self, level: int) -> set[int] | None:
        """Send tokens from devices above a level to one below it; if there is no way, return where ways lead."""
        start = [device for device, load in enumerate(self.loads) if load > level]
        came: dict[int, tuple[int, int] | None] = dict.fromkeys(start)
        ahead = deque(start)
        while ahead:
            device = ahead.popleft()
            if self.loads[device] < level:
                self._send_along(device, came=came, level=level)
                return None
            first = device * self.placement.slots_per_device
            for slot in range(first, first + self.placement.slots_per_device):
                if not self.tokens[slot]:
                    continue
                for target, there in self.homes[self.placement.slots[slot]]:
                    if there not in came:
                        came[there] = slot, target
                        ahead.append(there)
        return set(came)

    def _send_along(self, end: int, *, came: dict[int, tuple[int, int] | None], level: int) -> None:
        steps = []
        device = end
        while (step := came[device]) is not None:
            steps.append(step)
            device = self.placement.device_of(step[0])
        amount = min(self.loads[device] - level, level - self.loads[end], *(self.tokens[source] for source, _ in steps))
        for source, target in steps:
            self.tokens[source] -= amount
            self.tokens[target] += amount
        self.loads[device] -= amount
        self.loads[end] += amount

    def gather(self) -> None:
        """Put experts' tokens on few copies without changing any device's load: no two ways between two devices."""
        while (circle := self._circle()) is not None:
            # Its slots are in pairs of one expert: what leaves the first of a pair arrives at the second.
            change = Counter(circle[1::2])
            change.subtract(circle[::2])
            amount = min(self.tokens[slot] for slot, sign in change.items() if sign < 0)
            for slot, sign in change.items():
                self.tokens[slot] += sign * amount

    def _circle(self) -> list[int] | None:
        """Find split experts that tie devices into a circle; return its slots, two of each expert, one way round."""
        ties: dict[int, list[tuple[int, int, int]]] = {}
        for slots in self.allowed:
            used = [slot for slot in slots if self.tokens[slot]]
            # A star from the first copy stands for all the ties among an expert's copies.
            for slot in used[1:]:
                here, there = self.placement.device_of(used[0]), self.placement.device_of(slot)
                way = _way(ties, start=here, end=there)
                if way is not None:
                    return [used[0], slot, *way] if here != there else [slot, used[0]]
                ties.setdefault(here, []).append((there, used[0], slot))
                ties.setdefault(there, []).append((here, slot, used[0]))
        return None


def _way(ties: dict[int, list[tuple[int, int, int]]], *, start: int, end: int) -> list[int] | None:
    """Return the slots along the ties from `end` back to `start`, or None where there is no way."""
    came: dict[int, tuple[int, int, int] | None] = {end: None}
    ahead = deque([end])
    while ahead and start not in came:
        device = ahead.popleft()
        for there, leaves, arrives in ties.get(device, ()):
            if there not in came:
                came[there] = device, leaves, arrives
                ahead.append(there)
    if start not in came:
        return None
    way: list[int] = []
    device = start
    while (step := came[device]) is not None:
        device = step[0]
        way = [step[1], step[2], *way]
    return way


def _solve(counts: Sequence[int], *, placement: Placement, allowed: tuple[tuple[int, ...], ...]) -> Share | None:
    """Return the best choice among the allowed slots of each expert; None where one with tokens has none left."""
    _require_counts(counts, placement)
    if any(number and not slots for number, slots in zip(counts, allowed, strict=True)):
        return None
    tokens = _whole(counts, placement=placement, allowed=allowed)
    flow = _Flow(placement, allowed, tokens)
    level = flow.lower()
    flow.gather()
    return Share(tokens=tuple(flow.tokens), largest=max(flow.loads), least_possible=level)


def _whole(counts: Sequence[int], *, placement: Placement, allowed: Sequence[Sequence[int]]) -> list[int]:
    """Return tokens where each expert, the largest first, goes whole to its copy on the least loaded device."""
    tokens = [0] * len(placement.slots)
    loads = [0] * placement.num_devices
    for expert in sorted(range(len(counts)), key=lambda expert: -counts[expert]):
        if counts[expert]:
            slot = min(allowed[expert], key=lambda slot: loads[placement.device_of(slot)])
            tokens[slot] = counts[expert]
            loads[placement.device_of(slot)] += counts[expert]
    return tokens


def _too_many_active(share: Share, *, placement: Placement, most: int) -> list[int]:
    """Return the active slots of the first device that has more than `most`."""
    size = placement.slots_per_device
    for device in range(placement.num_devices):
        active = [slot for slot in range(device * size, (device + 1) * size) if share.tokens[slot]]
        if len(active) > most:
            return active
    return []


def _require_counts(counts: Sequence[int], placement: Placement) -> None:
    if len(counts) != placement.num_experts or min(counts) < 0:
        raise ConfigError(f"{len(counts)} counts for {placement.num_experts} experts; give one each, 0 or more")
