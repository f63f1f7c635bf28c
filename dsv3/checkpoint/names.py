"""Which published tensor is which part of ours.

    ours                                      published
    embed_tokens.weight                       model.embed_tokens.weight
    layers.3.<name>                           model.layers.3.<name>
    layers.3.mlp.experts.gate_up_proj[e]      model.layers.3.mlp.experts.<e>.gate_proj.weight   (upper half of the rows)
                                              model.layers.3.mlp.experts.<e>.up_proj.weight     (lower half)
    layers.3.mlp.experts.down_proj[e]         model.layers.3.mlp.experts.<e>.down_proj.weight
    norm.weight, lm_head.weight               model.norm.weight, lm_head.weight
    mtp.0.block.<name>                        model.layers.61.<name>, 61 being `num_hidden_layers`
    mtp.0.enorm, hnorm, eh_proj               model.layers.61.enorm, hnorm, eh_proj
    mtp.0.norm.weight                         model.layers.61.shared_head.norm.weight
    (embed_tokens.weight, lm_head.weight)     model.layers.61.embed_tokens.weight, .shared_head.head.weight: copies

In FP8 every matrix of a layer but the router's and eh_proj is stored in E4M3, with a second tensor beside it,
`.weight_scale_inv`: in FP32, one number for each block of 128 x 128, and despite its name the one to multiply by.
Source: the published README_WEIGHTS and the names in the released files.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from dsv3.config import ModelConfig
from dsv3.config.published import Fp8Blocks
from dsv3.fp8.quantise import tiles_of

BLOCK = Fp8Blocks().block
"""Rows and columns that share a multiplier in what is published."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PublishedTensor:
    """One tensor of a published file, and the part of our state dict that it is."""

    name: str
    shape: tuple[int, ...]
    source: str
    """Our name of the tensor that holds it."""
    expert: int | None = None
    """Which of the stacked experts it is."""
    rows: tuple[int, int] = (0, 0)
    """First row, and one past the last, within that expert's matrix."""
    swapped_halves: bool = False
    """The left and right half of the columns are exchanged in ours."""
    in_fp8: bool = False
    """Stored in E4M3 blocks where the checkpoint is quantised."""
    stays_float32: bool = False
    is_copy: bool = False
    """The published file repeats a tensor of the main model here; on loading it is compared and dropped."""

    def part_of(self, tensor: Tensor) -> Tensor:
        """Return the view of our tensor that this published one fills; `swapped_halves` is the caller's to mend."""
        return tensor if self.expert is None else tensor[self.expert, slice(*self.rows)]

    def part_of_scales(self, scales: Tensor) -> Tensor:
        """Return the view that this one's multipliers fill of those of our tensor, which has them expert by expert.

        Where several matrices lie one above the other in an expert's, each has blocks of its own.
        """
        if self.expert is None:
            return scales
        its_own = scales[self.expert]
        return its_own if its_own.dim() == 2 else its_own[self.rows[0] // self.shape[0]]


def published_layout(config: ModelConfig) -> tuple[PublishedTensor, ...]:
    """Return every tensor of the published files, main model first, then the MTP modules.

    Together they cover our state dict exactly once; the copies come on top.
    """
    vocab = (config.vocab_size, config.hidden_size)
    tensors = [PublishedTensor(name="model.embed_tokens.weight", shape=vocab, source="embed_tokens.weight")]
    for layer in range(config.num_hidden_layers):
        moe = config.is_moe_layer(layer)
        tensors += _block(config, ours=f"layers.{layer}.", published=f"model.layers.{layer}.", moe=moe)
    tensors.append(PublishedTensor(name="model.norm.weight", shape=(config.hidden_size,), source="norm.weight"))
    tensors.append(PublishedTensor(name="lm_head.weight", shape=vocab, source="lm_head.weight"))
    for depth in range(config.num_nextn_predict_layers):
        tensors += _mtp_module(config, depth=depth)
    return tuple(tensors)


def published_shapes(config: ModelConfig, *, quantized: bool = False) -> dict[str, tuple[int, ...]]:
    """Return name and shape of every tensor in the files; with `quantized`, those of the FP8 multipliers too."""
    shapes = {}
    for tensor in published_layout(config):
        shapes[tensor.name] = tensor.shape
        if quantized and tensor.in_fp8:
            shapes[scale_name(tensor.name)] = scale_shape(tensor.shape)
    return shapes


def scale_name(name: str) -> str:
    """Return the name of the multipliers that belong to an FP8 weight."""
    return f"{name}_scale_inv"


def scale_shape(shape: tuple[int, ...], *, block: tuple[int, int] = BLOCK) -> tuple[int, int]:
    """Return the shape of the multipliers of an FP8 weight. The last block of a side may be cut off, never padded."""
    rows, columns = shape
    return tiles_of(rows, columns, tile=block)


def _mtp_module(config: ModelConfig, *, depth: int) -> Iterator[PublishedTensor]:
    hidden, ours = config.hidden_size, f"mtp.{depth}."
    published = f"model.layers.{config.num_hidden_layers + depth}."
    vocab = (config.vocab_size, hidden)
    embedding, head = f"{published}embed_tokens.weight", f"{published}shared_head.head.weight"
    yield PublishedTensor(name=embedding, shape=vocab, source="embed_tokens.weight", is_copy=True)
    yield PublishedTensor(name=f"{published}enorm.weight", shape=(hidden,), source=f"{ours}enorm.weight")
    yield PublishedTensor(name=f"{published}hnorm.weight", shape=(hidden,), source=f"{ours}hnorm.weight")
    yield PublishedTensor(
        name=f"{published}eh_proj.weight",
        shape=(hidden, 2 * hidden),
        source=f"{ours}eh_proj.weight",
        # The files hold [embedding; hidden]. A model trained in the order of eq. 21 has its columns exchanged.
        swapped_halves=config.mtp_concat_order == "hidden_first",
    )
    yield from _block(config, ours=f"{ours}block.", published=published, moe=True)
    yield PublishedTensor(name=f"{published}shared_head.norm.weight", shape=(hidden,), source=f"{ours}norm.weight")
    yield PublishedTensor(name=head, shape=vocab, source="lm_head.weight", is_copy=True)


def _block(config: ModelConfig, *, ours: str, published: str, moe: bool) -> Iterator[PublishedTensor]:
    """Yield the tensors of one layer, whose names differ only in the prefix and in the stacking of experts."""
    for name, shape in _attention_shapes(config).items():
        yield PublishedTensor(name=published + name, shape=shape, source=ours + name, in_fp8=len(shape) == 2)
    if not moe:
        for name, shape in _feed_forward_shapes(config.hidden_size, width=config.intermediate_size).items():
            yield PublishedTensor(name=f"{published}mlp.{name}", shape=shape, source=f"{ours}mlp.{name}", in_fp8=True)
        return
    router = (config.n_routed_experts, config.hidden_size)
    yield PublishedTensor(name=f"{published}mlp.gate.weight", shape=router, source=f"{ours}mlp.gate.weight")
    if config.has_router_bias:
        bias = "mlp.gate.e_score_correction_bias"
        yield PublishedTensor(name=published + bias, shape=router[:1], source=ours + bias, stays_float32=True)
    yield from _experts(config, ours=f"{ours}mlp.experts.", published=f"{published}mlp.experts.")
    if config.n_shared_experts:
        shared = "mlp.shared_experts."
        width = config.n_shared_experts * config.moe_intermediate_size
        for name, shape in _feed_forward_shapes(config.hidden_size, width=width).items():
            yield PublishedTensor(name=published + shared + name, shape=shape, source=ours + shared + name, in_fp8=True)


def _experts(config: ModelConfig, *, ours: str, published: str) -> Iterator[PublishedTensor]:
    width = config.moe_intermediate_size
    parts = {
        "gate_proj.weight": ("gate_up_proj", (0, width)),
        "up_proj.weight": ("gate_up_proj", (width, 2 * width)),
        "down_proj.weight": ("down_proj", (0, config.hidden_size)),
    }
    shapes = _feed_forward_shapes(config.hidden_size, width=width)
    for expert in range(config.n_routed_experts):
        for name, (stacked, rows) in parts.items():
            yield PublishedTensor(
                name=f"{published}{expert}.{name}",
                shape=shapes[name],
                source=ours + stacked,
                expert=expert,
                rows=rows,
                in_fp8=True,
            )


def _feed_forward_shapes(hidden: int, *, width: int) -> dict[str, tuple[int, int]]:
    return {"gate_proj.weight": (width, hidden), "up_proj.weight": (width, hidden), "down_proj.weight": (hidden, width)}


def _attention_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    hidden, heads, latent = config.hidden_size, config.num_attention_heads, config.kv_lora_rank
    queries = heads * config.qk_head_dim
    shapes: dict[str, tuple[int, ...]] = {"input_layernorm.weight": (hidden,)}
    if config.q_lora_rank is None:
        shapes["self_attn.q_proj.weight"] = (queries, hidden)
    else:
        shapes["self_attn.q_a_proj.weight"] = (config.q_lora_rank, hidden)
        shapes["self_attn.q_a_layernorm.weight"] = (config.q_lora_rank,)
        shapes["self_attn.q_b_proj.weight"] = (queries, config.q_lora_rank)
    shapes["self_attn.kv_a_proj_with_mqa.weight"] = (latent + config.qk_rope_head_dim, hidden)
    shapes["self_attn.kv_a_layernorm.weight"] = (latent,)
    shapes["self_attn.kv_b_proj.weight"] = (heads * (config.qk_nope_head_dim + config.v_head_dim), latent)
    shapes["self_attn.o_proj.weight"] = (hidden, heads * config.v_head_dim)
    shapes["post_attention_layernorm.weight"] = (hidden,)
    return shapes
