"""Moves from one placement to the next: as few as any renaming of devices allows, and they lead there."""

from collections import Counter
from itertools import permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3.errors import ConfigError
from dsv3.plan.moves import best_matching, kept_in_place, moves_between
from dsv3.plan.placement import Placement, in_order, place_experts

CHECKS = settings(deadline=None, max_examples=40)


@CHECKS
@given(
    rows=st.integers(1, 6).flatmap(
        lambda n: st.lists(st.lists(st.integers(0, 4), min_size=n, max_size=n), min_size=n, max_size=n)
    )
)
def test_no_other_matching_is_worth_more(rows):
    found = best_matching([{c: w for c, w in enumerate(row) if w} for row in rows], num_columns=len(rows))
    assert sorted(found) == list(range(len(rows)))
    best = max(sum(row[c] for row, c in zip(rows, order, strict=True)) for order in permutations(range(len(rows))))
    assert sum(row[c] for row, c in zip(rows, found, strict=True)) == best


LOADS = st.lists(st.integers(0, 50), min_size=8, max_size=8)
SHAPES = st.builds(
    lambda devices, nodes, more: {"num_devices": devices, "num_nodes": nodes, "num_slots": 8 + devices * more},
    st.sampled_from([2, 4]),
    st.sampled_from([1, 2]),
    st.integers(0, 2),
)


def placed(shape, *loads):
    return [place_experts(load, num_groups=4, **shape) for load in loads]


@CHECKS
@given(shape=SHAPES, first=LOADS, second=LOADS)
def test_renaming_devices_changes_nothing_but_where_they_are(shape, first, second):
    old, new = placed(shape, first, second)
    kept = kept_in_place(new, old=old)

    def nodes(placement):
        size = placement.num_devices // placement.num_nodes
        devices = [tuple(sorted(placement.experts_of(d))) for d in range(placement.num_devices)]
        return Counter(tuple(sorted(devices[n * size : (n + 1) * size])) for n in range(placement.num_nodes))

    assert nodes(kept) == nodes(new)


@CHECKS
@given(shape=SHAPES, first=LOADS, second=LOADS)
def test_the_moves_lead_from_one_to_the_other(shape, first, second):
    old, new = placed(shape, first, second)
    kept = kept_in_place(new, old=old)
    slots = list(old.slots)
    for move in moves_between(old, kept):
        assert old.slots[move.source] == move.expert
        slots[move.target] = move.expert
    assert tuple(slots) == kept.slots


@CHECKS
@given(shape=SHAPES, first=LOADS, second=LOADS)
def test_no_renaming_of_devices_needs_fewer_moves(shape, first, second):
    old, new = placed(shape, first, second)
    if shape["num_nodes"] > 1:
        return  # devices may not change their node
    held = [Counter(old.experts_of(d)) for d in range(old.num_devices)]
    wanted = [Counter(new.experts_of(d)) for d in range(new.num_devices)]
    stay = max(sum((a & b).total() for a, b in zip(wanted, order, strict=True)) for order in permutations(held))
    assert len(moves_between(old, kept_in_place(new, old=old))) == len(old.slots) - stay


def test_the_same_experts_on_other_devices_are_no_move_at_all():
    old = in_order(num_experts=8, num_devices=4)
    new = Placement(slots=(7, 6, 1, 0, 5, 4, 3, 2), num_experts=8, num_devices=4)
    assert moves_between(old, kept_in_place(new, old=old)) == ()


def test_weights_come_from_the_own_node_if_it_has_them():
    old = Placement(slots=(0, 1, 2, 0), num_experts=3, num_devices=4, num_nodes=2)
    new = Placement(slots=(0, 1, 0, 2), num_experts=3, num_devices=4, num_nodes=2)
    assert [(move.source, move.target) for move in moves_between(old, new)] == [(3, 2), (2, 3)]


def test_placements_of_other_shapes_are_refused():
    with pytest.raises(ConfigError, match="both must be alike"):
        moves_between(in_order(num_experts=8, num_devices=4), in_order(num_experts=8, num_devices=2))
