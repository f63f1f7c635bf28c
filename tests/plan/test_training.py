"""The published run, from its settings."""

from dataclasses import replace

import pytest

from dsv3 import recipes
from dsv3.errors import ConfigError
from dsv3.plan.counts import count_parameters
from dsv3.plan.hardware import GPUS, H800
from dsv3.plan.ranks import plan_ranks
from dsv3.plan.training import plan_training

V3 = recipes.v3_671b()


@pytest.fixture(scope="module")
def published():
    return plan_training(V3, gpu=H800, world=2048)


def test_the_published_run_takes_its_published_time(published):
    """'Insights into DeepSeek-V3', table 4: step, tokens a day, MFU with BF16's peak."""
    assert published.step_seconds == pytest.approx(19.926, rel=0.05)
    assert published.tokens_per_second == pytest.approx(272.80e9 / 86_400, rel=0.05)
    assert published.mfu(causal=True) == pytest.approx(0.3894, rel=0.05)
    assert published.mfu(causal=False) == pytest.approx(0.4373, rel=0.05)
    assert published.micro_batches == 120


def test_the_one_fitted_number_gives_what_it_was_fitted_to(published):
    assert published.pipeline.woven == pytest.approx(13.95, rel=0.005)
    balanced = plan_training(V3, gpu=H800, world=2048, imbalance=0.0, exact=False)
    assert balanced.step_seconds == pytest.approx(18.1, rel=0.01)  # without it the plan would be a tenth too fast


def test_computing_moving_and_waiting_are_all_of_a_step(published):
    parts = published.pipeline
    working = parts.forward + parts.backward + parts.weight + parts.woven
    assert published.step_seconds == pytest.approx(working + parts.bubble + published.optimizer_seconds)
    assert 0 < published.uncovered_seconds < working


def test_every_rank_holds_what_the_plan_of_ranks_says(published):
    assert published.places == plan_ranks(V3, world=2048).places
    held = sum(place.shared_parameters + 64 * place.expert_parameters for place in published.places)
    counts = count_parameters(V3.model)
    assert held == 2 * (counts.total + counts.mtp)


def test_bytes_over_the_network_are_those_of_all_layers(published):
    found = {(flow.name, flow.link): flow.num_bytes for flow in published.flows}
    # 58 layers and the MTP module over 16 ranks, 120 x 4,096 tokens, there and back again.
    passes = 2 * 120 * 4096 * 59 / 16
    assert found["expert dispatch", "IB"] == pytest.approx(passes * 3.1754 * 7392, rel=1e-3)
    assert found["expert combine", "IB"] == pytest.approx(passes * 3.1754 * 14_336, rel=1e-3)
    # 15 of 16 stages send on: activations in BF16, and gradients back.
    assert found["pipeline sends", "IB"] == pytest.approx(2 * 120 * 4096 * 7168 * 2 * 15 / 16)


def test_more_gpus_take_less_time_and_idle_more():
    """Half the micro-batches for each of twice as many pipelines."""
    lite = recipes.v3_16b()
    lite = replace(lite, parallel=replace(lite.parallel, pipeline=4, schedule="1f1b"))
    few, many = (plan_training(lite, gpu=H800, world=world) for world in (256, 512))
    assert many.step_seconds < few.step_seconds
    assert many.bubble_fraction > few.bubble_fraction


@pytest.mark.parametrize("name", [name for name in recipes.names() if name != "v3_671b"])
def test_every_recipe_has_a_plan(name):
    config = recipes.by_name(name)
    world = config.parallel.pipeline * config.parallel.expert
    plan = plan_training(config, gpu=GPUS["b200"], world=world)
    assert plan.step_seconds > 0
    assert 0 < plan.mfu(causal=True) < 1
    assert plan.bytes_of(plan.fullest) > 0


def test_a_dense_model_has_a_plan():
    tiny = recipes.tiny()
    dense = replace(tiny, model=replace(tiny.model, first_k_dense_replace=3, num_nextn_predict_layers=0))
    plan = plan_training(dense, gpu=H800, world=2)
    assert {flow.name for flow in plan.flows} == {"gradients"}


def test_a_micro_batch_has_no_more_rows_than_a_pipeline():
    plan = plan_training(recipes.tiny(), gpu=H800, world=2)
    assert (plan.config.batch.micro_batch_sequences, plan.micro_batches) == (5, 1)


def test_cpus_hold_everything_in_fp32():
    tiny = recipes.tiny()
    on_cpu = plan_training(replace(tiny, runtime=replace(tiny.runtime, dtype="float32")), gpu=H800, world=1)
    (place,) = on_cpu.places
    counts = count_parameters(tiny.model)
    assert (place.weights, place.master) == (4 * (counts.total + counts.mtp), 0)
    assert on_cpu.buffers.system == 0


@pytest.mark.parametrize(
    ("changes", "gpu", "world", "told"),
    [
        ({}, "a100", 2048, "needs products in FP8, and a100 has none; use --set precision.recipe=original"),
        ({}, "h800", 2000, "do not divide into expert axes of 64"),
        ({}, "h800", 7 * 1024, "15360 rows do not divide over 448 pipelines"),
        ({"expert": 48}, "h800", 2048, "use a divisor of 256, such as 32 or 64"),
        ({"ranks_per_node": 6}, "h800", 2048, "does not fill whole nodes of 6"),
    ],
)
def test_what_cannot_run_is_refused_with_what_would(changes, gpu, world, told):
    config = replace(V3, parallel=replace(V3.parallel, **changes))
    with pytest.raises(ConfigError, match=told):
        plan_training(config, gpu=GPUS[gpu], world=world)
