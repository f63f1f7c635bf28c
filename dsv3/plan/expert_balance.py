"""How evenly experts load their devices, before they are placed by load and after, with copies of the busy ones."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from dsv3.errors import ConfigError
from dsv3.plan.placement import imbalance, place_experts

Layers = Sequence[Sequence[float]]
"""Load of each expert, layer by layer."""


@dataclass(frozen=True, kw_only=True)
class Devices:
    """Who holds the experts of each layer."""

    num_devices: int
    num_nodes: int = 1
    num_groups: int = 1
    """Of node-limited routing; whole groups stay on a node where they divide over the nodes."""


@dataclass(frozen=True, kw_only=True)
class Balance:
    """Of one kind of traffic under one placement: largest over mean load of the devices, layer by layer."""

    traffic: str
    placed_for: str | None
    """The traffic that experts were placed for; None where they lie in their order, without copies."""
    copies: int
    """Slots more than experts."""
    layers: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Over layers. All devices wait for the busiest, so layers' times add up to this."""
        return fmean(self.layers)

    @property
    def worst(self) -> float:
        """Of all layers."""
        return max(self.layers)


def balances(
    loads: Mapping[str, Layers],
    *,
    devices: Devices,
    redundancy: Sequence[float],
    known: Mapping[str, Layers] | None = None,
) -> tuple[Balance, ...]:
    """Return the balance of each kind of traffic: in order, placed for it with each redundancy, and placed for all.

    `redundancy` is copies as a share of the experts; copies fill up the devices' slots, so there may be some more. For
    one kind of traffic alone the last is left out, being the same.

    Experts are placed for the loads in `known`, the same kinds of traffic recorded before; without it for the loads
    that they then meet, which is the best that could be and never had while serving.

    Source: report 3.4; the table is ours.
    Raises:
        ConfigError: kinds of traffic with other layers or experts, a share below 0, or what `place_experts` refuses.
    """
    before = loads if known is None else known
    if set(before) != set(loads):
        raise ConfigError(
            f"experts are to be placed for {', '.join(sorted(before))} and meet {', '.join(sorted(loads))}; "
            "record the same kinds of traffic both times"
        )
    _require_alike({**loads, **{f"{name}, before": layers for name, layers in before.items()}})
    found = []
    everything = _sum(before)
    for name, layers in loads.items():
        found.append(_of(name, layers, placed_for=None, copies=0, each=[in_order(x, devices=devices) for x in layers]))
        for share in redundancy:
            found.append(_placed(name, layers, for_name=name, for_layers=before[name], devices=devices, share=share))
        if len(loads) > 1:
            for share in redundancy:
                found.append(_placed(name, layers, for_name="all", for_layers=everything, devices=devices, share=share))
    return tuple(found)


def expected_imbalance(loads: Mapping[str, Layers], *, num_devices: int, copies: int) -> float:
    """Return by how much the busiest device has more to do than the mean: a share, 0 where all have as much.

    Mean over layers and kinds of traffic, with experts placed for all of it together. Slots are rounded up to as many
    on each device, so there may be more copies.

    Raises:
        ConfigError: kinds of traffic with other layers or experts, or what `place_experts` refuses.
    """
    _require_alike(loads)
    known, devices = _sum(loads), Devices(num_devices=num_devices)
    share = copies / len(known[0])
    found = [
        _placed(name, layers, for_name="all", for_layers=known, devices=devices, share=share).mean
        for name, layers in loads.items()
    ]
    return fmean(found) - 1


def in_order(load: Sequence[float], *, devices: Devices) -> list[float]:
    """Return the devices' loads with experts dealt out in their order; some have one more where they do not divide."""
    loads = [0.0] * devices.num_devices
    for expert, weight in enumerate(load):
        loads[expert * devices.num_devices // len(load)] += weight
    return loads


def slots_for(num_experts: int, *, share: float, num_devices: int) -> int:
    """Return slots for the experts and a share of copies, rounded up to as many on each device.

    Raises:
        ConfigError: the share is below 0.
    """
    if share < 0:
        raise ConfigError(f"redundancy {share:g}; give copies as a share of the experts, 0 or more")
    wanted = num_experts + round(num_experts * share)
    return num_devices * -(-wanted // num_devices)


def device_loads(load: Sequence[float], *, placed_for: Sequence[float], devices: Devices, share: float) -> list[float]:
    """Return the devices' loads where experts are placed for one load and meet another; copies share evenly."""
    placement = place_experts(
        placed_for,
        num_slots=slots_for(len(load), share=share, num_devices=devices.num_devices),
        num_devices=devices.num_devices,
        num_nodes=devices.num_nodes,
        num_groups=devices.num_groups,
    )
    return list(placement.device_loads(load))


def drawn_loads(*, num_experts: int, num_layers: int, skew: float, seed: int) -> Layers:
    """Return loads that are drawn: lognormal, with `skew` as the deviation of the logarithm. No published numbers."""
    chance = random.Random(seed)
    return [[chance.lognormvariate(0, skew) for _ in range(num_experts)] for _ in range(num_layers)]


def _placed(name: str, layers: Layers, *, for_name: str, for_layers: Layers, devices: Devices, share: float) -> Balance:
    each = [
        device_loads(load, placed_for=known, devices=devices, share=share)
        for load, known in zip(layers, for_layers, strict=True)
    ]
    slots = slots_for(len(layers[0]), share=share, num_devices=devices.num_devices)
    return _of(name, layers, placed_for=for_name, copies=slots - len(layers[0]), each=each)


def _of(name: str, layers: Layers, *, placed_for: str | None, copies: int, each: Sequence[Sequence[float]]) -> Balance:
    assert len(each) == len(layers)
    return Balance(traffic=name, placed_for=placed_for, copies=copies, layers=tuple(map(imbalance, each)))


def _sum(loads: Mapping[str, Layers]) -> Layers:
    return [[sum(of) for of in zip(*layer, strict=True)] for layer in zip(*loads.values(), strict=True)]


def _require_alike(loads: Mapping[str, Layers]) -> None:
    shapes = {name: tuple(map(len, layers)) for name, layers in loads.items()}
    if not shapes or not all(shapes.values()) or len(set(shapes.values())) > 1 or len(set(*set(shapes.values()))) > 1:
        raise ConfigError(f"loads of {shapes} experts by layer; give every kind of traffic the same layers and experts")
