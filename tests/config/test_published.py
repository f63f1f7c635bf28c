import json
from dataclasses import replace

import pytest

from dsv3.config import ModelConfig, YarnConfig
from dsv3.config.published import (
    Fp8Blocks,
    model_config_from_published,
    notes_for_peers,
    published_from_model_config,
    quantisation_from_published,
    yarn_amplitude,
)
from dsv3.errors import ConfigError

# What lies beside the released 671B weights, without the fields that name code files.
RELEASED_V3 = json.loads("""{
  "architectures": ["DeepseekV3ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
  "bos_token_id": 0, "eos_token_id": 1, "ep_size": 1, "first_k_dense_replace": 3, "hidden_act": "silu",
  "hidden_size": 7168, "initializer_range": 0.02, "intermediate_size": 18432, "kv_lora_rank": 512,
  "max_position_embeddings": 163840, "model_type": "deepseek_v3", "moe_intermediate_size": 2048,
  "moe_layer_freq": 1, "n_group": 8, "n_routed_experts": 256, "n_shared_experts": 1, "norm_topk_prob": true,
  "num_attention_heads": 128, "num_experts_per_tok": 8, "num_hidden_layers": 61, "num_key_value_heads": 128,
  "num_nextn_predict_layers": 1, "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
  "quantization_config": {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
                          "weight_block_size": [128, 128]},
  "rms_norm_eps": 1e-06,
  "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
                   "original_max_position_embeddings": 4096, "type": "yarn"},
  "rope_theta": 10000, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "tie_word_embeddings": false,
  "topk_group": 4, "topk_method": "noaux_tc", "torch_dtype": "bfloat16", "transformers_version": "4.33.1",
  "use_cache": true, "v_head_dim": 128, "vocab_size": 129280
}""")
RELEASED_MODEL = ModelConfig(rope_scaling=YarnConfig(), initializer_range=0.02)


def changed(**fields):
    return RELEASED_V3 | fields


def without(*names):
    return {name: value for name, value in RELEASED_V3.items() if name not in names}


def test_the_released_config_is_the_default_model_with_yarn():
    config, notes = model_config_from_published(RELEASED_V3)
    assert config == RELEASED_MODEL
    assert notes == []


def test_writing_the_released_model_gives_every_field_of_the_released_file():
    written = published_from_model_config(RELEASED_MODEL, dtype="bfloat16", quantized=True)
    same = without("transformers_version", "rope_scaling")
    assert {name: written[name] for name in same} == same
    assert written["rope_scaling"].items() >= RELEASED_V3["rope_scaling"].items()


@pytest.mark.parametrize(
    "config",
    [
        ModelConfig(),
        RELEASED_MODEL,
        ModelConfig(q_lora_rank=None, n_shared_experts=0, num_nextn_predict_layers=0),
        ModelConfig(mtp_hidden_source="pre_norm"),
        ModelConfig(rope_scaling=YarnConfig(mscale=0.707, mscale_all_dim=0.0, factor=7.5)),
        ModelConfig(scoring_func="softmax", topk_method="greedy", norm_topk_prob=False, n_group=1, topk_group=1),
        ModelConfig(scoring_func="softmax", topk_method="group_limited_greedy", routed_scaling_factor=16.0),
        ModelConfig(bos_token_id=5, eos_token_id=7, rms_norm_eps=1e-5, rope_theta=50_000.0),
    ],
)
@pytest.mark.parametrize("quantized", [False, True])
def test_a_written_config_reads_back_as_the_same_model_without_a_note(config, quantized):
    written = json.loads(json.dumps(published_from_model_config(config, dtype="bfloat16", quantized=quantized)))
    assert model_config_from_published(written) == (config, [])
    assert quantisation_from_published(written) == (Fp8Blocks() if quantized else None)


def test_hidden_first_is_written_as_the_published_order():
    config = ModelConfig(mtp_concat_order="hidden_first")
    back, _ = model_config_from_published(published_from_model_config(config, dtype="float32"))
    assert back == replace(config, mtp_concat_order="embedding_first")


