"""When experts are placed anew while a model serves: load that fades, and a rule of what a change is worth."""

from collections.abc import Sequence
from dataclasses import dataclass

from dsv3.errors import ConfigError
from dsv3.plan.moves import Move, kept_in_place, moves_between
from dsv3.plan.placement import Placement, place_experts


class FadingLoad:
    """Load of each expert of each layer, where what was counted a half-life ago counts half.

    The half-life is in whatever `passed` is given in: seconds, or tokens.
    """

    def __init__(self, *, num_layers: int, num_experts: int, half_life: float) -> None:
        if not half_life > 0:
            raise ConfigError(f"a half-life of {half_life}; give tokens or seconds, more than 0")
        self.half_life = half_life
        self._loads = [[0.0] * num_experts for _ in range(num_layers)]

    def add(self, counts: Sequence[Sequence[float | int]], *, passed: float) -> None:
        """Fade what was counted by the time that has passed since, then add tokens of each layer and expert.

        Raises:
            ConfigError: time went backward, or there are other layers or experts than this was made for.
        """
        if passed < 0:
            raise ConfigError(f"{passed} passed since the last count; time does not go backward")
        if [len(layer) for layer in counts] != [len(layer) for layer in self._loads]:
            raise ConfigError(
                f"counts of {len(counts)} layers of {sorted({len(layer) for layer in counts})} experts for "
                f"{len(self._loads)} layers of {len(self._loads[0])}"
            )
        kept = 0.5 ** (passed / self.half_life)
        for layer, more in zip(self._loads, counts, strict=True):
            for expert, number in enumerate(more):
                layer[expert] = layer[expert] * kept + number

    @property
    def loads(self) -> tuple[tuple[float, ...], ...]:
        """Of each layer and expert."""
        return tuple(map(tuple, self._loads))


@dataclass(frozen=True, kw_only=True)
class ReplanRule:
    """How often to look whether another placement is better, and when it is worth its moves."""

    every: float = 600.0
    """Seconds or tokens between two looks. Ten minutes is the report's example (3.4.1)."""
    least_gain: float = 0.02
    """Share by which the busiest device's load must fall in a layer; below that it is noise. Not in the report."""
    tokens_until_next: float
    """Token-expert pairs that a layer will compute until the next look; what a better placement is worth."""
    seconds_per_token: float
    """Of one device, for one token in one expert."""
    seconds_per_move: float
    """Service time lost to the move of one expert's weights; 0 where moves are hidden behind other work."""


@dataclass(frozen=True, kw_only=True)
class LayerChange:
    """Another placement of one layer, and why."""

    layer: int
    placement: Placement
    moves: tuple[Move, ...]
    largest_before: float
    """Share of the layer's load on its busiest device."""
    largest_after: float
    saved_seconds: float
    """Until the next look, less what the moves cost."""


def changes(
    loads: Sequence[Sequence[float | int]], *, placements: Sequence[Placement], rule: ReplanRule, num_groups: int = 1
) -> tuple[LayerChange, ...]:
    """Return the layers whose experts are worth moving, with what moves, the most worthwhile layer first.

    Slots, devices and nodes stay as they are. The time saved is that of the busiest device, which all others wait for.

    Source: report 3.4.1, "periodically adjusted"; that a change must be worth its moves is ours.
    Raises:
        ConfigError: not as many placements as layers.
    """
    if len(loads) != len(placements):
        raise ConfigError(f"loads of {len(loads)} layers for {len(placements)} placements; give one each")
    found = (
        _change(layer, load=load, placement=placement, rule=rule, num_groups=num_groups)
        for layer, (load, placement) in enumerate(zip(loads, placements, strict=True))
    )
    return tuple(sorted((change for change in found if change), key=lambda change: -change.saved_seconds))


def _change(
    layer: int, *, load: Sequence[float | int], placement: Placement, rule: ReplanRule, num_groups: int
) -> LayerChange | None:
    total = sum(load)
    if not total:
        return None
    new = place_experts(
        load,
        num_slots=len(placement.slots),
        num_devices=placement.num_devices,
        num_nodes=placement.num_nodes,
        num_groups=num_groups,
    )
    before = max(placement.device_loads(load)) / total
    after = max(new.device_loads(load)) / total
    if after > before * (1 - rule.least_gain):
        return None
    new = kept_in_place(new, old=placement)
    moves = moves_between(placement, new)
    saved = (before - after) * rule.tokens_until_next * rule.seconds_per_token - len(moves) * rule.seconds_per_move
    if saved <= 0:
        return None
    return LayerChange(
        layer=layer, placement=new, moves=moves, largest_before=before, largest_after=after, saved_seconds=saved
    )
