from dataclasses import replace

import pytest

from dsv3 import recipes
from dsv3.errors import ConfigError
from dsv3.plan.hardware import GPUS, H800
from dsv3.plan.layout_search import lighter_split, search_layouts
from dsv3.plan.training import plan_training

LITE = recipes.v3_16b()


@pytest.fixture(scope="module")
def search():
    return search_layouts(LITE, gpu=GPUS["b200"], world=4, imbalance=0.2)


def test_the_fastest_comes_first_and_all_fit(search):
    seconds = [one.plan.step_seconds for one in search.running]
    assert seconds == sorted(seconds)
    assert all(one.plan.fits for one in search.running)
    assert search.best is search.running[0].plan


def test_every_other_says_why_it_loses(search):
    assert search.running[0].why == "the fastest"
    assert all(" slower: " in one.why for one in search.running[1:])
    reasons = {one.problem for one in search.refused}
    assert reasons <= {"memory", "divisibility"}
    assert all("GB, and a GPU has" in one.why for one in search.refused if one.problem == "memory")


def test_a_cluster_that_is_too_small_is_refused_with_what_comes_nearest():
    too_small = search_layouts(LITE, gpu=replace(H800, memory_gb=8.0), world=2, imbalance=0.2)
    with pytest.raises(ConfigError, match=r"comes nearest: the fullest rank needs .* use more GPUs or larger ones"):
        _ = too_small.best


@pytest.mark.slow
def test_the_best_layout_of_v3_on_2048_h800_is_the_published_one():
    """Report 3.2: PP 16, EP 64, DualPipe, ZeRO-1."""
    best = search_layouts(recipes.v3_671b(), gpu=H800, world=2048, imbalance=0.2).best.config.parallel
    assert (best.pipeline, best.expert, best.schedule, best.zero) == (16, 64, "dualpipe", True)


def test_layers_move_from_the_first_stage_to_the_last_until_they_fit():
    config = replace(LITE, parallel=replace(LITE.parallel, pipeline=4, schedule="dualpipe", expert=8, zero=True))
    plan = plan_training(config, gpu=GPUS["h200"], world=32)
    needed = plan.bytes_of(plan.fullest)
    tight = plan_training(config, gpu=replace(GPUS["h200"], memory_gb=0.98 * needed / 1e9), world=32)
    lighter = lighter_split(tight)
    assert not tight.fits
    assert lighter is None or (lighter.fits and sum(lighter.config.parallel.stage_layers) == 27)
