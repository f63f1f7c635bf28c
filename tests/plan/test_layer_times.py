from dataclasses import replace

import pytest

from dsv3 import recipes
from dsv3.plan.hardware import GPUS, H800
from dsv3.plan.layer_times import TRACE, Clock

V3 = recipes.v3_671b()


def clock(config=V3, *, gpu=H800, imbalance=0.0):
    return Clock(config=config, gpu=gpu, imbalance=imbalance)


def test_a_layer_of_v3_on_h800_takes_what_the_published_trace_has():
    attention, experts = clock().attention(), clock().experts()
    assert attention.forward == pytest.approx(4.36e-3)
    assert attention.backward == pytest.approx(9.34e-3)
    assert attention.weight == pytest.approx(2.39e-3)
    assert (experts.forward, experts.backward, experts.weight) == pytest.approx((4.60e-3, 5.31e-3, 3.54e-3))
    assert experts.forward_link == pytest.approx(6.69e-3 + 8.68e-3)
    assert experts.backward_link == pytest.approx(5.77e-3 + 7.49e-3)
    # Fact sheet 3.8: sums of 29.5 and 28.6 ms.
    assert (TRACE.compute, TRACE.link) == pytest.approx((29.54e-3, 28.63e-3))


def test_the_dense_layers_of_v3_compute_as_much_as_its_experts():
    # 18,432 = 9 x 2,048: the router is all that is missing.
    assert clock().dense_mlp().forward == pytest.approx(clock().experts().forward, rel=0.01)


def test_tokens_alone_take_their_bytes_at_the_rate_of_the_network():
    experts = clock().experts()
    # 3.18 nodes, 7,392 bytes there and 14,336 back, 4,096 tokens, 50 GB/s.
    assert experts.forward_bare == pytest.approx(3.1754 * (7392 + 14_336) * 4096 / 50e9, rel=1e-3)
    assert experts.forward_bare < experts.forward_link


def test_twice_the_tokens_take_twice_as_long():
    twice = replace(V3, batch=replace(V3.batch, micro_batch_sequences=2))
    assert clock(twice).attention().forward == pytest.approx(2 * clock().attention().forward)
    assert clock(twice).experts().backward_link == pytest.approx(2 * clock().experts().backward_link)


def test_longer_rows_lengthen_attention_alone():
    longer = replace(V3, batch=replace(V3.batch, sequence_length=8192))
    assert clock(longer).experts().forward == pytest.approx(2 * clock().experts().forward)
    assert clock(longer).attention().forward > 2 * clock().attention().forward


def test_a_faster_gpu_takes_as_much_less_as_its_peaks_say():
    slow, fast = clock().experts().forward, clock(gpu=GPUS["b200"]).experts().forward
    assert slow / fast == pytest.approx(4500 / 1979)


def test_imbalance_is_waited_for_where_experts_are_shared():
    balanced, skewed = clock().experts(), clock(imbalance=0.5).experts()
    assert skewed.forward_bare == pytest.approx(1.5 * balanced.forward_bare)
    # Eight routed experts wait, the shared one and the router do not.
    assert 1.4 < skewed.forward / balanced.forward < 1.5
    alone = replace(V3, parallel=replace(V3.parallel, expert=1, wire="compute"))
    assert clock(alone, imbalance=0.5).experts() == clock(alone).experts()


def test_ranks_that_share_a_row_fetch_each_others_latents():
    shared = replace(V3, parallel=replace(V3.parallel, context=8))
    attention = clock(shared).attention()
    # 7/8 of 4,096 tokens, 576 numbers in BF16, over NVLink.
    assert attention.forward_bare == pytest.approx(2 * 576 * 4096 * 7 / 8 / 160e9)
    assert clock().attention().forward_bare == 0
