"""Every tensor of the published weight format, from the settings alone: its name, shape and number type.

What `checkpoint/` writes can be checked against this list, and the size of a checkpoint is their sum.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from dsv3.config import ModelConfig

BLOCK = 128
"""Rows and columns that share one scale in the published FP8 weights."""

_BYTES = {"FP8": 1, "BF16": 2, "FP32": 4}


@dataclass(frozen=True, kw_only=True)
class PublishedTensor:
    """One tensor of a checkpoint in the published format."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    """'FP8' (E4M3), 'BF16' or 'FP32'."""

    @property
    def num_bytes(self) -> int:
        """Bytes of its values; file headers are not in it."""
        return prod(self.shape) * _BYTES[self.dtype]


def published_tensors(config: ModelConfig, *, fp8: bool) -> Iterator[PublishedTensor]:
    """Yield every tensor of a published checkpoint: the globals, the layers, then each MTP module with its copies.

    With `fp8`, the linear layers of attention, MLP and experts are E4M3, each with a `weight_scale_inv` of one FP32
    for a block of 128 x 128 (a ragged last block has one too). Embedding, head, norms, routers and `eh_proj` stay
    BF16, router biases are FP32.

    Source: README_WEIGHTS.md of the V3 repository and the shapes of the released files.
    """
    yield from _outside_the_layers(config)
    for layer in range(config.num_hidden_layers):
        yield from _block(config, layer=layer, fp8=fp8)
    for module in range(config.num_nextn_predict_layers):
        layer = config.num_hidden_layers + module
        yield from _around_mtp_block(config, layer=layer)
        yield from _block(config, layer=layer, fp8=fp8)


@dataclass(frozen=True, kw_only=True)
class CheckpointSize:
    """How large a checkpoint in the published format is."""

    tensors: int
    num_bytes: int
    """Of the tensors alone; the headers of the files come on top."""


def checkpoint_size(config: ModelConfig, *, fp8: bool) -> CheckpointSize:
    """Return number and bytes of the tensors: 91,991 and 688,574,839,360 for V3 in FP8, MTP module included."""
    modules = config.num_nextn_predict_layers
    pieces = [
        (1, list(_outside_the_layers(config))),
        *_layers_of_each_kind(config, fp8=fp8),
        (modules, list(_around_mtp_block(config, layer=config.num_hidden_layers))),
    ]
    return CheckpointSize(
        tensors=sum(count * len(tensors) for count, tensors in pieces),
        num_bytes=sum(count * sum(tensor.num_bytes for tensor in tensors) for count, tensors in pieces),
    )


@dataclass(frozen=True, kw_only=True)
class QuantisedSize:
    """What of a model is stored in FP8."""

    values: int
    scales: int
    """One for each 128 x 128 block, those that the edge of a matrix cuts off included."""
    matrices: int


def quantised_size(config: ModelConfig) -> QuantisedSize:
    """Return how many weights of layers and MTP modules are in FP8, in how many blocks and matrices."""
    quantised = [
        (count, tensor)
        for count, tensors in _layers_of_each_kind(config, fp8=True)
        for tensor in tensors
        if tensor.dtype == "FP8"
    ]
    return QuantisedSize(
        values=sum(count * prod(tensor.shape) for count, tensor in quantised),
        scales=sum(count * prod(-(-side // BLOCK) for side in tensor.shape) for count, tensor in quantised),
        matrices=sum(count for count, _ in quantised),
    )


def _layers_of_each_kind(config: ModelConfig, *, fp8: bool) -> list[tuple[int, list[PublishedTensor]]]:
    """Return the tensors of one dense and one MoE layer, each with the number of such layers, MTP modules included.

    One layer of each kind stands for all: listing the 92 thousand tensors would take a noticeable moment.
    """
    moe_layers = config.num_moe_layers + config.num_nextn_predict_layers
    return [
        (config.num_hidden_layers - config.num_moe_layers, list(_block(config, layer=0, fp8=fp8))),
        (moe_layers, list(_block(config, layer=config.num_hidden_layers, fp8=fp8))),
    ]


def _outside_the_layers(config: ModelConfig) -> Iterator[PublishedTensor]:
    yield _bf16("model.embed_tokens.weight", config.vocab_size, config.hidden_size)
    yield _bf16("model.norm.weight", config.hidden_size)
    yield _bf16("lm_head.weight", config.vocab_size, config.hidden_size)


def _around_mtp_block(config: ModelConfig, *, layer: int) -> Iterator[PublishedTensor]:
    """What an MTP module has beside its block: its norms and projection, and copies of embedding and head."""
    hidden, prefix = config.hidden_size, f"model.layers.{layer}"
    yield _bf16(f"{prefix}.embed_tokens.weight", config.vocab_size, hidden)
    yield _bf16(f"{prefix}.enorm.weight", hidden)
    yield _bf16(f"{prefix}.hnorm.weight", hidden)
    yield _bf16(f"{prefix}.eh_proj.weight", hidden, 2 * hidden)
    yield _bf16(f"{prefix}.shared_head.norm.weight", hidden)
    yield _bf16(f"{prefix}.shared_head.head.weight", config.vocab_size, hidden)


def _block(config: ModelConfig, *, layer: int, fp8: bool) -> Iterator[PublishedTensor]:
    prefix = f"model.layers.{layer}"
    yield _bf16(f"{prefix}.input_layernorm.weight", config.hidden_size)
    yield from _attention(config, prefix=f"{prefix}.self_attn", fp8=fp8)
    yield _bf16(f"{prefix}.post_attention_layernorm.weight", config.hidden_size)
    if not config.is_moe_layer(layer):
        yield from _mlp(config, prefix=f"{prefix}.mlp", width=config.intermediate_size, fp8=fp8)
        return
    yield _bf16(f"{prefix}.mlp.gate.weight", config.n_routed_experts, config.hidden_size)
    if config.has_router_bias:
        shape = (config.n_routed_experts,)
        yield PublishedTensor(name=f"{prefix}.mlp.gate.e_score_correction_bias", shape=shape, dtype="FP32")
    for expert in range(config.n_routed_experts):
        expert_prefix = f"{prefix}.mlp.experts.{expert}"
        yield from _mlp(config, prefix=expert_prefix, width=config.moe_intermediate_size, fp8=fp8)
    if config.n_shared_experts:
        width = config.n_shared_experts * config.moe_intermediate_size
        yield from _mlp(config, prefix=f"{prefix}.mlp.shared_experts", width=width, fp8=fp8)


def _attention(config: ModelConfig, *, prefix: str, fp8: bool) -> Iterator[PublishedTensor]:
    hidden, heads = config.hidden_size, config.num_attention_heads
    query_rows = heads * config.qk_head_dim
    if config.q_lora_rank is None:
        yield from _linear(f"{prefix}.q_proj", query_rows, hidden, fp8=fp8)
    else:
        yield from _linear(f"{prefix}.q_a_proj", config.q_lora_rank, hidden, fp8=fp8)
        yield _bf16(f"{prefix}.q_a_layernorm.weight", config.q_lora_rank)
        yield from _linear(f"{prefix}.q_b_proj", query_rows, config.q_lora_rank, fp8=fp8)
    latent_rows = config.kv_lora_rank + config.qk_rope_head_dim
    key_value_rows = heads * (config.qk_nope_head_dim + config.v_head_dim)
    yield from _linear(f"{prefix}.kv_a_proj_with_mqa", latent_rows, hidden, fp8=fp8)
    yield _bf16(f"{prefix}.kv_a_layernorm.weight", config.kv_lora_rank)
    yield from _linear(f"{prefix}.kv_b_proj", key_value_rows, config.kv_lora_rank, fp8=fp8)
    yield from _linear(f"{prefix}.o_proj", hidden, heads * config.v_head_dim, fp8=fp8)


def _mlp(config: ModelConfig, *, prefix: str, width: int, fp8: bool) -> Iterator[PublishedTensor]:
    yield from _linear(f"{prefix}.gate_proj", width, config.hidden_size, fp8=fp8)
    yield from _linear(f"{prefix}.up_proj", width, config.hidden_size, fp8=fp8)
    yield from _linear(f"{prefix}.down_proj", config.hidden_size, width, fp8=fp8)


def _linear(name: str, rows: int, columns: int, *, fp8: bool) -> Iterator[PublishedTensor]:
    if not fp8:
        yield _bf16(f"{name}.weight", rows, columns)
        return
    yield PublishedTensor(name=f"{name}.weight", shape=(rows, columns), dtype="FP8")
    blocks = (-(-rows // BLOCK), -(-columns // BLOCK))
    yield PublishedTensor(name=f"{name}.weight_scale_inv", shape=blocks, dtype="FP32")


def _bf16(name: str, *shape: int) -> PublishedTensor:
    return PublishedTensor(name=name, shape=shape, dtype="BF16")
