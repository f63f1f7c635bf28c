from dataclasses import replace

import pytest

from dsv3 import recipes
from dsv3.plan.cost import Cost, Stretch, extension_phase, pretraining
from dsv3.plan.hardware import H800
from dsv3.plan.training import plan_training
from dsv3.recipes.extension import extension
from dsv3.train.schedule import batch_stretches

V3 = recipes.v3_671b()


@pytest.fixture(scope="module")
def plan():
    return plan_training(V3, gpu=H800, world=2048)


def test_table_1_comes_out_within_5_percent(plan):
    """Report, table 1: 2,664K + 119K + 5K GPU-hours of an H800, $5.576M at $2."""
    stretches = [Stretch(rows=rows, steps=steps) for rows, steps in batch_stretches(V3)]
    cost = Cost(
        world=2048,
        pretrain=pretraining(plan, stretches=stretches),
        extensions=tuple(extension_phase(plan, config=phase, steps=1000) for phase in extension(V3)),
        post_hours=5000.0,
        dollars_per_hour=2.0,
    )
    assert cost.pretrain_hours == pytest.approx(2_664_000, rel=0.05)
    assert cost.context_hours == pytest.approx(119_000, rel=0.05)
    assert cost.total_hours == pytest.approx(2_788_000, rel=0.05)
    assert cost.dollars == pytest.approx(5_576_000, rel=0.05)
    assert [phase.context_ranks for phase in cost.extensions] == [8, 32]
    assert cost.pretrain.tokens == pytest.approx(14.8e12, rel=1e-4)


def test_a_batch_that_does_not_grow_takes_steps_of_one_length(plan):
    phase = pretraining(plan, stretches=[Stretch(rows=15_360, steps=10)])
    assert phase.seconds == pytest.approx(10 * plan.step_seconds)


def test_a_batch_too_small_for_the_schedule_takes_as_long_as_the_smallest_that_is_not(plan):
    small, enough = (pretraining(plan, stretches=[Stretch(rows=rows, steps=1)]) for rows in (3072, 128 * 32))
    assert small.seconds == pytest.approx(enough.seconds)
    assert small.tokens < enough.tokens


def test_an_extension_without_room_to_share_rows_is_planned_on_one_rank():
    tiny = recipes.tiny()
    plan = plan_training(tiny, gpu=H800, world=1)
    phase = extension_phase(plan, config=extension(tiny)[0], steps=3)
    assert (phase.context_ranks, phase.steps, phase.sequence_length) == (1, 3, 2048)


def test_stretches_of_the_batch_are_all_steps():
    config = replace(recipes.tiny(), total_tokens=100_000)
    stretches = batch_stretches(config)
    assert stretches[0][0] == config.batch.start_sequences
    assert sum(rows * steps for rows, steps in stretches) * config.batch.sequence_length >= config.total_tokens
