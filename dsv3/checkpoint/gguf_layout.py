"""Which GGUF tensor holds which published ones, and which models the file format's readers can compute.

    GGUF, architecture deepseek2              published
    token_embd.weight                         model.embed_tokens.weight
    blk.3.attn_norm, ffn_norm                 model.layers.3.input_layernorm, post_attention_layernorm
    blk.3.attn_q_a, attn_q_a_norm, attn_q_b   .self_attn.q_a_proj, q_a_layernorm, q_b_proj (attn_q: q_proj)
    blk.3.attn_kv_a_mqa, attn_kv_a_norm       .self_attn.kv_a_proj_with_mqa, kv_a_layernorm
    blk.3.attn_k_b                            the key rows of .self_attn.kv_b_proj, each head's matrix transposed
    blk.3.attn_v_b                            the value rows of .self_attn.kv_b_proj
    blk.3.attn_output                         .self_attn.o_proj
    blk.3.ffn_gate, ffn_up, ffn_down          .mlp.gate_proj, up_proj, down_proj of a dense layer
    blk.3.ffn_gate_inp, exp_probs_b.bias      .mlp.gate.weight, .e_score_correction_bias
    blk.3.ffn_gate_exps, ffn_up_exps, ...     .mlp.experts.<e>.gate_proj, ... of all experts, stacked
    blk.3.ffn_gate_shexp, ...                 .mlp.shared_experts.gate_proj, ...
    output_norm.weight, output.weight         model.norm.weight, lm_head.weight

Rotary pairs stay next to each other, as published. The MTP modules have no place: readers have no graph for V3's.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from dsv3.checkpoint.names import PublishedTensor, published_layout
from dsv3.config import ModelConfig
from dsv3.errors import ConfigError

LAYERS_READ_AS_LITE = (26, 27)
"""Depths at which llama.cpp takes a deepseek2 model for V2-Lite and looks for no query latent."""

OF_ATTENTION = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.q_a_proj": "attn_q_a",
    "self_attn.q_a_layernorm": "attn_q_a_norm",
    "self_attn.q_b_proj": "attn_q_b",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
}
OF_NETWORKS = {"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}


@dataclass(frozen=True, kw_only=True, slots=True)
class GgufTensor:
    """One tensor of a GGUF file, made of one published tensor or of the same matrix of all experts."""

    name: str
    shape: tuple[int, ...]
    """As torch and numpy count: the axis whose values lie side by side comes last. The file has it the other way."""
    parts: tuple[PublishedTensor, ...]
    key_rows: tuple[int, int] | None = None
    """Key and value rows of a head, in this order, where this is the key half of kv_b_proj."""
    value_rows: tuple[int, int] | None = None
    """The same, where this is the value half."""

    @property
    def stays_float32(self) -> bool:
        """Whether it is written in FP32 whatever the file's type: norms, and what routes."""
        return len(self.shape) == 1 or self.name.endswith("ffn_gate_inp.weight")

    def of_part(self, value: Tensor) -> Tensor:
        """Return what the file holds of a published tensor; for experts this is called once for each."""
        if self.key_rows is not None:
            return value.unflatten(0, (-1, sum(self.key_rows)))[:, : self.key_rows[0]].transpose(1, 2)
        if self.value_rows is not None:
            return value.unflatten(0, (-1, sum(self.value_rows)))[:, self.value_rows[0] :]
        return value


def gguf_layout(config: ModelConfig) -> tuple[GgufTensor, ...]:
    """Return every tensor of the file, in its order. Together they are all of the published ones but MTP's."""
    published = {tensor.name: tensor for tensor in published_layout(config)}
    tensors = [_one(published["model.embed_tokens.weight"], name="token_embd.weight")]
    for layer in range(config.num_hidden_layers):
        tensors += _block(config, published=published, layer=layer)
    tensors.append(_one(published["model.norm.weight"], name="output_norm.weight"))
    tensors.append(_one(published["lm_head.weight"], name="output.weight"))
    return tuple(tensors)


