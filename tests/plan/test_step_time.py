from dataclasses import replace

import pytest

from dsv3 import recipes
from dsv3.errors import ConfigError
from dsv3.plan.hardware import H800
from dsv3.plan.layer_times import WorkTimes
from dsv3.plan.schedules import dualpipe
from dsv3.plan.simulate import simulate
from dsv3.plan.step_time import PipelineTime, StageCosts, StepClock, usable_micro_batches

V3 = recipes.v3_671b()
EQUAL = WorkTimes(forward=1.0, backward=1.0, weight=1.0)


def clock(schedule="dualpipe", *, pipeline=4):
    parallel = replace(V3.parallel, schedule=schedule, pipeline=pipeline, stage_layers=())
    return StepClock(config=replace(V3, parallel=parallel), gpu=H800, imbalance=0.2)


def test_equal_stages_idle_as_table_2_says():
    costs = StageCosts(stages=(EQUAL,) * 8, send=0.0)
    timeline = simulate(dualpipe(num_ranks=8, num_micro_batches=20), costs=costs)
    # (PP/2 - 1)(F&B + B - 3W) with F&B = F + B, B whole.
    assert timeline.bubble == pytest.approx(3 * (3.0 + 2.0 - 3 * 1.0))


def test_a_woven_pair_takes_the_longer_of_computing_and_moving():
    busy = replace(EQUAL, forward_link=2.0, backward_link=2.0, forward_bare=1.0, backward_bare=1.0)
    schedule = dualpipe(num_ranks=2, num_micro_batches=4)
    woven = next(step for steps in schedule.steps for step in steps if len(step) == 2)
    alone = next(step for steps in schedule.steps for step in steps if str(step[0]).startswith("F"))
    assert StageCosts(stages=(busy,) * 2, send=0.0).of(woven) == 4.0
    assert StageCosts(stages=(EQUAL,) * 2, send=0.0).of(woven) == 3.0
    assert StageCosts(stages=(busy,) * 2, send=0.5).of(woven) == 5.0
    assert StageCosts(stages=(busy,) * 2, send=0.5).of(alone) == 2.0


def test_parts_of_a_step_are_all_of_it():
    made = clock()
    time = made.pipeline_time(micro_batches=12, data=128)
    assert time.total == pytest.approx(made.timeline(micro_batches=12, data=128).duration)


@pytest.mark.parametrize("schedule", ["1f1b", "zb1p", "dualpipe", "dualpipe_v"])
def test_long_steps_are_told_from_short_ones(schedule):
    made = clock(schedule)
    exact = made.pipeline_time(micro_batches=40, data=128)
    told = made.pipeline_time(micro_batches=40, data=128, exact=False)
    assert told.total == pytest.approx(exact.total, rel=0.005)
    assert made.many([12, 26, 40], data=128)[40] == pytest.approx(exact.total)
    assert made.many([12, 26, 40], data=128)[26] == pytest.approx(
        made.pipeline_time(micro_batches=26, data=128).total, rel=0.005
    )


def test_a_schedule_is_given_as_many_micro_batches_as_it_needs():
    assert usable_micro_batches(V3, wanted=24) == 32  # two for each of 16 ranks
    assert usable_micro_batches(V3, wanted=119) == 120
    alone = replace(V3, parallel=replace(V3.parallel, pipeline=1, stage_layers=()))
    assert usable_micro_batches(alone, wanted=3) == 3


def test_a_number_that_cannot_be_dealt_out_is_refused():
    with pytest.raises(ConfigError, match="multiple of 2"):
        clock().pipeline_time(micro_batches=9999, data=128)


def test_sums_go_on_as_they_went():
    short = PipelineTime(forward=1.0, backward=1.0, weight=1.0, woven=1.0, bubble=1.0)
    longer = PipelineTime(forward=1.0, backward=1.0, weight=1.0, woven=3.0, bubble=1.0)
    assert longer.further(short, steps=2.0).woven == 7.0
