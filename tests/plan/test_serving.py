"""Times of serving kernels and nodes, beside what was published; fact sheet 3.7, 4.1 and 4.2."""

import pytest

from dsv3.config import ModelConfig
from dsv3.errors import ConfigError
from dsv3.plan.hardware import GPUS
from dsv3.plan.serving import COMBINE_BYTES, DISPATCH_BYTES, EXCHANGE_SECONDS, Deployment, ServingTimes


def times_of(gpu="h800", **deployment):
    return ServingTimes(model=ModelConfig(), gpu=GPUS[gpu], deployment=Deployment(**deployment))


def test_cache_and_weights_of_a_decoding_gpu_are_those_of_the_fact_sheet():
    assert times_of().cache_bytes_per_token == 70_272
    assert times_of().weight_bytes == pytest.approx(24e9, rel=0.01)


def test_an_exchange_takes_what_deepep_publishes():
    """128 tokens over 128 GPUs: 192 us out, 369 us back."""
    seconds = 128 * 8 * 7168 * (DISPATCH_BYTES + COMBINE_BYTES) / 50e9 + 2 * EXCHANGE_SECONDS
    assert seconds == pytest.approx(561e-6, rel=0.01)


def test_a_decode_node_at_the_published_speed_brings_the_published_tokens():
    step = times_of().step_time(88, cached_tokens=4989)
    assert 1 / step.total == pytest.approx(21, rel=0.01)
    assert 8 * 88 / step.total == pytest.approx(14_800, rel=0.01)


def test_another_systems_published_decoding_had_no_part_in_it_and_comes_out_near():
    """SGLang: 9 nodes of H100, prompts of 2,000, answers of 100, 256 requests a GPU: 22,300 tokens/s of a node."""
    step = times_of("h100", decode_unit_nodes=9).step_time(256, cached_tokens=2050)
    assert 8 * 256 / step.total == pytest.approx(22_300, rel=0.1)


def test_a_prefill_node_is_as_fast_as_the_training_trace():
    """The longer of 8.96 ms of computing and 15.37 ms of moving 4,096 tokens, in each of 61 layers."""
    assert times_of().prefill_tokens_per_second == pytest.approx(4096 / (15.37e-3 * 61), rel=1e-3)


def test_more_of_anything_takes_longer():
    step = times_of().step_time(64, cached_tokens=4000).total
    assert times_of().step_time(65, cached_tokens=4000).total > step
    assert times_of().step_time(64, cached_tokens=40_000).total > step
    assert times_of(imbalance=0.5).step_time(64, cached_tokens=4000).total > step
    assert times_of(drafts_accepted=0.85).step_time(64, cached_tokens=4000).total > step
    assert times_of(drafts_accepted=0.85).tokens_per_step == 1.85


def test_fewer_nodes_hold_more_experts_each_and_fewer_caches():
    held = [times_of(decode_unit_nodes=unit).most_requests(cached_tokens=4989) for unit in (4, 9, 18, 40)]
    assert held == sorted(held)
    with pytest.raises(ConfigError, match="spread experts over more nodes"):
        times_of(decode_unit_nodes=1).most_requests(cached_tokens=4989)
