"""The `config.json` that lies beside published weights, to `ModelConfig` and back.

Most fields keep their name. What has to be decided here: fields of which we implement one value (refused by name when
they hold another), fields that other programs drop on saving (assumed, and said), and the two layouts of the rotary
settings: `rope_scaling` beside `rope_theta` as released, `rope_parameters` as transformers 5 writes it.
"""

import math
from dataclasses import dataclass, fields
from typing import Any

from dsv3.config.files import from_dict
from dsv3.config.model import ModelConfig, YarnConfig
from dsv3.errors import ConfigError

ARCHITECTURES = {"deepseek_v3": "DeepseekV3ForCausalLM", "deepseek_v2": "DeepseekV2ForCausalLM"}

ONLY_VALUE: dict[str, Any] = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "tie_word_embeddings": False,
    "moe_layer_freq": 1,
    "rope_interleave": True,
    "mtp_hidden_states_first": False,
}
"""Fields of which one value is implemented; any other changes the function, so it is refused."""

OTHER_NAMES = {
    "num_mtp_layers": "num_nextn_predict_layers",
    "num_local_experts": "n_routed_experts",
    "num_experts": "n_routed_experts",
}
"""What transformers 5 may call a field, and the published name."""

ASSUMED: dict[str, dict[str, Any]] = {
    "deepseek_v3": {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1},
    "deepseek_v2": {"scoring_func": "softmax", "topk_method": "greedy", "moe_layer_freq": 1},
}
"""Fields that transformers knows no place for and may drop on saving, with the value of the model type."""

WITHOUT_EFFECT = {
    "_name_or_path",
    "architectures",
    "auto_map",
    "aux_loss_alpha",
    "chunk_size_feed_forward",
    "dtype",
    "ep_size",
    "id2label",
    "is_encoder_decoder",
    "label2id",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "pad_token_id",
    "pretraining_tp",
    "problem_type",
    "return_dict",
    "router_aux_loss_coef",
    "seq_aux",
    "torch_dtype",
    "transformers_version",
    "unsloth_version",
    "use_cache",
}
"""Fields about training, files or other programs; they do not change what the weights compute."""

OPTIONAL = {"num_nextn_predict_layers": 0, "q_lora_rank": None, "n_group": 1, "topk_group": 1, "n_shared_experts": 0}
"""Fields that may be absent, or null, and what that means. V2 has no MTP; a model without groups has one group."""


@dataclass(frozen=True, kw_only=True)
class Fp8Blocks:
    """How the weights of a quantised checkpoint are stored: E4M3 with one FP32 multiplier for each block."""

    block: tuple[int, int] = (128, 128)
    """Rows and columns that share a multiplier."""


def model_config_from_published(values: dict[str, Any]) -> tuple[ModelConfig, list[str]]:
    """Return the model that a published `config.json` describes, and what had to be assumed to read it.

    The notes are for the user and should be logged: a checkpoint saved by transformers lacks the very fields that
    tell V3's routing from V2's.

    Raises:
        ConfigError: a needed field is missing or has the wrong type, or a field asks for what is not implemented.
    """
    model_type = values.get("model_type")
    if model_type not in ARCHITECTURES:
        raise ConfigError(f"config.json has model_type = {model_type!r}; {' and '.join(ARCHITECTURES)} can be read")
    values = {OTHER_NAMES.get(name, name): value for name, value in values.items()}
    notes: list[str] = []
    for name, value in ASSUMED[model_type].items():
        if values.get(name) is None:
            if name == "topk_method" and model_type == "deepseek_v2" and (values.get("n_group") or 1) > 1:
                value = "group_limited_greedy"
            values[name] = value
            notes.append(f"config.json has no {name}; assumed {value!r}, the value of {model_type} models")
    for name, only in ONLY_VALUE.items():
        if values.get(name, only) != only and values[name] is not None:
            raise ConfigError(f"config.json has {name} = {values[name]!r}; only {only!r} is implemented")
    _check_heads(values)
    quantisation_from_published(values)
    settings = _same_settings(values) | _rope_settings(values)
    notes += _unknown(values)
    return from_dict(ModelConfig, settings), notes


