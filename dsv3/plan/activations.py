"""Bytes that a forward pass of training leaves for its backward pass, by formula.

They are those of the CPU path with our kernels (dsv3/native), which is the one that was measured: FP32, and FP8 where
the recipe of precision has it. The plain forms keep more. In BF16 whatever is computed in BF16 has half the bytes;
that was not measured. Not in it: what a pass needs for a moment, such as a chunk of logits.
"""

from dataclasses import dataclass, replace

from dsv3.config import ModelConfig, PretrainConfig, RecomputeConfig

FLOAT = 4
INDEX = 8
"""Bytes of an FP32 number and of an index."""
TILE = 128
"""Numbers in FP8 or E5M6 that share an FP32 scale."""


@dataclass(frozen=True, kw_only=True)
class _Sizes:
    """Bytes of a number, by what it is."""

    computed: int
    """In the type that is computed with."""
    exact: int = FLOAT
    """In FP32 whatever that is."""
    index: int = INDEX


_SIZES = {"float32": _Sizes(computed=FLOAT), "bfloat16": _Sizes(computed=2)}
_NOTHING = _Sizes(computed=0, exact=0, index=0)
"""Leaves what is kept in FP8 and E5M6, with its scales."""


@dataclass(frozen=True, kw_only=True)
class ActivationMemory:
    """What is kept from the forward to the backward pass of one micro-batch."""

    attention: int
    """Bytes a token, all layers and MTP modules; so are the next five."""
    dense_mlp: int
    routed_experts: int
    shared_experts: int
    routers: int
    """Scores, choices, and the order in which copies of tokens lie."""
    around: int
    """Residual stream and norms between the parts, MTP joints, and the gradient of the output head's input."""
    per_pass: int
    """Bytes of a micro-batch of `config.batch` for the gradient of the output head: `kept_of_head`."""

    @property
    def per_token(self) -> int:
        """Bytes for one token of the micro-batch."""
        return self.attention + self.dense_mlp + self.routed_experts + self.shared_experts + self.routers + self.around


def activation_memory(config: PretrainConfig, *, dtype: str = "float32") -> ActivationMemory:
    """Return what one forward pass with all losses keeps under `config.recompute` and `config.precision`.

    `dtype` is what the model computes with: 'float32' or 'bfloat16'.

    Source: what each function of dsv3/ops and dsv3/fp8 saves; report 3.2.3 for what need not be, 3.3.3 for what is
    kept in fewer bits.
    """
    tokens = config.batch.micro_batch_sequences * config.batch.sequence_length // config.parallel.context
    head = kept_of_head(config.model, tokens=tokens, dtype=dtype)
    return replace(_activation_memory(config, sizes=_SIZES[dtype]), per_pass=head)


def fp8_cache(config: PretrainConfig) -> ActivationMemory:
    """Return what of `activation_memory` is in FP8 or E5M6, with its scales; nothing under the recipe 'original'."""
    return _activation_memory(config, sizes=_NOTHING)


def kept_of_head(model: ModelConfig, *, tokens: int, dtype: str) -> int:
    """Return the bytes that wait to become the output head's gradient, once for it and once for each MTP module.

    Whichever is smaller: that gradient in FP32, or a slope for each logit (ops/cross_entropy.py).
    """
    row = min(_SIZES[dtype].computed * tokens, FLOAT * model.hidden_size)
    return (1 + model.num_nextn_predict_layers) * model.vocab_size * row


def _activation_memory(config: PretrainConfig, *, sizes: _Sizes) -> ActivationMemory:
    model, recompute = config.model, config.recompute
    kept = _Kept(recipe=config.precision.recipe, sizes=sizes)
    modules = model.num_nextn_predict_layers
    layers, experts = model.num_hidden_layers + modules, model.num_moe_layers + modules
    width, chosen = model.moe_intermediate_size, model.num_experts_per_tok
    shared = model.n_shared_experts * width
    dense = 2 * sizes.computed * model.intermediate_size
    dense += 0 if recompute.swiglu else kept.input(model.intermediate_size)
    # A copy of a token that is here is gathered again, one that came from another rank is kept; so is its gate.
    came = kept.input(model.hidden_size) if config.parallel.expert > 1 else 0
    copy = came + kept.swiglu_input(2 * width) + kept.swiglu_output(width, recompute=recompute) + sizes.exact
    return ActivationMemory(
        attention=layers * _attention(model, recompute=recompute, kept=kept),
        dense_mlp=(model.num_hidden_layers - model.num_moe_layers) * dense,
        routed_experts=experts * chosen * copy,
        shared_experts=experts * (2 * kept.swiglu_input(shared) + kept.swiglu_output(shared, recompute=recompute)),
        routers=experts * _router(model, sizes=sizes),
        around=_around(model, recompute=recompute, kept=kept) + sizes.index * (3 + 4 * modules),
        per_pass=0,
    )


