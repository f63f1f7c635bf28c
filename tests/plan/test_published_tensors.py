from dataclasses import replace

import pytest

from dsv3 import recipes
from dsv3.plan.counts import count_parameters
from dsv3.plan.published_tensors import checkpoint_size, published_tensors

V3 = recipes.v3_671b().model


@pytest.fixture(scope="module")
def fp8_tensors():
    return {tensor.name: tensor for tensor in published_tensors(V3, fp8=True)}


def test_the_fp8_checkpoint_of_v3_has_the_published_size():
    size = checkpoint_size(V3, fp8=True)
    assert size.tensors == 91_991
    assert size.num_bytes == 688_574_839_360


def test_the_size_is_that_of_the_list_and_no_tensor_is_listed_twice(fp8_tensors):
    assert len(fp8_tensors) == 91_991
    assert sum(tensor.num_bytes for tensor in fp8_tensors.values()) == 688_574_839_360


@pytest.mark.parametrize("changes", [{}, {"first_k_dense_replace": 0}, {"n_shared_experts": 0}, {"q_lora_rank": None}])
@pytest.mark.parametrize("modules", [0, 1, 2])
def test_the_size_is_that_of_the_list_for_other_shapes(changes, modules):
    model = replace(recipes.tiny().model, num_nextn_predict_layers=modules, **changes)
    tensors = list(published_tensors(model, fp8=True))
    size = checkpoint_size(model, fp8=True)
    assert size.tensors == len({tensor.name for tensor in tensors}) == len(tensors)
    assert size.num_bytes == sum(tensor.num_bytes for tensor in tensors)


def test_main_model_and_mtp_module_have_their_share_of_the_tensors(fp8_tensors):
    in_mtp = sum(name.startswith("model.layers.61.") for name in fp8_tensors)
    assert in_mtp == 1558 + 6
    assert len(fp8_tensors) - in_mtp == 3 + 3 * 20 + 58 * 1558


@pytest.mark.parametrize(
    ("name", "shape", "dtype"),
    [
        ("model.layers.0.self_attn.q_a_proj.weight", (1536, 7168), "FP8"),
        ("model.layers.0.self_attn.q_a_proj.weight_scale_inv", (12, 56), "FP32"),
        ("model.layers.60.self_attn.q_b_proj.weight_scale_inv", (192, 12), "FP32"),
        ("model.layers.0.self_attn.kv_a_proj_with_mqa.weight", (576, 7168), "FP8"),
        ("model.layers.0.self_attn.kv_a_proj_with_mqa.weight_scale_inv", (5, 56), "FP32"),
        ("model.layers.0.self_attn.kv_b_proj.weight_scale_inv", (256, 4), "FP32"),
        ("model.layers.0.self_attn.o_proj.weight_scale_inv", (56, 128), "FP32"),
        ("model.layers.2.mlp.down_proj.weight_scale_inv", (56, 144), "FP32"),
        ("model.layers.3.mlp.experts.255.down_proj.weight_scale_inv", (56, 16), "FP32"),
        ("model.layers.3.mlp.gate.weight", (256, 7168), "BF16"),
        ("model.layers.3.mlp.gate.e_score_correction_bias", (256,), "FP32"),
        ("model.layers.61.eh_proj.weight", (7168, 14336), "BF16"),
        ("model.layers.61.shared_head.head.weight", (129280, 7168), "BF16"),
        ("lm_head.weight", (129280, 7168), "BF16"),
    ],
)
def test_tensors_have_the_published_shape_and_type(fp8_tensors, name, shape, dtype):
    assert (fp8_tensors[name].shape, fp8_tensors[name].dtype) == (shape, dtype)


@pytest.mark.parametrize("name", ["tiny", "small", "v3_16b"])
def test_without_fp8_the_values_are_the_parameters_with_the_copies_of_mtp(name):
    model = recipes.by_name(name).model
    counts = count_parameters(model)
    values = sum(
        tensor.num_bytes // {"BF16": 2, "FP32": 4}[tensor.dtype] for tensor in published_tensors(model, fp8=False)
    )
    assert values == counts.total_with_mtp_copies