def published_from_model_config(config: ModelConfig, *, dtype: str, quantized: bool = False) -> dict[str, Any]:
    """Return the fields of a published `config.json`: all those that any program reading V3 is known to need.

    `scoring_func`, `topk_method` and `moe_layer_freq` are among them: without the first llama.cpp takes softmax
    gating, without the last vLLM fails. `dtype` is the type most tensors are stored in, as 'bfloat16'.

    The published format knows one order of the two halves of eh_proj, embedding first; weights are written in that
    order whatever `mtp_concat_order` says, so the field does not appear.
    """
    model_type = "deepseek_v3" if config.topk_method == "noaux_tc" else "deepseek_v2"
    same = {field.name: getattr(config, field.name) for field in fields(config)}
    del same["mtp_concat_order"], same["mtp_hidden_source"]
    values: dict[str, Any] = {
        **same,
        "architectures": [ARCHITECTURES[model_type]],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "ep_size": 1,
        "hidden_act": "silu",
        "model_type": model_type,
        "moe_layer_freq": 1,
        "num_key_value_heads": config.num_attention_heads,
        "pretraining_tp": 1,
        "rope_scaling": None if config.rope_scaling is None else _published_yarn(config.rope_scaling),
        "tie_word_embeddings": False,
        "torch_dtype": dtype,
        "use_cache": True,
    }
    if config.mtp_hidden_source != "post_norm":
        # Not a published field. Others read over it; we need it back.
        values["mtp_hidden_source"] = config.mtp_hidden_source
    if quantized:
        values["quantization_config"] = {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "weight_block_size": list(Fp8Blocks().block),
        }
    return dict(sorted(values.items()))


def quantisation_from_published(values: dict[str, Any]) -> Fp8Blocks | None:
    """Return how the weights are quantised, or None when they are not.

    Raises:
        ConfigError: a method other than the published FP8 blocks.
    """
    quantisation = values.get("quantization_config")
    if quantisation is None:
        return None
    method, form = quantisation.get("quant_method"), quantisation.get("fmt", "e4m3")
    if method != "fp8":
        raise ConfigError(
            f"config.json has quantization_config.quant_method = {method!r}; only 'fp8' can be read. "
            "Convert the checkpoint to BF16 with the program that quantised it"
        )
    if form != "e4m3":
        raise ConfigError(f"config.json has quantization_config.fmt = {form!r}; only 'e4m3' can be read")
    block = quantisation.get("weight_block_size")
    if not (isinstance(block, list) and len(block) == 2 and all(isinstance(side, int) and side > 0 for side in block)):
        raise ConfigError(
            f"config.json has quantization_config.weight_block_size = {block!r}; only weights scaled in blocks "
            "can be read, as [128, 128]"
        )
    return Fp8Blocks(block=(block[0], block[1]))


def notes_for_peers(config: ModelConfig) -> list[str]:
    """Return what other programs would compute differently from this model's published files, and why.

    The published format has no field for these, or the field is known to be read over. Empty for the settings of
    released models.
    """
    notes = []
    released = {("sigmoid", "noaux_tc"), ("softmax", "group_limited_greedy"), ("softmax", "greedy")}
    if (config.scoring_func, config.topk_method) not in released:
        notes.append(
            f"no released model joins scoring_func '{config.scoring_func}' with topk_method '{config.topk_method}'; "
            "transformers takes sigmoid for deepseek_v3 and softmax for deepseek_v2, whatever the file says"
        )
    if config.topk_method != "noaux_tc" and config.norm_topk_prob:
        notes.append("transformers reads over norm_topk_prob = true in deepseek_v2 models")
    if config.topk_method != "noaux_tc" and config.num_nextn_predict_layers:
        notes.append("other programs know no MTP modules in deepseek_v2 models, and may refuse their tensors")
    if config.rms_norm_eps != 1e-6:
        notes.append(
            f"the published code takes 1e-6 in the norms of the latents, not rms_norm_eps = {config.rms_norm_eps}"
        )
    if config.n_shared_experts == 0:
        notes.append("the published code expects at least one shared expert; this model has none")
    if config.mtp_hidden_source != "post_norm" and config.num_nextn_predict_layers:
        notes.append(
            f"the MTP modules read the hidden state '{config.mtp_hidden_source}'; serving engines feed them the "
            "state after the norm, and their drafts will be accepted less often"
        )
    return notes


def _same_settings(values: dict[str, Any]) -> dict[str, Any]:
    """Return the fields that have the same name and meaning on both sides."""
    # Written by us alone, and only where it differs from the default; the rotary settings have their own function.
    may_be_absent = {"mtp_hidden_source", "initializer_range"}
    names = [field.name for field in fields(ModelConfig)]
    names = [name for name in names if name not in ("rope_scaling", "rope_theta", "mtp_concat_order")]
    settings = {name: values[name] for name in names if values.get(name) is not None}
    settings = OPTIONAL | settings
    if missing := [name for name in names if name not in settings and name not in may_be_absent]:
        raise ConfigError(f"config.json lacks {', '.join(missing)}")
    for name in ("bos_token_id", "eos_token_id"):
        if isinstance(settings[name], list) and settings[name]:  # some files list several; the first is the model's own
            settings[name] = settings[name][0]
    return settings


