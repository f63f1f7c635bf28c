from dataclasses import replace

import pytest
import torch

from dsv3 import recipes
from dsv3.config import PrecisionConfig
from dsv3.errors import ConfigError
from dsv3.model.precision import Fp8Precision, quantise_weights
from dsv3.model.transformer import Transformer
from dsv3.plan.memory import training_memory, weight_bytes

IN_FP8 = recipes.v3_671b()
V3 = replace(IN_FP8, precision=PrecisionConfig(recipe="original"))
BIASES = 59 * 256
LEARNED = 671_026_419_200 + 11_610_068_224 - BIASES


def test_training_in_bf16_keeps_what_report_3_3_says():
    memory = training_memory(V3, dtype="bfloat16")
    assert memory.weights == 2 * LEARNED + 4 * BIASES
    assert memory.master == 4 * LEARNED
    assert memory.moments == (2 + 2) * LEARNED
    assert memory.gradients == (4 + 2) * LEARNED
    assert memory.on_device == memory.weights + memory.master + memory.moments + memory.gradients
    assert memory.average == 4 * LEARNED


def test_training_in_fp8_keeps_what_report_3_3_says():
    """By hand: 62 layers less norms, routers and biases; a byte a weight, and an FP32 scale for 128 x 128 of them."""
    attention = 7168 * (1536 + 576) + 1536 * 24_576 + 512 * 32_768 + 16_384 * 7168
    scales = 56 * (12 + 5) + 12 * 192 + 4 * 256 + 128 * 56
    dense, expert = 3 * 7168 * 18_432, 3 * 7168 * 2048
    weights = 62 * attention + 3 * dense + 59 * 257 * expert
    scales = 62 * scales + (3 * dense + 59 * 257 * expert) // 128**2
    memory = training_memory(IN_FP8, dtype="bfloat16")
    rest = LEARNED - weights
    assert memory.weights == 2 * rest + 4 * BIASES + weights + 4 * scales
    assert memory.master == 4 * LEARNED
    assert memory.gradients == 4 * LEARNED + 2 * rest
    assert memory.moments == (2 + 2) * LEARNED


@pytest.mark.parametrize("recipe", ["fp8_v3", "fp8_per_tensor"])
def test_fp8_copies_take_the_predicted_bytes(recipe):
    """`small` is cut short; all of its blocks are whole, so that no scale is repeated."""
    base = recipes.small()
    config = replace(base, model=replace(base.model, num_hidden_layers=3, first_k_dense_replace=1, vocab_size=512))
    in_fp8 = replace(config, precision=PrecisionConfig(recipe=recipe))
    model = Transformer(config.model)
    model.init_weights(generator=torch.Generator().manual_seed(0))
    precision = quantise_weights(model.weights_in_fp8(), config=in_fp8.precision)
    assert isinstance(precision, Fp8Precision)
    narrow, wide = training_memory(in_fp8, dtype="float32"), training_memory(config, dtype="float32")
    extra = narrow.weights + narrow.master - wide.weights
    assert precision.num_bytes == extra
    assert narrow.gradients == wide.gradients


def test_weights_in_fp32_are_their_own_master():
    memory = training_memory(V3, dtype="float32")
    assert (memory.weights, memory.master, memory.gradients) == (4 * (LEARNED + BIASES), 0, 4 * LEARNED)


def test_fp32_moments_take_twice_the_bytes_and_no_average_takes_none():
    config = replace(V3, optim=replace(V3.optim, bf16_moments=False, ema_decay=0.0))
    memory = training_memory(config, dtype="bfloat16")
    assert (memory.moments, memory.average) == (8 * LEARNED, 0)


def test_fp8_weights_in_memory_are_the_checkpoint_without_the_copies_of_embedding_and_head():
    assert weight_bytes(V3.model, precision="fp8") == 688_574_839_360 - 2 * 2 * 926_679_040


@pytest.mark.parametrize("name", recipes.names())
def test_a_model_without_router_bias_is_counted_without_one(name):
    model = recipes.by_name(name).model
    biases = weight_bytes(model, precision="bfloat16") * 2 - weight_bytes(model, precision="float32")
    layers = model.num_moe_layers + model.num_nextn_predict_layers
    assert biases == (4 * layers * model.n_routed_experts if model.has_router_bias else 0)


def test_an_unknown_precision_is_refused():
    with pytest.raises(ConfigError, match="choose one of float32, bfloat16, fp8"):
        weight_bytes(V3.model, precision="int4")
    with pytest.raises(ConfigError, match="choose 'float32' or 'bfloat16'"):
        training_memory(V3, dtype="fp8")
