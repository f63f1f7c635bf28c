"""Placement of experts against the published example, and properties that any placement must have."""

from collections import Counter
from itertools import product
from time import process_time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3.errors import ConfigError
from dsv3.plan.placement import Placement, balanced_packs, copy_experts, imbalance, in_order, place_experts

CHECKS = settings(deadline=None, max_examples=50)

# The example of the EPLB repository, with the output that it has where sorting is stable.
PUBLISHED_LOADS = (
    (90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86),
    (20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27),
)
PUBLISHED_SLOTS = (
    (5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1),
    (7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1),
)


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("apart", [False, True])
def test_the_published_example_comes_out_slot_for_slot(layer, apart):
    placed = place_experts(PUBLISHED_LOADS[layer], num_slots=16, num_groups=4, num_nodes=2, num_devices=8, apart=apart)
    assert placed.slots == PUBLISHED_SLOTS[layer]


@st.composite
def layers(draw):
    """Return loads, slots and devices of a layer, skewed as loads are."""
    devices = draw(st.integers(1, 6))
    per_device = draw(st.integers(1, 5))
    load = draw(
        st.lists(
            st.one_of(st.integers(0, 5), st.integers(0, 1000), st.floats(0, 100)),
            min_size=devices * per_device,
            max_size=devices * per_device,
        )
    )
    return [float(x) for x in load], devices * (per_device + draw(st.integers(0, 3))), devices


@CHECKS
@given(layer=layers(), apart=st.booleans())
def test_every_expert_has_a_slot_and_every_slot_an_expert(layer, apart):
    load, num_slots, num_devices = layer
    placed = place_experts(load, num_slots=num_slots, num_devices=num_devices, apart=apart)
    assert len(placed.slots) == num_slots
    assert set(placed.slots) == set(range(len(load)))
    assert sum(placed.device_loads(load)) == pytest.approx(sum(load))


@CHECKS
@given(layer=layers())
def test_copies_of_one_expert_are_on_different_devices_wherever_they_can_be(layer):
    load, num_slots, num_devices = layer
    placed = place_experts(load, num_slots=num_slots, num_devices=num_devices)
    if placed.slots_per_device <= len(load):
        for device in range(num_devices):
            assert max(Counter(placed.experts_of(device)).values()) == 1


@CHECKS
@given(layer=layers())
def test_where_the_published_algorithm_puts_no_copies_together_its_result_stands(layer):
    load, num_slots, num_devices = layer
    published = place_experts(load, num_slots=num_slots, num_devices=num_devices, apart=False)
    if all(max(Counter(published.experts_of(device)).values()) == 1 for device in range(num_devices)):
        assert place_experts(load, num_slots=num_slots, num_devices=num_devices) == published


@CHECKS
@given(layer=layers())
def test_no_device_has_more_than_the_mean_and_one_copy(layer):
    """The bound of greedy packing; it holds for the published algorithm and for the copies taken apart."""
    load, num_slots, num_devices = layer
    for apart in (False, True):
        placed = place_experts(load, num_slots=num_slots, num_devices=num_devices, apart=apart)
        heaviest = max(weight / len(slots) for weight, slots in zip(load, placed.copies, strict=True))
        assert max(placed.device_loads(load)) <= (sum(load) / num_devices + heaviest) * (1 + 1e-9) + 1e-9


@CHECKS
@given(load=st.lists(st.integers(0, 10**6), min_size=8, max_size=8, unique=True), order=st.permutations(range(8)))
def test_experts_with_other_numbers_get_the_same_devices(load, order):
    """Where no two loads are equal, nothing hangs on the experts' numbers."""
    placed = place_experts(load, num_slots=8, num_devices=4)
    renamed = place_experts([load[expert] for expert in order], num_slots=8, num_devices=4)
    assert [order[expert] for expert in renamed.slots] == list(placed.slots)