def _rope_settings(values: dict[str, Any]) -> dict[str, Any]:
    """Return rope_theta and the YaRN settings, from the released layout or from that of transformers 5."""
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise ConfigError(f"config.json has rotary settings {rope!r}; they must be a group of settings, or null")
    theta = rope.get("rope_theta", values.get("rope_theta"))
    if theta is None:
        raise ConfigError("config.json lacks rope_theta")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return {"rope_theta": theta, "rope_scaling": None}
    if kind != "yarn":
        raise ConfigError(f"config.json asks for rotary scaling of type {kind!r}; 'yarn' and none are implemented")
    return {"rope_theta": theta, "rope_scaling": _yarn_settings(rope)}


def _yarn_settings(rope: dict[str, Any]) -> dict[str, Any]:
    names = {field.name for field in fields(YarnConfig)}
    known = names | {"rope_type", "type", "rope_theta", "attention_factor", "truncate", "partial_rotary_factor"}
    if unknown := sorted(rope.keys() - known):
        raise ConfigError(f"config.json has rotary settings that are not implemented: {', '.join(unknown)}")
    for name, only in (("truncate", True), ("partial_rotary_factor", 1.0)):
        if rope.get(name) not in (None, only):
            raise ConfigError(
                f"config.json has {name} = {rope[name]!r} in its rotary settings; only {only} is implemented"
            )
    if missing := [name for name in ("factor", "original_max_position_embeddings") if rope.get(name) is None]:
        raise ConfigError(f"config.json asks for YaRN, but its rotary settings lack {', '.join(missing)}")
    # The published code's own defaults, of which the last differs from what released files hold.
    settings: dict[str, Any] = {"beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 0.0}
    settings |= {name: rope[name] for name in names if rope.get(name) is not None}
    amplitude = yarn_amplitude(from_dict(YarnConfig, settings, path="rope_scaling"))
    factor = rope.get("attention_factor")
    if factor is not None and not (isinstance(factor, float) and math.isclose(factor, amplitude, rel_tol=1e-6)):
        raise ConfigError(
            f"config.json has attention_factor = {factor}; its mscale and mscale_all_dim give {amplitude}, and only "
            "that is implemented"
        )
    return settings


def _published_yarn(yarn: YarnConfig) -> dict[str, Any]:
    values: dict[str, Any] = {field.name: getattr(yarn, field.name) for field in fields(yarn)}
    # 'type' is the released name, 'rope_type' what newer programs look for first.
    values |= {"type": "yarn", "rope_type": "yarn"}
    if not (yarn.mscale and yarn.mscale_all_dim):
        # transformers takes a zero for an absent setting, and then another formula; it obeys an explicit factor.
        values["attention_factor"] = yarn_amplitude(yarn)
    return values


def yarn_amplitude(yarn: YarnConfig) -> float:
    """Return what the published code multiplies cos and sin by: 1 whenever both mscales are equal."""

    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(yarn.factor) + 1.0

    return mscale(yarn.mscale) / mscale(yarn.mscale_all_dim)


def _check_heads(values: dict[str, Any]) -> None:
    """Refuse head counts and widths that contradict latent attention: they are stated twice in some files."""
    heads = values.get("num_attention_heads")
    shared = values.get("num_key_value_heads")
    if shared is not None and shared != heads:
        raise ConfigError(
            f"config.json has num_key_value_heads = {shared} beside num_attention_heads = {heads}; latent attention "
            "has as many of one as of the other"
        )
    rope, nope = values.get("qk_rope_head_dim"), values.get("qk_nope_head_dim")
    for name, expected in (("head_dim", rope), ("qk_head_dim", (rope or 0) + (nope or 0))):
        # Serving programs differ on what head_dim means here: the rotary part, a whole head, or the value head.
        allowed = {expected, (rope or 0) + (nope or 0), values.get("v_head_dim")}
        if values.get(name) is not None and values[name] not in allowed:
            raise ConfigError(f"config.json has {name} = {values[name]}, which is no width of its heads")


def _unknown(values: dict[str, Any]) -> list[str]:
    known = {field.name for field in fields(ModelConfig)} | set(ONLY_VALUE) | WITHOUT_EFFECT
    known |= {"model_type", "num_key_value_heads", "head_dim", "qk_head_dim", "rope_parameters", "quantization_config"}
    unknown = sorted(values.keys() - known)
    if (values.get("quantization_config") or {}).get("scale_fmt") not in (None, "float"):
        # Of V3.1: activations are to be scaled by powers of two. Weights are read right without it.
        unknown.append("quantization_config.scale_fmt")
    return [f"config.json has {name}, which is not known here and was not used" for name in unknown]
