"""Loads that fade, and changes that are worth their moves."""

import pytest

from dsv3.errors import ConfigError
from dsv3.plan.placement import in_order, place_experts
from dsv3.plan.rebalance import FadingLoad, ReplanRule, changes

RULE = ReplanRule(tokens_until_next=1e6, seconds_per_token=1e-6, seconds_per_move=1e-3)


def test_what_was_counted_a_half_life_ago_counts_half():
    load = FadingLoad(num_layers=1, num_experts=2, half_life=60.0)
    load.add([[8, 0]], passed=0.0)
    load.add([[0, 3]], passed=60.0)
    assert load.loads == ((4.0, 3.0),)
    load.add([[0, 0]], passed=30.0)
    assert load.loads[0] == pytest.approx((4 / 2**0.5, 3 / 2**0.5))


def test_many_small_steps_fade_as_one_long_one():
    short, long = (FadingLoad(num_layers=1, num_experts=1, half_life=10.0) for _ in range(2))
    for load in (short, long):
        load.add([[1.0]], passed=0.0)
    for _ in range(100):
        short.add([[0.0]], passed=0.25)
    long.add([[0.0]], passed=25.0)
    assert short.loads[0] == pytest.approx(long.loads[0])


def test_only_layers_that_gain_are_changed_the_best_first():
    even, some, much = [1.0] * 8, [2.0, 2.0] + [1.0] * 6, [9.0, 9.0] + [1.0] * 6
    placements = [in_order(num_experts=8, num_devices=4)] * 3
    found = changes([even, some, much], placements=placements, rule=RULE)
    assert [change.layer for change in found] == [2, 1]
    assert found[0].largest_before == pytest.approx(18 / 24)
    assert found[0].largest_after == pytest.approx(10 / 24)
    assert found[0].saved_seconds == pytest.approx((18 - 10) / 24 - len(found[0].moves) * 1e-3)


def test_a_change_that_costs_more_than_it_saves_is_not_made():
    load, placements = [[9.0, 9.0] + [1.0] * 6], [in_order(num_experts=8, num_devices=4)]
    dear = ReplanRule(tokens_until_next=1e6, seconds_per_token=1e-6, seconds_per_move=1.0)
    assert changes(load, placements=placements, rule=RULE)
    assert changes(load, placements=placements, rule=dear) == ()


def test_the_best_placement_and_no_load_at_all_stay():
    load = [9.0, 9.0] + [1.0] * 6
    best = place_experts(load, num_slots=12, num_devices=4)
    assert changes([load, [0.0] * 8], placements=[best, best], rule=RULE) == ()


def test_what_does_not_fit_is_refused():
    with pytest.raises(ConfigError, match="half-life"):
        FadingLoad(num_layers=1, num_experts=2, half_life=0.0)
    load = FadingLoad(num_layers=1, num_experts=2, half_life=1.0)
    with pytest.raises(ConfigError, match="backward"):
        load.add([[1, 1]], passed=-1.0)
    with pytest.raises(ConfigError, match="counts of 1 layers of"):
        load.add([[1, 1, 1]], passed=0.0)
    with pytest.raises(ConfigError, match="give one each"):
        changes([[1.0, 1.0]], placements=[], rule=RULE)
