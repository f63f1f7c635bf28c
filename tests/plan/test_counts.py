from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dsv3 import recipes
from dsv3.batch import TokenBatch
from dsv3.config import ModelConfig
from dsv3.model.transformer import Transformer
from dsv3.native import choose_cpu_kernels
from dsv3.plan.counts import (
    count_parameters,
    decode_flops_per_token,
    kv_bytes_per_token,
    layer_counts,
    mtp_training_flops_per_token,
    prefill_flops_per_token,
    training_flops_per_token,
    training_flops_per_token_not_causal,
)

V3 = recipes.v3_671b().model
V2 = recipes.v3_236b().model
V2_LITE = recipes.v3_16b().model


def test_v3_has_the_parameters_of_the_fact_sheet():
    counts = count_parameters(V3)
    assert counts.total == 671_026_419_200
    assert counts.embedding == counts.head == 926_679_040
    assert counts.routed_experts == 653_908_770_816
    assert counts.attention == 11_413_547_008
    assert counts.shared_experts == 2_554_331_136
    assert counts.dense_mlp == 1_189_085_184
    assert counts.routers == 106_430_464


def test_v3_activates_the_parameters_of_the_fact_sheet():
    counts = count_parameters(V3)
    assert counts.active_with_embedding == 37_552_297_472
    assert counts.active == 36_625_618_432
    assert counts.active_without_embedding_or_head == 35_698_939_392


def test_the_mtp_module_of_v3_is_counted_with_and_without_copies():
    counts = count_parameters(V3)
    assert counts.mtp == 11_610_068_224
    assert counts.mtp_with_copies == 13_463_426_304
    assert counts.mtp_active_with_copies == 2_541_458_688
    assert counts.total_with_mtp_copies == 684_489_845_504


def test_one_layer_of_v3_has_the_parameters_of_the_fact_sheet():
    layer = layer_counts(V3)
    assert layer.attention == 187_107_328
    assert layer.dense_mlp == 396_361_728
    assert layer.expert == 44_040_192
    assert (layer.router, layer.router_bias) == (1_835_008, 256)
    assert (layer.dense_layer, layer.moe_layer) == (583_483_392, 11_507_286_272)
    assert layer.moe_layer_active == 585_318_656


def test_both_v2_shapes_have_the_parameters_of_the_fact_sheet():
    assert count_parameters(V2).total == 235_741_434_880
    assert count_parameters(V2).active == 20_851_512_320
    assert count_parameters(V2_LITE).total == 15_706_484_224
    assert count_parameters(V2_LITE).active == 2_451_435_008
    assert count_parameters(V2).mtp == count_parameters(V2_LITE).mtp == 0


@pytest.mark.parametrize(("name", "main", "mtp"), [("tiny", 2_165_952, 504_560), ("small", 104_411_008, 14_142_400)])
def test_the_promise_of_a_small_recipe_states_its_parameters(name, main, mtp):
    counts = count_parameters(recipes.by_name(name).model)
    assert (counts.total, counts.mtp) == (main, mtp)
    promise = getattr(recipes, name).__doc__
    assert f"{main:,}" in promise
    assert f"{mtp:,}" in promise


shapes = st.fixed_dictionaries(
    {
        "vocab_size": st.integers(2, 50),
        "hidden_size": st.integers(1, 12),
        "num_hidden_layers": st.integers(1, 4),
        "num_attention_heads": st.integers(1, 3),
        "q_lora_rank": st.none() | st.integers(1, 8),
        "kv_lora_rank": st.integers(1, 8),
        "qk_nope_head_dim": st.integers(1, 6),
        "qk_rope_head_dim": st.sampled_from([2, 4]),
        "v_head_dim": st.integers(1, 6),
        "intermediate_size": st.integers(1, 12),
        "moe_intermediate_size": st.integers(1, 12),
        "first_k_dense_replace": st.integers(0, 6),
        "n_shared_experts": st.integers(0, 2),
        "num_nextn_predict_layers": st.integers(0, 3),
    }
)
routers = st.sampled_from(
    [
        {"n_routed_experts": 8, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 3},
        {"n_routed_experts": 6, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2, "topk_method": "greedy"},
    ]
)


