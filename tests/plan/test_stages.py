"""Layers over stages, and what each rank of a run holds."""

import time
from dataclasses import replace
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3 import recipes
from dsv3.config import ParallelConfig
from dsv3.config.parallel import SCHEDULE_NAMES
from dsv3.errors import ConfigError
from dsv3.plan.counts import count_parameters
from dsv3.plan.memory import training_memory
from dsv3.plan.ranks import plan_ranks
from dsv3.plan.schedules import SCHEDULES
from dsv3.plan.stages import Stages, _split, end_cost, layer_costs, make_stages, split_layers

V3 = recipes.v3_671b()


@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=9).flatmap(
        lambda costs: st.tuples(st.just(costs), st.integers(1, len(costs)))
    ),
    st.integers(0, 100),
)
def test_the_slowest_stage_is_as_fast_as_it_can_be(given_costs, at_the_end):
    costs, parts = tuple(given_costs[0]), given_costs[1]
    if parts == 1:
        assert _split(costs, num_parts=1, at_the_end=at_the_end) == (len(costs),)
        return

    def slowest(ends):
        starts = (0, *ends[:-1])
        sums = [sum(costs[a:b]) for a, b in zip(starts, ends, strict=True)]
        return max(*sums[:-1], sums[-1] + at_the_end)

    every = [(*cut, len(costs)) for cut in combinations(range(1, len(costs)), parts - 1)]
    assert slowest(_split(costs, num_parts=parts, at_the_end=at_the_end)) == min(map(slowest, every))


def test_the_published_model_falls_into_sixteen_stages_that_take_equally_long():
    layers = split_layers(V3.model, num_stages=16, sequence_length=4096)
    assert [layer for stage in layers for layer in stage] == list(range(61))
    assert len(layers[-1]) == 1  # with head and MTP module, which cost as much as four layers
    by_flops = replace(V3.parallel, stage_layers=())
    stages = make_stages(by_flops, model=V3.model, sequence_length=4096)
    costs = layer_costs(V3.model, sequence_length=4096)
    of_stage = [sum(costs[layer] for layer in part) for part in stages.layers]
    of_stage[-1] += end_cost(V3.model, sequence_length=4096)
    assert max(of_stage) < 1.25 / 16 * sum(of_stage)


def test_costs_of_layers_are_those_of_the_whole_model():
    """By the exact counts: all layers and what follows them, twice the active parameters, and attention."""
    model = V3.model
    total = sum(layer_costs(model, sequence_length=4096)) + end_cost(model, sequence_length=4096)
    counts = count_parameters(model)
    attention = 62 * 2 * 128 * (192 + 128) * 2048
    expected = 2 * (counts.active + counts.mtp_active + counts.head) + attention
    assert total == pytest.approx(expected, rel=1e-3)  # norms and biases are counted on one side alone


def test_settings_know_the_schedules_that_there_are():
    assert set(SCHEDULE_NAMES) == set(SCHEDULES)


def test_stages_may_be_given_and_must_fit():
    assert split_layers(V3.model, num_stages=2, sequence_length=4096, counts=(30, 31)) == (range(30), range(30, 61))
    for counts in ((30, 30), (61,), (0, 61)):
        with pytest.raises(ConfigError, match="does not split 61 layers into 2 stages"):
            split_layers(V3.model, num_stages=2, sequence_length=4096, counts=counts)
    with pytest.raises(ConfigError, match="61 layers do not make up 62 stages"):
        split_layers(V3.model, num_stages=62, sequence_length=4096)


def test_embedding_and_head_lie_on_one_rank_in_dualpipe_and_on_two_in_1f1b():
    def stages(schedule):
        return make_stages(ParallelConfig(pipeline=4, schedule=schedule), model=V3.model, sequence_length=4096)

    for schedule, embedding, head in (
        ("dualpipe", (0, 3), (0, 3)),
        ("dualpipe_v", (0,), (0,)),
        ("zbv", (0,), (0,)),
        ("1f1b", (0, 3), (3,)),  # MTP reads the embedding beside the head
    ):
        made = stages(schedule)
        assert (made.holders("embed_tokens.weight"), made.holders("lm_head.weight")) == (embedding, head)
        assert made.holders("mtp.0.block.mlp.gate.weight") == made.ends == head
    without = Stages(layers=(range(1), range(1, 2)), routes=((0, 1),), mtp_modules=0)
    assert without.holders("embed_tokens.weight") == (0,)


def test_the_plan_of_2048_ranks_is_the_reports_and_there_at_once():
    began = time.perf_counter()
    plan = plan_ranks(V3, world=2048)
    assert time.perf_counter() - began < 5
    # Report 3.2, 4.2: PP16, EP64, 128 pipelines of 120 micro-batches, 4 experts a rank, every expert twice a stage.
    assert (plan.data, plan.micro_batches, plan.experts_per_rank, plan.expert_copies) == (128, 120, 4, 2)
    assert all(len(place.stages) == 2 for place in plan.places)
    # Every weight is on two places of the pipeline; summed over the expert axis they are the model, MTP and all.
    held = sum(place.shared_parameters + 64 * place.expert_parameters for place in plan.places)
    counts = count_parameters(V3.model)
    assert held == 2 * (counts.total + counts.mtp)


@pytest.mark.parametrize("recipe", ["original", "fp8_v3"])
@pytest.mark.parametrize("bf16_moments", [True, False])
def test_bytes_of_one_rank_are_those_of_the_whole_run(recipe, bf16_moments):
    """Weights, gradients and optimizer, by the formula for one process."""
    config = replace(
        V3,
        parallel=ParallelConfig(),
        precision=replace(V3.precision, recipe=recipe),
        optim=replace(V3.optim, bf16_moments=bf16_moments),
    )
    (place,) = plan_ranks(config, world=1).places
    whole = training_memory(config, dtype="bfloat16")
    # The plan counts a byte for each value in FP8 and leaves its scales (one in 16,384) out.
    assert place.weights == pytest.approx(whole.weights, rel=0.02)
    assert place.master == pytest.approx(whole.master, rel=1e-6)
    assert place.gradients == pytest.approx(whole.gradients, rel=0.02)
    assert place.average == pytest.approx(whole.average, rel=1e-6)
    assert place.moments == pytest.approx(whole.moments, rel=1e-6)


def test_ranks_that_share_the_optimizer_have_less_of_it():
    whole = plan_ranks(replace(V3, parallel=replace(V3.parallel, zero=False)), world=2048)
    for alone, shared in zip(whole.places, plan_ranks(V3, world=2048).places, strict=True):
        assert shared.moments < alone.moments / 2
        assert shared.master < alone.master
        assert shared.weights == alone.weights


@pytest.mark.parametrize(
    ("world", "told"),
    [
        (2000, "125 ranks of each stage do not divide into expert axes of 64"),
        (1000, "1000 ranks do not divide into pipelines of 16; use .*8.* for parallel.pipeline"),
        (1024 * 7, "15360 rows do not divide over 448 pipelines"),
    ],
)
def test_what_does_not_divide_is_told_before_anything_is_started(world, told):
    with pytest.raises(ConfigError, match=told):
        plan_ranks(V3, world=world)
