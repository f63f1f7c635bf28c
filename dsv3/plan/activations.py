"""Bytes that a forward pass of training leaves for its backward pass, by formula.

They are those of the FP32 path with our CPU kernels (dsv3/native), which is the one that was measured: the plain
forms keep more. Not in it: what a pass needs for a moment, such as a chunk of logits.
"""

from dataclasses import dataclass

from dsv3.config import ModelConfig, PretrainConfig, RecomputeConfig

FLOAT = 4
INDEX = 8
"""Bytes of an FP32 number and of an index."""


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
    """Bytes whatever the tokens: the gradient of the output head, once for it and once for each MTP module."""

    @property
    def per_token(self) -> int:
        """Bytes for one token of the micro-batch."""
        return self.attention + self.dense_mlp + self.routed_experts + self.shared_experts + self.routers + self.around


def activation_memory(config: PretrainConfig) -> ActivationMemory:
    """Return what one forward pass with all losses keeps under `config.recompute`, in FP32.

    Source: what each function of dsv3/ops saves; report 3.2.3 for what need not be.
    """
    model, recompute = config.model, config.recompute
    modules = model.num_nextn_predict_layers
    layers, experts = model.num_hidden_layers + modules, model.num_moe_layers + modules
    width, chosen = model.moe_intermediate_size, model.num_experts_per_tok
    copies = chosen * (_swiglu(width, recompute=recompute) + 1)  # 1: the gate; the copy itself is gathered again
    heads = 1 + modules
    return ActivationMemory(
        attention=FLOAT * layers * _attention(model, recompute=recompute),
        dense_mlp=FLOAT
        * (model.num_hidden_layers - model.num_moe_layers)
        * _swiglu(model.intermediate_size, recompute=recompute),
        routed_experts=FLOAT * experts * copies,
        shared_experts=FLOAT * experts * _swiglu(model.n_shared_experts * width, recompute=recompute),
        routers=experts * _router(model),
        around=FLOAT * _around(model, recompute=recompute) + INDEX * (3 + 4 * modules),
        per_pass=FLOAT * heads * model.vocab_size * model.hidden_size,
    )


def _attention(model: ModelConfig, *, recompute: RecomputeConfig) -> int:
    """Return numbers that the attention of one layer keeps for one token, without its norm."""
    heads = model.num_attention_heads
    down_query = model.q_lora_rank or 0
    kept = down_query + model.kv_lora_rank + 2 * model.qk_rope_head_dim  # the rope key once more, without its latent
    kept += heads * model.v_head_dim + heads  # outputs, and the logarithm of each softmax's sum
    kept += 2 if down_query else 1  # scales of the norms
    if not recompute.norms:
        kept += down_query + model.kv_lora_rank
    if not (recompute.up_projections and down_query):
        kept += heads * model.qk_head_dim
    if not recompute.up_projections:
        kept += heads * (model.qk_nope_head_dim + model.v_head_dim)
    return kept


def _swiglu(width: int, *, recompute: RecomputeConfig) -> int:
    """Return numbers that one SwiGLU network keeps for one row: gate, up and their product."""
    return (2 if recompute.swiglu else 3) * width


def _router(model: ModelConfig) -> int:
    """Return bytes: scores, gates before and after division, their sum; choices, and where each copy comes from."""
    chosen = model.num_experts_per_tok
    scores = model.n_routed_experts + (2 * chosen + 1 if model.norm_topk_prob else chosen)
    return FLOAT * scores + INDEX * 4 * chosen


def _around(model: ModelConfig, *, recompute: RecomputeConfig) -> int:
    """Return numbers of the residual stream, its norms, the angles, and the two ends of the model."""
    hidden, modules = model.hidden_size, model.num_nextn_predict_layers
    norm = hidden + 1 if recompute.norms else 2 * hidden + 1
    layers = model.num_hidden_layers + modules
    ends = (1 + modules) * (hidden + 1 + hidden + hidden)  # last norm: input and output; gradient of the output
    joints = modules * (2 * (hidden + 1) + 2 * hidden)  # both norms' inputs, and what eh_proj reads
    angles = (1 + modules) * model.qk_rope_head_dim
    return layers * 2 * norm + ends + joints + angles