@given(shape=shapes, router=routers)
def test_formula_and_model_agree_for_any_shape(shape, router):
    config = ModelConfig(**shape, **router)
    with torch.device("meta"):
        state = Transformer(config).state_dict()

    def stored(*, having: str = "", mtp: bool = False) -> int:
        return sum(
            tensor.numel() for name, tensor in state.items() if name.startswith("mtp.") is mtp and having in name
        )

    counts = count_parameters(config)
    assert counts.total == stored()
    assert counts.mtp == stored(mtp=True)
    assert counts.attention == stored(having=".self_attn.")
    assert counts.routed_experts == stored(having=".experts.")
    assert counts.shared_experts == stored(having=".shared_experts.")
    assert counts.router_biases == stored(having="e_score_correction_bias")
    assert counts.embedding == stored(having="embed_tokens")


def test_the_latent_cache_takes_the_bytes_of_the_report():
    assert kv_bytes_per_token(V3) == 70_272
    assert kv_bytes_per_token(V3, bytes_per_value=1) == 35_136
    assert kv_bytes_per_token(V3, mtp_modules=1) == 70_272 + 576 * 2
    assert kv_bytes_per_token(V2, bytes_per_value=1) == 34_560
    assert kv_bytes_per_token(V2_LITE, bytes_per_value=1) == 15_552


def test_training_v3_takes_the_published_flops_per_token():
    # 6 x 36.63B + 3 x 61 x 128 heads x 2 x (192 + 128) x 2048 keys; published as 250 GFLOPs.
    assert training_flops_per_token(V3, sequence_length=4096) == 6 * 36_625_618_432 + 30_702_305_280
    assert round(training_flops_per_token(V3, sequence_length=4096) / 1e9) == 250
    assert round(training_flops_per_token_not_causal(V3, sequence_length=4096) / 1e9) == 281


def test_training_v2_takes_the_published_flops_per_token():
    assert round(training_flops_per_token(V2, sequence_length=4096) / 1e9) == 155


def test_training_the_mtp_module_costs_its_active_parameters_and_one_layer_of_attention():
    attention = 3 * 2 * 128 * (192 + 128) * 2048
    expected = 6 * (2_541_458_688 - 926_679_040) + attention
    assert mtp_training_flops_per_token(V3, sequence_length=4096) == expected
    assert mtp_training_flops_per_token(V2, sequence_length=4096) == 0


def test_the_prefill_formula_counts_what_the_model_multiplies():
    # Values as wide as keys, since the model pads narrower ones; the plain kernel, since torch cannot see into the
    # fused one. It multiplies masked scores too, so the formula is asked for twice the mean context.
    wide_enough = {"hidden_size": 256, "intermediate_size": 640, "moe_intermediate_size": 128}
    config, length = replace(recipes.tiny().model, v_head_dim=48, **wide_enough), 64
    model = Transformer(config).eval()
    model.init_weights(generator=torch.Generator().manual_seed(0))
    batch = TokenBatch.from_sequences([list(range(length))])
    choose_cpu_kernels("torch")  # FlopCounterMode cannot see into ours
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.logits(model(batch).hidden)
    expected = length * prefill_flops_per_token(config, context=2 * length)
    assert counter.get_total_flops() == pytest.approx(expected, rel=1e-3)  # norms and biases are no products


def test_decoding_reads_the_latent_of_every_cached_token_once_a_head():
    # Scores: 512 + 64 products for a key; values: 512. Two FLOPs each, 128 heads, 61 layers.
    per_cached_token = 61 * 128 * 2 * (512 + 64 + 512)
    short, long = (decode_flops_per_token(V3, context=context) for context in (1000, 5000))
    assert long - short == 4000 * per_cached_token
    assert decode_flops_per_token(V3, context=0) == 2 * 36_625_618_432