def test_the_three_fields_that_transformers_drops_are_written():
    written = published_from_model_config(ModelConfig(), dtype="bfloat16")
    assert (written["scoring_func"], written["topk_method"], written["moe_layer_freq"]) == ("sigmoid", "noaux_tc", 1)


@pytest.mark.parametrize(
    ("method", "model_type", "architecture"),
    [
        ("noaux_tc", "deepseek_v3", "DeepseekV3ForCausalLM"),
        ("greedy", "deepseek_v2", "DeepseekV2ForCausalLM"),
        ("group_limited_greedy", "deepseek_v2", "DeepseekV2ForCausalLM"),
    ],
)
def test_the_routing_method_decides_the_model_type(method, model_type, architecture):
    written = published_from_model_config(ModelConfig(topk_method=method), dtype="bfloat16")
    assert (written["model_type"], written["architectures"]) == (model_type, [architecture])


def test_missing_routing_fields_are_taken_as_those_of_v3_and_each_is_said():
    config, notes = model_config_from_published(without("scoring_func", "topk_method", "moe_layer_freq"))
    assert config == RELEASED_MODEL
    assert len(notes) == 3
    assert [name for name in ("scoring_func", "topk_method", "moe_layer_freq") if any(name in n for n in notes)] == [
        "scoring_func",
        "topk_method",
        "moe_layer_freq",
    ]
    assert "'sigmoid'" in notes[0]


@pytest.mark.parametrize(("groups", "method"), [(1, "greedy"), (8, "group_limited_greedy"), (None, "greedy")])
def test_missing_routing_fields_of_a_v2_model_are_those_of_v2(groups, method):
    values = changed(model_type="deepseek_v2", n_group=groups, topk_group=groups and 1)
    del values["scoring_func"], values["topk_method"]
    config, notes = model_config_from_published(values)
    assert (config.scoring_func, config.topk_method) == ("softmax", method)
    assert len(notes) == 2


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_act", "gelu"),
        ("attention_bias", True),
        ("mlp_bias", True),
        ("attention_dropout", 0.1),
        ("tie_word_embeddings", True),
        ("moe_layer_freq", 2),
        ("rope_interleave", False),
        ("num_key_value_heads", 8),
        ("head_dim", 80),
        ("model_type", "llama"),
        ("model_type", None),
        ("scoring_func", "tanh"),
        ("topk_method", "hash"),
        ("hidden_size", "7168"),
        ("hidden_size", None),
        ("rope_theta", None),
        ("rope_scaling", "yarn"),
    ],
)
def test_a_value_that_is_not_implemented_is_refused_by_the_name_of_its_field(field, value):
    named = "rotary" if field == "rope_scaling" else field
    with pytest.raises(ConfigError, match=named):
        model_config_from_published(changed(**{field: value}))


@pytest.mark.parametrize(
    ("rope", "named"),
    [
        ({"type": "linear", "factor": 2.0}, "linear"),
        ({"rope_type": "dynamic", "factor": 2.0}, "dynamic"),
        ({"type": "yarn", "original_max_position_embeddings": 64}, "factor"),
        ({"type": "yarn", "factor": 4.0}, "original_max_position_embeddings"),
        ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "truncate": False}, "truncate"),
        ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "attention_factor": 2.0}, "attention"),
        (
            {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "short_factor": [1.0]},
            "short_factor",
        ),
        ({"type": "yarn", "factor": "4", "original_max_position_embeddings": 64}, "rope_scaling.factor"),
    ],
)
def test_rotary_settings_that_are_not_implemented_are_refused_by_name(rope, named):
    with pytest.raises(ConfigError, match=named):
        model_config_from_published(changed(rope_scaling=rope))


def test_the_rotary_layout_of_transformers_5_is_read():
    rope = RELEASED_V3["rope_scaling"] | {"rope_type": "yarn", "rope_theta": 10000.0}
    config, notes = model_config_from_published(without("rope_scaling", "rope_theta") | {"rope_parameters": rope})
    assert (config, notes) == (RELEASED_MODEL, [])


