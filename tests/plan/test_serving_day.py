"""The published day of production, and what must hold of any other."""

import math
import random
from statistics import fmean

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3.config import ModelConfig
from dsv3.errors import ConfigError
from dsv3.plan.hardware import GPUS
from dsv3.plan.serving import Deployment, ServingTimes
from dsv3.plan.serving_day import Goals, Traffic, most_requests, plan_day, whole_units
from dsv3.plan.serving_lines import PUBLISHED, serving_lines

TIMES = ServingTimes(model=ModelConfig(), gpu=GPUS["h800"], deployment=Deployment())


@pytest.fixture(scope="module")
def day():
    return plan_day(Traffic(), times=TIMES, goals=Goals(), seconds=10)


def test_the_published_day_comes_out_within_ten_percent(day):
    found = {line.name: line.value for line in serving_lines(day, dollars_per_hour=2.0)}
    for name, published in PUBLISHED.items():
        assert found[name] == pytest.approx(published, rel=0.1), name
    assert 20 <= day.tokens_per_second_of_a_user <= 22


def test_every_fitted_number_says_what_it_is_fitted_to(day):
    lines = serving_lines(day, dollars_per_hour=2.0)
    fitted = [line for line in lines if line.source.value == "fitted"]
    assert {line.name for line in fitted} == {"exchange", "overhead"}
    assert all("to " in line.why for line in fitted)


def test_nodes_come_in_whole_units_and_follow_the_load(day):
    assert all(hour.prefill_nodes % 4 == 0 and hour.decode_nodes % 18 == 0 for hour in day.hours)
    loads = [day.traffic.load(hour.hour + 0.5) for hour in day.hours]
    busiest, idlest = loads.index(max(loads)), loads.index(min(loads))
    assert day.hours[busiest].nodes == day.peak_nodes > day.mean_nodes > day.hours[idlest].nodes
    assert fmean(loads) == pytest.approx(1)


def test_equal_seeds_give_equal_days_and_others_others():
    days = [plan_day(Traffic(), times=TIMES, goals=Goals(), seconds=1, seed=seed).hours for seed in (1, 1, 2)]
    assert days[0] == days[1] != days[2]


def test_lengths_are_those_that_were_asked_for():
    traffic = Traffic()
    asked = list(traffic.arrivals(per_second=2000, seconds=20, chance=random.Random(0)))
    prompts, answers = [one.prompt for one in asked], [one.answer for one in asked]
    assert len(asked) == pytest.approx(40_000, rel=0.02)
    assert fmean(prompts) == pytest.approx(traffic.prompt_tokens, rel=0.03)
    assert sum(one.new for one in asked) / sum(prompts) == pytest.approx(1 - traffic.hit_share, rel=0.03)
    # The mean over drawn tokens of the cache they see: prompt, and half of the answer as its own tokens see it.
    seen = sum(one.answer * (one.prompt + one.answer / 2) for one in asked) / sum(answers)
    assert seen == pytest.approx(4989, rel=0.05)


@settings(deadline=None, max_examples=30)
@given(speed=st.floats(1, 40), cached=st.floats(100, 50_000))
def test_as_many_share_a_step_as_memory_and_speed_allow_and_no_more(speed, cached):
    traffic, goals = Traffic(cached_tokens=cached), Goals(tokens_per_second=speed)
    most = most_requests(traffic, times=TIMES, goals=goals)
    assert 1 <= most <= TIMES.most_requests(cached_tokens=cached)
    assert 1 / TIMES.step_time(most, cached_tokens=cached).total >= speed
    if most < TIMES.most_requests(cached_tokens=cached):
        assert 1 / TIMES.step_time(most + 1, cached_tokens=cached).total < speed


@given(gpus=st.floats(0.1, 10_000), unit=st.integers(1, 40))
def test_whole_units_have_room_and_none_is_idle(gpus, unit):
    nodes = whole_units(gpus, unit=unit)
    assert nodes % unit == 0
    assert nodes * 8 >= gpus - 1e-6 * unit
    assert nodes == unit or (nodes - unit) * 8 < gpus


def test_too_much_to_ask_is_refused_with_what_one_alone_would_get():
    with pytest.raises(ConfigError, match="one alone gets"):
        plan_day(Traffic(), times=TIMES, goals=Goals(tokens_per_second=500), seconds=5)
    with pytest.raises(ConfigError, match="hit_share"):
        Traffic(hit_share=1.0)


def test_an_overloaded_fleet_makes_users_wait():
    """With no reserve and a spread of the load over one hour, prompts queue."""
    easy, tight = (
        plan_day(Traffic(peak=1.0), times=TIMES, goals=Goals(reserve=reserve), seconds=10) for reserve in (0.4, 0.0)
    )
    waits = [fmean(hour.first_token[2] for hour in day.hours) for day in (easy, tight)]
    assert waits[0] < waits[1]
    assert all(not math.isnan(wait) for wait in waits)