@CHECKS
@given(layer=layers(), scale=st.sampled_from([0.25, 2.0, 1024.0]))
def test_only_the_proportions_of_loads_count_and_nothing_is_left_to_chance(layer, scale):
    load, num_slots, num_devices = layer
    assert place_experts([x * scale for x in load], num_slots=num_slots, num_devices=num_devices) == place_experts(
        load, num_slots=num_slots, num_devices=num_devices
    )


@CHECKS
@given(load=st.lists(st.integers(0, 100), min_size=1, max_size=4), more=st.integers(0, 6))
def test_no_other_numbers_of_copies_have_a_lighter_heaviest_copy(load, more):
    def heaviest(counts):
        return max(weight / number for weight, number in zip(load, counts, strict=True))

    num_slots = len(load) + more
    copies = Counter(copy_experts(load, num_slots=num_slots))
    every = (counts for counts in product(range(1, more + 2), repeat=len(load)) if sum(counts) == num_slots)
    assert heaviest([copies[expert] for expert in range(len(load))]) == min(map(heaviest, every))


def test_groups_stay_whole_on_their_node_and_copies_with_them():
    load = [float((expert * 37) % 101 + 400 * (expert == 9)) for expert in range(256)]
    placed = place_experts(load, num_slots=288, num_groups=8, num_nodes=4, num_devices=32)
    node_of_group = {}
    for slot, expert in enumerate(placed.slots):
        assert node_of_group.setdefault(expert // 32, slot // 72) == slot // 72
    assert Counter(node_of_group.values()) == {0: 2, 1: 2, 2: 2, 3: 2}
    assert imbalance(placed.device_loads(load)) < 1.1


def test_groups_that_do_not_divide_over_the_nodes_are_placed_globally():
    load = [float((expert * 37) % 101) for expert in range(256)]
    decode = place_experts(load, num_slots=288, num_groups=8, num_nodes=18, num_devices=144)
    assert decode == place_experts(load, num_slots=288, num_devices=144)


def test_58_layers_of_320_slots_take_less_than_a_second():
    load = [1000 / (1 + (expert * 97) % 256) for expert in range(256)]
    start = process_time()
    for _ in range(58):
        place_experts(load, num_slots=320, num_devices=320)
    assert process_time() - start < 1


def test_equal_loads_are_packed_in_order():
    assert balanced_packs([1.0] * 6, num_packs=3) == [[0, 3], [1, 4], [2, 5]]
    assert balanced_packs([3.0, 1.0], num_packs=2) == [[0], [1]]


def test_imbalance_is_the_largest_over_the_mean():
    assert imbalance([3.0, 1.0, 2.0]) == pytest.approx(1.5)
    assert imbalance([0.0, 0.0]) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_slots": 9, "num_devices": 4}, "9 slots do not divide over 4 devices; use a multiple of 4 slots"),
        ({"num_slots": 4, "num_devices": 4}, "4 slots for 8 experts; give 8 or more"),
        ({"num_slots": 8, "num_devices": 4, "num_nodes": 3}, "4 devices do not divide over 3 nodes"),
        ({"num_slots": 8, "num_devices": 0}, "8 slots do not divide over 0 devices"),
        ({"num_slots": 8, "num_devices": 2, "num_nodes": 1, "num_groups": 3}, "8 experts do not divide over 3 groups"),
    ],
)
def test_what_does_not_divide_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        place_experts([1.0] * 8, **settings)


@pytest.mark.parametrize("load", [[1.0, -1.0], [float("nan"), 1.0], []])
def test_loads_that_are_none_are_refused(load):
    with pytest.raises(ConfigError, match="load"):
        place_experts(load, num_slots=2, num_devices=1)


def test_a_placement_without_an_expert_is_refused():
    with pytest.raises(ConfigError, match="not each of 3"):
        Placement(slots=(0, 1, 1, 0), num_experts=3, num_devices=2)
    assert in_order(num_experts=4, num_devices=2).experts_of(1) == (2, 3)
