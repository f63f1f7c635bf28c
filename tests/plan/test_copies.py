"""Choices of copies against all choices there are."""

from itertools import combinations, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3.errors import ConfigError
from dsv3.plan.copies import best_active, best_share, device_tokens, share_tokens
from dsv3.plan.placement import Placement, in_order, place_experts

CHECKS = settings(deadline=None, max_examples=40)


@st.composite
def steps(draw, most_experts=6):
    """Return what `placed` makes a placement of, and the tokens of a step, which need not be those it was made for."""
    devices = draw(st.integers(1, 4))
    experts = devices * draw(st.integers(1, max(1, most_experts // devices)))
    loads = st.lists(st.integers(0, 30), min_size=experts, max_size=experts)
    slots = experts + devices * draw(st.integers(0, 2))
    return {"load": draw(loads), "num_slots": slots, "num_devices": devices, "apart": draw(st.booleans())}, draw(loads)


def placed(shape):
    shape = dict(shape)
    return place_experts(shape.pop("load"), **shape)


def least_by_subsets(counts, *, placement, allowed):
    """Return the smallest possible largest device, by the tokens that some devices cannot get rid of (Hall)."""
    devices = range(placement.num_devices)
    homes = [{placement.device_of(slot) for slot in slots} for slots in allowed]
    return max(
        -(-sum(number for number, home in zip(counts, homes, strict=True) if home <= set(group)) // len(group))
        for size in range(1, placement.num_devices + 1)
        for group in combinations(devices, size)
    )


def check_share(tokens, counts, placement):
    assert min(tokens) >= 0
    for expert, slots in enumerate(placement.copies):
        assert sum(tokens[slot] for slot in slots) == counts[expert]


@CHECKS
@given(step=steps())
def test_every_token_goes_to_a_copy_of_its_expert(step):
    placement, counts = placed(step[0]), step[1]
    check_share(share_tokens(counts, placement=placement), counts, placement)
    check_share(best_share(counts, placement=placement).tokens, counts, placement)


@CHECKS
@given(step=steps())
def test_the_best_choice_is_as_even_as_any_can_be(step):
    placement, counts = placed(step[0]), step[1]
    share = best_share(counts, placement=placement)
    least = least_by_subsets(counts, placement=placement, allowed=placement.copies)
    assert max(device_tokens(share.tokens, placement=placement)) == share.largest == least
    assert max(device_tokens(share_tokens(counts, placement=placement), placement=placement)) >= least


@CHECKS
@given(step=steps())
def test_the_best_choice_splits_few_experts(step):
    """What is split ties devices together without a circle, so there is less of it than there are devices."""
    placement, counts = placed(step[0]), step[1]
    active = sum(number > 0 for number in best_share(counts, placement=placement).tokens)
    assert active <= sum(number > 0 for number in counts) + placement.num_devices - 1


@settings(deadline=None, max_examples=15)
@given(step=steps(most_experts=4), most=st.integers(1, 3))
def test_with_few_active_experts_no_choice_is_better_either(step, most):
    placement, counts = placed(step[0]), step[1]
    busy = [slots if number else () for number, slots in zip(counts, placement.copies, strict=True)]
    chosen = [
        [kept for size in range(1, len(slots) + 1) for kept in combinations(slots, size)] if slots else [()]
        for slots in busy
    ]
    least = None
    for allowed in product(*chosen):
        active = [placement.device_of(slot) for slots in allowed for slot in slots]
        if max(map(active.count, range(placement.num_devices))) <= most:
            found = least_by_subsets(counts, placement=placement, allowed=allowed)
            least = found if least is None else min(least, found)
    if least is None:
        with pytest.raises(ConfigError, match="active experts"):
            best_active(counts, placement=placement, most_active=most)
        return
    share = best_active(counts, placement=placement, most_active=most)
    check_share(share.tokens, counts, placement)
    assert share.largest == least
    for device in range(placement.num_devices):
        start = device * placement.slots_per_device
        assert sum(number > 0 for number in share.tokens[start : start + placement.slots_per_device]) <= most


def test_the_reports_sixteen_hosted_of_which_nine_are_active_are_chosen_evenly():
    """Report 3.4.1: hosted 16, active 9, and every device has what an even share is."""
    load = [1000 // (1 + (expert * 97) % 256) + 1 for expert in range(256)]
    placement = place_experts(load, num_slots=16 * 48, num_devices=48)
    counts = [number * (50 + (expert * 31) % 101) // 100 for expert, number in enumerate(load)]
    share = best_active(counts, placement=placement, most_active=9)
    assert share.largest == share.least_possible == -(-sum(counts) // 48)


def test_tokens_go_to_the_least_loaded_copy():
    placement = Placement(slots=(0, 1, 0, 2), num_experts=3, num_devices=2)
    assert share_tokens([10, 6, 2], placement=placement) == (3, 6, 7, 2)
    assert share_tokens([1, 0, 0], placement=placement) == (1, 0, 0, 0)


def test_counts_of_other_experts_are_refused():
    with pytest.raises(ConfigError, match="2 counts for 4 experts"):
        share_tokens([1, 2], placement=in_order(num_experts=4, num_devices=2))
