from dataclasses import replace

import pytest

from dsv3 import recipes
from dsv3.errors import ConfigError
from dsv3.plan.memory import training_memory, weight_bytes

V3 = recipes.v3_671b()
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
