"""A model for the engine's C++: every published tensor put where the pass reads it, one at a time."""

import ctypes
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dsv3.checkpoint.names import PublishedTensor
from dsv3.checkpoint.published import exchange_halves
from dsv3.config import ModelConfig
from dsv3.errors import ConfigError
from dsv3.fp8.quantise import Quantised, dequantise
from dsv3.infer.packed_weights import PackedMatrix, Storage, formats_named
from dsv3.native import engine
from dsv3.ops.rope import softmax_scale

GROUP_SCORES = {"greedy": 0, "group_limited_greedy": 1, "noaux_tc": 2}
"""How a group of experts is scored: not at all, by its best expert, by the sum of its two best."""


@dataclass(frozen=True, kw_only=True)
class PackedLayer:
    """One layer's matrices by their names in `native/engine: Layer`, and its vectors."""

    is_moe: bool
    matrices: dict[str, PackedMatrix]
    vectors: dict[str, Tensor] = field(default_factory=dict)

    def record(self) -> engine.Layer:
        """Return the addresses of everything."""
        assert all(matrix.is_filled for matrix in self.matrices.values()), "a layer lacks some of its weights"
        records = {name: matrix.record for name, matrix in self.matrices.items()}
        addresses = {name: vector.data_ptr() for name, vector in self.vectors.items()}
        return engine.Layer(is_moe=int(self.is_moe), **records, **addresses)


@dataclass(frozen=True, kw_only=True)
class PackedMtp:
    """What an MTP module has besides its layer."""

    vectors: dict[str, Tensor] = field(default_factory=dict)
    eh_proj: PackedMatrix


class PackedModel:
    """All weights of a model, laid out; layers of MTP modules come after those of the main model."""

    def __init__(self, config: ModelConfig, *, name: str, num_mtp_modules: int) -> None:
        self.config = config
        self.format_name = name
        """How the weights are kept."""
        formats = formats_named(name)
        self.num_mtp_modules = num_mtp_modules
        self._formats = formats
        moe = [config.is_moe_layer(layer) for layer in range(config.num_hidden_layers)] + [True] * num_mtp_modules
        self.layers = [self._new_layer(is_moe=is_moe) for is_moe in moe]
        hidden = config.hidden_size
        self.mtp = [
            PackedMtp(eh_proj=PackedMatrix(formats.head, part_columns=(hidden,), depth=2 * hidden))
            for _ in range(num_mtp_modules)
        ]
        self.head = PackedMatrix(formats.head, part_columns=(config.vocab_size,), depth=hidden)
        self.embedding = torch.empty(0)
        self.norm = torch.empty(0)

    def fill(self, tensor: PublishedTensor, value: Tensor | Quantised) -> None:
        """Put one tensor of the published layout, with the published order of eh_proj's halves, into its place."""
        if tensor.source == "embed_tokens.weight":
            assert isinstance(value, Tensor)
            self.embedding = value.clone() if value.dtype == torch.bfloat16 else value.float()
        elif tensor.source == "lm_head.weight":
            self.head.fill(value, name=tensor.name)
        elif tensor.source == "norm.weight":
            self.norm = _vector(value)
        elif tensor.source.startswith("layers."):
            _, index, rest = tensor.source.split(".", 2)
            self._fill_layer(self.layers[int(index)], rest, tensor=tensor, value=value)
        else:
            _, depth, rest = tensor.source.split(".", 2)
            if int(depth) >= self.num_mtp_modules:
                return
            if rest.startswith("block."):
                layer = self.layers[self.config.num_hidden_layers + int(depth)]
                self._fill_layer(layer, rest.removeprefix("block."), tensor=tensor, value=value)
            elif rest == "eh_proj.weight":
                self.mtp[int(depth)].eh_proj.fill(value, name=tensor.name)
            else:
                self.mtp[int(depth)].vectors[rest.removesuffix(".weight")] = _vector(value)

    def record(self) -> tuple[engine.Model, object]:
        """Return the model's record, and what must be kept alive as long as it is used."""
        config = self.config
        layers = (engine.Layer * len(self.layers))(*(layer.record() for layer in self.layers))
        model = engine.Model(
            hidden=config.hidden_size,
            heads=config.num_attention_heads,
            query_latent=config.q_lora_rank or 0,
            latent=config.kv_lora_rank,
            nope=config.qk_nope_head_dim,
            rope=config.qk_rope_head_dim,
            value=config.v_head_dim,
            experts=config.n_routed_experts,
            chosen=config.num_experts_per_tok,
            expert_groups=config.n_group,
            groups_kept=config.topk_group,
            expert_width=config.moe_intermediate_size,
            shared_width=config.n_shared_experts * config.moe_intermediate_size,
            dense_width=config.intermediate_size,
            group_score=GROUP_SCORES[config.topk_method],
            softmax_scores=int(config.scoring_func == "softmax"),
            normalise_gates=int(config.norm_topk_prob),
            gate_scale=config.routed_scaling_factor,
            epsilon=config.rms_norm_eps,
            softmax_scale=softmax_scale(config),
            layers=ctypes.cast(layers, ctypes.c_void_p),
        )
        return model, layers

    @property
    def num_bytes(self) -> int:
        """Memory of all weights."""
        matrices = [matrix for layer in self.layers for matrix in layer.matrices.values()]
        matrices += [self.head, *(module.eh_proj for module in self.mtp)]
        return sum(matrix.num_bytes for matrix in matrices) + self.embedding.nbytes

    def _new_layer(self, *, is_moe: bool) -> PackedLayer:
        config, layers, up = self.config, self._formats.layers, self._formats.up_projections
        hidden, heads, latent = config.hidden_size, config.num_attention_heads, config.kv_lora_rank
        queries, keys = heads * config.qk_head_dim, latent + config.qk_rope_head_dim
        matrices = {
            "down": PackedMatrix(layers, part_columns=(config.q_lora_rank or queries, keys), depth=hidden),
            "key_up": PackedMatrix(up, part_columns=(latent,), depth=config.qk_nope_head_dim, groups=heads),
            "value_up": PackedMatrix(up, part_columns=(config.v_head_dim,), depth=latent, groups=heads),
            "output": PackedMatrix(layers, part_columns=(hidden,), depth=heads * config.v_head_dim),
        }
        if config.q_lora_rank is not None:
            matrices["query"] = PackedMatrix(layers, part_columns=(queries,), depth=config.q_lora_rank)
        width = config.intermediate_size
        if is_moe:
            experts, width = config.n_routed_experts, config.moe_intermediate_size
            matrices["router"] = PackedMatrix(Storage.FP32, part_columns=(experts,), depth=hidden)
            matrices["gate_up"] = PackedMatrix(layers, part_columns=(width, width), depth=hidden, groups=experts)
            matrices["experts_down"] = PackedMatrix(layers, part_columns=(hidden,), depth=width, groups=experts)
            width *= config.n_shared_experts
        if width:
            matrices["shared_gate_up"] = PackedMatrix(layers, part_columns=(width, width), depth=hidden)
            matrices["shared_down"] = PackedMatrix(layers, part_columns=(hidden,), depth=width)
        return PackedLayer(is_moe=is_moe, matrices=matrices)

    def _fill_layer(self, layer: PackedLayer, name: str, *, tensor: PublishedTensor, value: Tensor | Quantised) -> None:
        if name == "self_attn.kv_b_proj.weight":
            self._fill_up_projections(layer, value=value, name=tensor.name)
        elif name in VECTORS:
            layer.vectors[VECTORS[name]] = _vector(value)
        elif name == "mlp.experts.gate_up_proj":
            assert tensor.expert is not None
            part = int(tensor.rows[0] > 0)
            layer.matrices["gate_up"].fill(value, name=tensor.name, part=part, group=tensor.expert)
        elif name == "mlp.experts.down_proj":
            assert tensor.expert is not None
            layer.matrices["experts_down"].fill(value, name=tensor.name, group=tensor.expert)
        else:
            matrix, part = MATRICES[name.replace("shared_experts.", "")]
            layer.matrices[matrix].fill(value, name=tensor.name, part=part)

    def _fill_up_projections(self, layer: PackedLayer, *, value: Tensor | Quantised, name: str) -> None:
        """Cut W^UK and W^UV of every head apart; the first is read from the other side (absorbed attention)."""
        wide = (dequantise(value) if isinstance(value, Quantised) else value).float()
        for head, both in enumerate(wide.unflatten(0, (self.config.num_attention_heads, -1))):
            key_up, value_up = both.split([self.config.qk_nope_head_dim, self.config.v_head_dim])
            layer.matrices["key_up"].fill(key_up.T, name=name, group=head)
            layer.matrices["value_up"].fill(value_up, name=name, group=head)


