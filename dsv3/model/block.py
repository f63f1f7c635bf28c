"""One layer: attention, then a feed-forward network, dense or of experts, each behind a norm and a residual.

An MoE block can be driven in four steps (attention, dispatch, experts, combine), which is how a pipeline overlaps one
chunk's communication with another's computation (report 3.2.1). Its own forward is those four steps in a row.
"""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor, nn

from dsv3.batch import TokenBatch
from dsv3.config import KEEP_ALL, ModelConfig, RecomputeConfig
from dsv3.model.interfaces import DispatchedTokens, LatentCache, Routing, TokenDispatch
from dsv3.model.linear import RMSNorm
from dsv3.model.mla import LatentAttention
from dsv3.model.moe import FeedForward, MixtureOfExperts
from dsv3.model.precision import ORIGINAL, Precision
from dsv3.ops.permute import copy_to_rows
from dsv3.ops.recompute import made_again
from dsv3.ops.rope import Rotation


class Block(nn.Module):
    """What every layer has: two norms and attention."""

    def __init__(self, config: ModelConfig, *, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = LatentAttention(config, layer=layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def attention(
        self,
        hidden: Float[Tensor, "token hidden"],
        *,
        batch: TokenBatch,
        rotation: Rotation,
        cache: LatentCache | None,
        recompute: RecomputeConfig = KEEP_ALL,
        precision: Precision = ORIGINAL,
    ) -> Float[Tensor, "token hidden"]:
        """Return hidden + MLA(norm(hidden))."""
        normed = self.input_layernorm(hidden)
        with made_again((normed, lambda: self.input_layernorm(hidden)), when=recompute.norms):
            return hidden + self.self_attn(
                normed, batch=batch, rotation=rotation, cache=cache, recompute=recompute, precision=precision
            )


class DenseBlock(Block):
    """One of the first layers, whose feed-forward network serves every token alike."""

    def __init__(self, config: ModelConfig, *, layer: int) -> None:
        super().__init__(config, layer=layer)
        self.mlp = FeedForward(config.hidden_size, intermediate_size=config.intermediate_size)

    def forward(
        self,
        hidden: Float[Tensor, "token hidden"],
        *,
        batch: TokenBatch,
        rotation: Rotation,
        cache: LatentCache | None,
        recompute: RecomputeConfig = KEEP_ALL,
        precision: Precision = ORIGINAL,
    ) -> Float[Tensor, "token hidden"]:
        """Return the layer's output."""
        middle = self.attention(
            hidden, batch=batch, rotation=rotation, cache=cache, recompute=recompute, precision=precision
        )
        normed = self.post_attention_layernorm(middle)
        with made_again((normed, lambda: self.post_attention_layernorm(middle)), when=recompute.norms):
            return middle + self.mlp(normed, recompute=recompute, precision=precision)


@dataclass(frozen=True, kw_only=True)
class SentTokens:
    """Between dispatch and combine: what travels to the experts, and what stays for the sum."""

    dispatched: DispatchedTokens
    before_norm: Float[Tensor, "token hidden"]
    normed: Float[Tensor, "token hidden"]
    """What the shared experts read."""
    routing: Routing


class MoeBlock(Block):
    """A layer with routed and shared experts."""

    def __init__(self, config: ModelConfig, *, layer: int) -> None:
        super().__init__(config, layer=layer)
        self.mlp = MixtureOfExperts(config)
        self.has_shared_experts = config.n_shared_experts > 0

    def dispatch(
        self, hidden: Float[Tensor, "token hidden"], *, through: TokenDispatch, recompute: RecomputeConfig = KEEP_ALL
    ) -> SentTokens:
        """Route the normed tokens and send them to their experts."""
        normed = self.post_attention_layernorm(hidden)
        with made_again((normed, lambda: self.post_attention_layernorm(hidden)), when=recompute.norms):
            routing = self.mlp.gate(normed)
            dispatched = through.dispatch(normed, routing=routing)
        return SentTokens(dispatched=dispatched, before_norm=hidden, normed=normed, routing=routing)

    def experts(
        self, sent: SentTokens, *, recompute: RecomputeConfig = KEEP_ALL, precision: Precision = ORIGINAL
    ) -> Float[Tensor, "row hidden"]:
        """Run the routed experts held here on what arrived.

        Copies gathered on this device are gathered again in the backward pass: they are `num_experts_per_tok` times as
        large as what they are copies of. Not in the report, whose copies come from other devices.
        """
        source, origin = sent.dispatched.source, sent.dispatched.origin
        before, normed = sent.before_norm, None if recompute.norms else sent.normed

        def gather() -> Tensor:
            tokens = self.post_attention_layernorm(before) if normed is None else normed
            return copy_to_rows(tokens, source=source, origin=origin)

        with made_again((sent.dispatched.rows, gather), when=sent.dispatched.gathered_here):
            return self.mlp.experts(sent.dispatched, recompute=recompute, precision=precision)

    def combine(
        self,
        outputs: Float[Tensor, "row hidden"],
        *,
        hidden: Float[Tensor, "token hidden"],
        sent: SentTokens,
        through: TokenDispatch,
        recompute: RecomputeConfig = KEEP_ALL,
        precision: Precision = ORIGINAL,
    ) -> Float[Tensor, "token hidden"]:
        """Return hidden + routed + shared (eq. 12)."""
        total = hidden + through.combine(outputs, dispatched=sent.dispatched)
        if not self.has_shared_experts:
            return total
        with made_again((sent.normed, lambda: self.post_attention_layernorm(hidden)), when=recompute.norms):
            return total + self.mlp.shared_experts(sent.normed, recompute=recompute, precision=precision)

    def forward(
        self,
        hidden: Float[Tensor, "token hidden"],
        *,
        batch: TokenBatch,
        rotation: Rotation,
        cache: LatentCache | None,
        dispatch: TokenDispatch,
        recompute: RecomputeConfig = KEEP_ALL,
        precision: Precision = ORIGINAL,
    ) -> tuple[Float[Tensor, "token hidden"], Routing]:
        """Return the layer's output and how its tokens were routed."""
        middle = self.attention(
            hidden, batch=batch, rotation=rotation, cache=cache, recompute=recompute, precision=precision
        )
        sent = self.dispatch(middle, through=dispatch, recompute=recompute)
        outputs = self.experts(sent, recompute=recompute, precision=precision)
        combined = self.combine(
            outputs, hidden=middle, sent=sent, through=dispatch, recompute=recompute, precision=precision
        )
        return combined, sent.routing