def kept_of_tokens(config: PretrainConfig, *, tokens: int, dtype: str = "float32") -> int:
    """Return the bytes that a pass over rows of so many tokens keeps on each rank that shares them.

    Such a rank has its part of the tokens, and for attention the latents of all of them, those that both of its pieces
    look at twice.
    """
    model, context = config.model, config.parallel.context
    kept = activation_memory(config, dtype=dtype)
    latents = 0
    if context > 1:
        numbers = model.kv_lora_rank + model.qk_rope_head_dim
        if not config.recompute.up_projections:
            numbers += model.num_attention_heads * (model.qk_nope_head_dim + model.v_head_dim)
        layers = model.num_hidden_layers + model.num_nextn_predict_layers
        latents = _SIZES[dtype].computed * layers * numbers * (tokens - tokens // (2 * context))
    own = -(-tokens // context)
    return kept.per_token * own + latents + kept_of_head(model, tokens=own, dtype=dtype)


def kept_at_end(config: PretrainConfig, *, dtype: str) -> int:
    """Return bytes a token that a stage which is not the last has not: the last norm's output, and its gradient.

    The norm's input is the stage's own output, which stays until it is sent.
    """
    return _SIZES[dtype].computed * 2 * config.model.hidden_size + _SIZES[dtype].exact


@dataclass(frozen=True, kw_only=True)
class _Kept:
    """Bytes of one row of a tensor, by what it is kept for, under a recipe of precision."""

    recipe: str
    sizes: _Sizes

    @property
    def is_fp8(self) -> bool:
        return self.recipe != "original"

    @property
    def is_narrow(self) -> bool:
        """Whether the recipe has the report's two narrow caches."""
        return self.is_fp8 and self.recipe != "fp8_per_tensor"

    def input(self, width: int) -> int:
        """Of the input of a product, for Wgrad."""
        if not self.is_fp8:
            return self.sizes.computed * width
        return width + (0 if self.recipe == "fp8_per_tensor" else self._scales(width))

    def swiglu_input(self, width: int) -> int:
        """Of an input of the experts' SwiGLU."""
        return width + self._scales(width) if self.is_narrow else self.sizes.computed * width

    def swiglu_output(self, width: int, *, recompute: RecomputeConfig) -> int:
        """Of its output, which is the input of the down projection."""
        return 0 if recompute.swiglu or self.is_narrow else self.input(width)

    def attention_output(self, width: int) -> int:
        """Of what attention puts out, for its own backward pass and for o_proj's Wgrad."""
        if self.is_narrow:
            return (width + 1) // 2 * 3 + self._scales(width)
        return self.sizes.computed * width + (self.input(width) if self.is_fp8 else 0)

    @staticmethod
    def _scales(width: int) -> int:
        return FLOAT * -(-width // TILE)


def _attention(model: ModelConfig, *, recompute: RecomputeConfig, kept: _Kept) -> int:
    """Return bytes that the attention of one layer keeps for one token, without the norm before it."""
    heads = model.num_attention_heads
    down_query = model.q_lora_rank or 0
    numbers = down_query + model.kv_lora_rank + 2 * model.qk_rope_head_dim  # the rope key once more, without its latent
    exact = heads + (2 if down_query else 1)  # the logarithm of each softmax's sum; scales of the norms
    if not (recompute.up_projections and down_query):
        numbers += heads * model.qk_head_dim
    if not recompute.up_projections:
        numbers += heads * (model.qk_nope_head_dim + model.v_head_dim)
    latents = 0
    if not recompute.norms:
        latents = kept.input(model.kv_lora_rank) + (kept.input(down_query) if down_query else 0)
    of_numbers = kept.sizes.computed * numbers + kept.sizes.exact * exact
    return of_numbers + latents + kept.attention_output(heads * model.v_head_dim)


def _router(model: ModelConfig, *, sizes: _Sizes) -> int:
    """Return bytes: scores, gates before and after division, their sum; choices, and where each copy comes from."""
    chosen = model.num_experts_per_tok
    scores = model.n_routed_experts + (2 * chosen + 1 if model.norm_topk_prob else chosen)
    return sizes.exact * scores + sizes.index * 4 * chosen


def _around(model: ModelConfig, *, recompute: RecomputeConfig, kept: _Kept) -> int:
    """Return bytes of the residual stream, its norms, the angles, and the two ends of the model."""
    hidden, modules = model.hidden_size, model.num_nextn_predict_layers
    layers = model.num_hidden_layers + modules
    sizes = kept.sizes
    norms = layers * 2 * (sizes.computed * hidden + sizes.exact)
    if not recompute.norms:
        norms += layers * _normed_for_attention(model, kept=kept)
        norms += (model.num_hidden_layers - model.num_moe_layers) * kept.input(hidden)
        # The router reads it in FP32, the shared experts in their own precision.
        shared = kept.input(hidden) if kept.is_fp8 and model.n_shared_experts else 0
        norms += (model.num_moe_layers + modules) * (sizes.exact * hidden + shared)
    ends = (1 + modules) * 3 * hidden  # last norm: input and output; gradient of the output
    joints = modules * (2 * hidden + 2 * hidden)  # both norms' inputs, and what eh_proj reads
    scales = 1 + modules + 2 * modules  # of these norms
    angles = (1 + modules) * model.qk_rope_head_dim
    return norms + sizes.computed * (ends + joints) + sizes.exact * (scales + angles)


def _normed_for_attention(model: ModelConfig, *, kept: _Kept) -> int:
    """Return bytes of the normed hidden state, which both down projections read; in FP8 a direct query has its own."""
    once = kept.input(model.hidden_size)
    return 2 * once if kept.is_fp8 and model.q_lora_rank is None else once