VECTORS = {
    "input_layernorm.weight": "input_norm",
    "self_attn.q_a_layernorm.weight": "query_norm",
    "self_attn.kv_a_layernorm.weight": "latent_norm",
    "post_attention_layernorm.weight": "post_norm",
    "mlp.gate.e_score_correction_bias": "router_bias",
}
MATRICES = {
    "self_attn.q_proj.weight": ("down", 0),
    "self_attn.q_a_proj.weight": ("down", 0),
    "self_attn.kv_a_proj_with_mqa.weight": ("down", 1),
    "self_attn.q_b_proj.weight": ("query", 0),
    "self_attn.o_proj.weight": ("output", 0),
    "mlp.gate.weight": ("router", 0),
    "mlp.gate_proj.weight": ("shared_gate_up", 0),
    "mlp.up_proj.weight": ("shared_gate_up", 1),
    "mlp.down_proj.weight": ("shared_down", 0),
}
"""Our names within a layer, and the matrix and part that each is."""


def pack_model(
    config: ModelConfig,
    *,
    layout: Iterable[PublishedTensor],
    read: Callable[[PublishedTensor], Tensor | Quantised],
    name: str,
) -> PackedModel:
    """Return, in the format `name`, the model whose tensors `read` returns one by one.

    eh_proj comes with its halves in the published order.
    """
    packed = PackedModel(config, name=name, num_mtp_modules=config.num_nextn_predict_layers)
    for tensor in layout:
        if not tensor.is_copy:
            packed.fill(tensor, read(tensor))
    return packed


def pack_from_state(
    state: dict[str, Tensor], *, config: ModelConfig, layout: Iterable[PublishedTensor], name: str
) -> PackedModel:
    """Return the packed form of a model at hand; its weights must not be in FP8."""

    def read(tensor: PublishedTensor) -> Tensor:
        part = tensor.part_of(state[tensor.source].detach())
        return exchange_halves(part) if tensor.swapped_halves else part

    if any(value.dtype == torch.float8_e4m3fn for value in state.values()):
        raise ConfigError("the model at hand is in FP8; pack it from its folder instead")
    return pack_model(config, layout=layout, read=read, name=name)


def _vector(value: Tensor | Quantised) -> Tensor:
    assert isinstance(value, Tensor)
    return value.detach().float().contiguous().clone()
