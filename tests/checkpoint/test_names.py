import pytest
import torch

from dsv3.checkpoint.names import published_layout, published_shapes
from dsv3.config import ModelConfig
from dsv3.model.transformer import Transformer

TINY = {
    "vocab_size": 40,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "q_lora_rank": 10,
    "kv_lora_rank": 6,
    "qk_nope_head_dim": 5,
    "qk_rope_head_dim": 4,
    "v_head_dim": 7,
    "intermediate_size": 30,
    "moe_intermediate_size": 9,
    "first_k_dense_replace": 1,
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "n_shared_experts": 2,
    "num_nextn_predict_layers": 2,
}
V3 = published_shapes(ModelConfig(), quantized=True)

# Fact sheet 1.2 and 1.7: layer 5 is an MoE layer, layer 0 a dense one, layer 61 the MTP module.
RELEASED = {
    "model.embed_tokens.weight": (129280, 7168),
    "lm_head.weight": (129280, 7168),
    "model.norm.weight": (7168,),
    "model.layers.5.input_layernorm.weight": (7168,),
    "model.layers.5.post_attention_layernorm.weight": (7168,),
    "model.layers.5.self_attn.q_a_proj.weight": (1536, 7168),
    "model.layers.5.self_attn.q_a_proj.weight_scale_inv": (12, 56),
    "model.layers.5.self_attn.q_a_layernorm.weight": (1536,),
    "model.layers.5.self_attn.q_b_proj.weight": (24576, 1536),
    "model.layers.5.self_attn.q_b_proj.weight_scale_inv": (192, 12),
    "model.layers.5.self_attn.kv_a_proj_with_mqa.weight": (576, 7168),
    "model.layers.5.self_attn.kv_a_proj_with_mqa.weight_scale_inv": (5, 56),
    "model.layers.5.self_attn.kv_a_layernorm.weight": (512,),
    "model.layers.5.self_attn.kv_b_proj.weight": (32768, 512),
    "model.layers.5.self_attn.kv_b_proj.weight_scale_inv": (256, 4),
    "model.layers.5.self_attn.o_proj.weight": (7168, 16384),
    "model.layers.5.self_attn.o_proj.weight_scale_inv": (56, 128),
    "model.layers.0.mlp.gate_proj.weight": (18432, 7168),
    "model.layers.0.mlp.up_proj.weight_scale_inv": (144, 56),
    "model.layers.2.mlp.down_proj.weight": (7168, 18432),
    "model.layers.2.mlp.down_proj.weight_scale_inv": (56, 144),
    "model.layers.3.mlp.gate.weight": (256, 7168),
    "model.layers.60.mlp.gate.e_score_correction_bias": (256,),
    "model.layers.3.mlp.experts.0.gate_proj.weight": (2048, 7168),
    "model.layers.60.mlp.experts.255.up_proj.weight_scale_inv": (16, 56),
    "model.layers.60.mlp.experts.255.down_proj.weight": (7168, 2048),
    "model.layers.60.mlp.experts.255.down_proj.weight_scale_inv": (56, 16),
    "model.layers.5.mlp.shared_experts.gate_proj.weight": (2048, 7168),
    "model.layers.61.enorm.weight": (7168,),
    "model.layers.61.hnorm.weight": (7168,),
    "model.layers.61.eh_proj.weight": (7168, 14336),
    "model.layers.61.embed_tokens.weight": (129280, 7168),
    "model.layers.61.shared_head.norm.weight": (7168,),
    "model.layers.61.shared_head.head.weight": (129280, 7168),
    "model.layers.61.mlp.experts.17.up_proj.weight": (2048, 7168),
    "model.layers.61.mlp.gate.e_score_correction_bias": (256,),
}
NOT_IN_FP8 = ("embed_tokens", "lm_head", "norm", "mlp.gate.", "eh_proj", "shared_head.head")


def test_the_released_checkpoint_has_91991_tensors_of_which_1564_are_the_mtp_module():
    mtp = [name for name in V3 if name.startswith("model.layers.61.")]
    assert len(V3) == 91_991
    assert len(mtp) == 1_564
    assert len(V3) - len(mtp) == 90_427


def test_names_and_shapes_are_those_of_the_released_files():
    assert {name: V3.get(name) for name in RELEASED} == RELEASED


def test_every_matrix_has_multipliers_but_the_ones_published_in_bf16():
    plain = [name for name in V3 if not name.endswith("_scale_inv") and f"{name}_scale_inv" not in V3]
    assert all(any(part in name for part in NOT_IN_FP8) for name in plain)
    scaled = [name for name in V3 if name.endswith("_scale_inv")]
    assert not any(part in name for name in scaled for part in NOT_IN_FP8 if part != "norm")
    assert not any("norm" in name for name in scaled)


def test_no_multipliers_are_listed_for_a_plain_checkpoint():
    assert not any(name.endswith("_scale_inv") for name in published_shapes(ModelConfig()))


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"q_lora_rank": None},
        {"n_shared_experts": 0},
        {"num_nextn_predict_layers": 0},
        {"first_k_dense_replace": 0},
        {"first_k_dense_replace": 3},
        {"topk_method": "greedy", "scoring_func": "softmax"},
    ],
)
def test_the_layout_covers_every_number_of_our_state_dict_exactly_once(change):
    config = ModelConfig(**TINY | change)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in Transformer(config).state_dict().items()}
    visits = {name: torch.zeros(shape, dtype=torch.int) for name, shape in shapes.items()}
    for tensor in published_layout(config):
        if not tensor.is_copy:
            part = tensor.part_of(visits[tensor.source])
            assert tuple(part.shape) == tensor.shape, tensor.name
            part += 1
    assert [name for name, count in visits.items() if not (count == 1).all()] == []


def test_the_whole_released_model_is_covered_in_number_of_parameters():
    config = ModelConfig()
    counted = [tensor for tensor in published_layout(config) if not tensor.is_copy]
    main = sum(torch.Size(t.shape).numel() for t in counted if not t.source.startswith("mtp."))
    mtp = sum(torch.Size(t.shape).numel() for t in counted if t.source.startswith("mtp."))
    # Fact sheet 1.5, router biases included.
    assert (main, mtp) == (671_026_419_200, 11_610_068_224)


def test_gate_rows_come_before_up_rows_in_the_stacked_experts():
    config = ModelConfig(**TINY)
    by_name = {tensor.name: tensor for tensor in published_layout(config)}
    stacked = torch.arange(6 * 18 * 24).view(6, 18, 24)
    gate = by_name["model.layers.1.mlp.experts.4.gate_proj.weight"].part_of(stacked)
    up = by_name["model.layers.1.mlp.experts.4.up_proj.weight"].part_of(stacked)
    assert torch.equal(gate, stacked[4, :9])
    assert torch.equal(up, stacked[4, 9:])


def test_mtp_modules_follow_the_last_layer_one_by_one():
    by_name = {tensor.name: tensor.source for tensor in published_layout(ModelConfig(**TINY))}
    assert by_name["model.layers.3.eh_proj.weight"] == "mtp.0.eh_proj.weight"
    assert by_name["model.layers.4.shared_head.norm.weight"] == "mtp.1.norm.weight"
    assert by_name["model.layers.4.input_layernorm.weight"] == "mtp.1.block.input_layernorm.weight"