def test_transformers_5_says_default_for_no_scaling():
    values = without("rope_scaling", "rope_theta") | {"rope_parameters": {"rope_theta": 5e4, "rope_type": "default"}}
    config, _ = model_config_from_published(values)
    assert (config.rope_scaling, config.rope_theta) == (None, 5e4)


def test_mscales_left_out_of_the_file_are_those_of_the_published_code():
    rope = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096}
    config, _ = model_config_from_published(changed(rope_scaling=rope))
    assert config.rope_scaling == YarnConfig(mscale=1.0, mscale_all_dim=0.0)
    assert yarn_amplitude(config.rope_scaling) == pytest.approx(1.3688879454)  # 0.1 ln 40 + 1


def test_names_that_transformers_5_uses_for_the_same_thing_are_read():
    values = without("num_nextn_predict_layers", "n_routed_experts") | {"num_mtp_layers": 1, "num_local_experts": 256}
    assert model_config_from_published(values) == (RELEASED_MODEL, [])


def test_unknown_fields_are_said_and_harmless_ones_are_not():
    _, notes = model_config_from_published(changed(auto_map={}, aux_loss_alpha=0.001, wings=2))
    assert len(notes) == 1
    assert "wings" in notes[0]


def test_every_missing_field_is_named_at_once():
    with pytest.raises(ConfigError, match=r"hidden_size.*vocab_size|vocab_size.*hidden_size"):
        model_config_from_published(without("hidden_size", "vocab_size"))


def test_several_end_tokens_are_read_as_the_first():
    config, _ = model_config_from_published(changed(eos_token_id=[1, 128806]))
    assert config.eos_token_id == 1


def test_quantisation_is_read_with_its_block():
    assert quantisation_from_published(RELEASED_V3) == Fp8Blocks(block=(128, 128))
    assert quantisation_from_published(without("quantization_config")) is None


def test_how_v31_wants_its_activations_scaled_is_said_to_be_passed_over():
    fp8 = RELEASED_V3["quantization_config"]
    notes = [
        model_config_from_published(changed(quantization_config=fp8 | more))[1] for more in ({}, {"scale_fmt": "ue8m0"})
    ]
    assert notes[0] == []
    assert ["quantization_config.scale_fmt" in note for note in notes[1]] == [True]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"quant_method": "gptq"}, "gptq"),
        ({"quant_method": None}, "quant_method"),
        ({"fmt": "e5m2"}, "e5m2"),
        ({"weight_block_size": None}, "weight_block_size"),
        ({"weight_block_size": [128]}, "weight_block_size"),
    ],
)
def test_other_quantisation_is_refused_by_name(change, named):
    values = changed(quantization_config=RELEASED_V3["quantization_config"] | change)
    with pytest.raises(ConfigError, match=named):
        model_config_from_published(values)


def test_released_models_need_no_note_for_other_programs():
    v2 = {"scoring_func": "softmax", "norm_topk_prob": False, "num_nextn_predict_layers": 0}
    assert notes_for_peers(RELEASED_MODEL) == []
    assert notes_for_peers(ModelConfig(topk_method="group_limited_greedy", **v2)) == []
    assert notes_for_peers(ModelConfig(topk_method="greedy", **v2)) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"scoring_func": "softmax"}, "scoring_func"),
        ({"topk_method": "greedy", "scoring_func": "softmax", "num_nextn_predict_layers": 0}, "norm_topk_prob"),
        ({"topk_method": "greedy", "scoring_func": "softmax", "norm_topk_prob": False}, "MTP"),
        ({"rms_norm_eps": 1e-5}, "rms_norm_eps"),
        ({"n_shared_experts": 0}, "shared expert"),
        ({"mtp_hidden_source": "pre_norm"}, "pre_norm"),
    ],
)
def test_what_other_programs_would_compute_differently_is_said(change, said):
    notes = notes_for_peers(ModelConfig(**change))
    assert len(notes) == 1
    assert said in notes[0]