def require_expressible(config: ModelConfig) -> None:
    """Refuse a model that GGUF's readers would compute otherwise than we do, or could not load.

    Read off llama.cpp's deepseek2 graph and loader.

    Raises:
        ConfigError: names the setting.
    """
    if config.topk_method == "group_limited_greedy" and uses_groups(config):
        raise ConfigError(
            "topk_method = 'group_limited_greedy' scores a group by its best expert, and GGUF's readers always by its "
            "two best: they would choose other experts; only models of 'noaux_tc' or 'greedy' can be written"
        )
    if config.n_shared_experts == 0:
        raise ConfigError("n_shared_experts = 0, but GGUF's deepseek2 models have at least one shared expert")
    if config.num_hidden_layers in LAYERS_READ_AS_LITE and config.q_lora_rank is not None:
        raise ConfigError(
            f"a deepseek2 model of {config.num_hidden_layers} layers is taken for V2-Lite by GGUF's readers, which has "
            f"no q_lora_rank; this one has {config.q_lora_rank} and would not load"
        )
    yarn = config.rope_scaling
    if yarn is not None and yarn.factor > 1 and not (yarn.mscale == yarn.mscale_all_dim != 0):
        raise ConfigError(
            f"rope_scaling has mscale = {yarn.mscale} and mscale_all_dim = {yarn.mscale_all_dim}; GGUF's readers "
            "compute YaRN for two equal values above zero, as the released models have them"
        )


def uses_groups(config: ModelConfig) -> bool:
    """Whether routing leaves groups of experts out; readers refuse a file that names groups and leaves none out."""
    return config.topk_method != "greedy" and config.topk_group < config.n_group


def _block(config: ModelConfig, *, published: dict[str, PublishedTensor], layer: int) -> Iterator[GgufTensor]:
    theirs, ours = f"model.layers.{layer}.", f"blk.{layer}."
    for name, short in OF_ATTENTION.items():
        if (tensor := published.get(f"{theirs}{name}.weight")) is not None:
            yield _one(tensor, name=f"{ours}{short}.weight")
    yield from _halves_of_kv_b(config, tensor=published[f"{theirs}self_attn.kv_b_proj.weight"], prefix=ours)
    if not config.is_moe_layer(layer):
        for name, short in OF_NETWORKS.items():
            yield _one(published[f"{theirs}mlp.{name}.weight"], name=f"{ours}{short}.weight")
        return
    yield _one(published[f"{theirs}mlp.gate.weight"], name=f"{ours}ffn_gate_inp.weight")
    if config.has_router_bias:
        yield _one(published[f"{theirs}mlp.gate.e_score_correction_bias"], name=f"{ours}exp_probs_b.bias")
    for name, short in OF_NETWORKS.items():
        parts = tuple(
            published[f"{theirs}mlp.experts.{expert}.{name}.weight"] for expert in range(config.n_routed_experts)
        )
        yield GgufTensor(name=f"{ours}{short}_exps.weight", shape=(len(parts), *parts[0].shape), parts=parts)
        yield _one(published[f"{theirs}mlp.shared_experts.{name}.weight"], name=f"{ours}{short}_shexp.weight")


def _halves_of_kv_b(config: ModelConfig, *, tensor: PublishedTensor, prefix: str) -> Iterator[GgufTensor]:
    heads, latent = config.num_attention_heads, config.kv_lora_rank
    rows = (config.qk_nope_head_dim, config.v_head_dim)
    yield GgufTensor(name=f"{prefix}attn_k_b.weight", shape=(heads, latent, rows[0]), parts=(tensor,), key_rows=rows)
    yield GgufTensor(name=f"{prefix}attn_v_b.weight", shape=(heads, rows[1], latent), parts=(tensor,), value_rows=rows)


def _one(tensor: PublishedTensor, *, name: str) -> GgufTensor:
    return GgufTensor(name=name, shape=tensor.shape, parts=(tensor,))
