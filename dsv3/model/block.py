"""One layer: attention, then a feed-forward network, dense or of experts, each behind a norm and a residual.

An MoE block can be driven in steps (attention, dispatch, experts, combine), which is how a pipeline overlaps one
chunk's communication with another's computation (report 3.2.1). Its own forward is those steps in a row.
"""

from collections.abc import Generator
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from jaxtyping import Float, Int
from torch import Tensor, nn

from dsv3.batch import TokenBatch
from dsv3.config import KEEP_ALL, ModelConfig, RecomputeConfig
from dsv3.model.interfaces import Cut, DispatchedTokens, LatentCache, Part, Routing, TokenDispatch, keep_whole
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
    """Between attention and combine: what travels to the experts, and what stays for the sum."""

    travelling: Any
    """The dispatch's own."""
    before_norm: Float[Tensor, "token hidden"]
    normed: Float[Tensor, "token hidden"]
    """What the shared experts read."""
    routing: Routing


class MoeBlock(Block):
    """A layer with routed and shared experts."""

    def __init__(self, config: ModelConfig, *, layer: int) -> None:
        super().__init__(config, layer=layer)
        self.mlp = MixtureOfExperts(config)
        self.place = layer - (config.num_hidden_layers - config.num_moe_layers)
        """Its number among the layers of the main model that have experts."""
        self.has_shared_experts = config.n_shared_experts > 0

    def steps(
        self,
        hidden: Float[Tensor, "token hidden"],
        *,
        batch: TokenBatch,
        rotation: Rotation,
        cache: LatentCache | None,
        dispatch: TokenDispatch,
        recompute: RecomputeConfig = KEEP_ALL,
        precision: Precision = ORIGINAL,
        cut: Cut = keep_whole,
    ) -> Generator[Part, None, tuple[Float[Tensor, "token hidden"], Routing]]:
        """Run the layer, stopping after each part; return its output and how its tokens were routed.

        Rows travel from a stop to the next but one, and `cut` ends pieces of the backward pass where they do.
        """
        middle = self.attention(
            hidden, batch=batch, rotation=rotation, cache=cache, recompute=recompute, precision=precision
        )
        experts = None if batch.experts is None else batch.experts[:, self.place]
        sent = self.route(middle, through=dispatch, recompute=recompute, experts=experts)
        yield Part.ATTENTION
        sent = cut(replace(sent, travelling=dispatch.send(sent.travelling)), Part.ATTENTION)
        yield Part.DISPATCH
        dispatched = dispatch.receive(sent.travelling)
        if not dispatched.gathered_here:  # or nothing has travelled
            dispatched = cut(dispatched, Part.DISPATCH)
        outputs = self.experts(dispatched, sent=sent, recompute=recompute, precision=precision)
        yield Part.EXPERTS
        returning = cut(dispatch.send_back(outputs, dispatched=dispatched), Part.EXPERTS)
        yield Part.COMBINE
        combined = self.combine(returning, sent=sent, through=dispatch, recompute=recompute, precision=precision)
        return cut(combined, Part.COMBINE), sent.routing

    def route(
        self,
        hidden: Float[Tensor, "token hidden"],
        *,
        through: TokenDispatch,
        recompute: RecomputeConfig = KEEP_ALL,
        experts: Int[Tensor, "token chosen"] | None = None,
    ) -> SentTokens:
        """Choose experts for the normed tokens, unless they are given, and announce them there."""
        normed = self.post_attention_layernorm(hidden)
        with made_again((normed, lambda: self.post_attention_layernorm(hidden)), when=recompute.norms):
            routing = self.mlp.gate(normed, experts=experts)
            announced = through.announce(normed, routing=routing)
        return SentTokens(travelling=announced, before_norm=hidden, normed=normed, routing=routing)

    def experts(
        self,
        dispatched: DispatchedTokens,
        *,
        sent: SentTokens,
        recompute: RecomputeConfig = KEEP_ALL,
        precision: Precision = ORIGINAL,
    ) -> Float[Tensor, "row hidden"]:
        """Run the routed experts held here on what arrived.

        Copies gathered on this device are gathered again in the backward pass: they are `num_experts_per_tok` times as
        large as what they are copies of. Not in the report, whose copies come from other devices.
        """
        source, origin = dispatched.source, dispatched.origin
        before, normed = sent.before_norm, None if recompute.norms else sent.normed

        def gather() -> Tensor:
            tokens = self.post_attention_layernorm(before) if normed is None else normed
            return copy_to_rows(tokens, source=source, origin=origin)

        with made_again((dispatched.rows, gather), when=dispatched.gathered_here):
            return self.mlp.experts(dispatched, recompute=recompute, precision=precision)

    def combine(
        self,
        returning: Any,
        *,
        sent: SentTokens,
        through: TokenDispatch,
        recompute: RecomputeConfig = KEEP_ALL,
        precision: Precision = ORIGINAL,
    ) -> Float[Tensor, "token hidden"]:
        """Return hidden + routed + shared (eq. 12); the shared experts compute while the others' outputs travel."""
        hidden = sent.before_norm
        if not self.has_shared_experts:
            return hidden + through.receive_back(returning)
        with made_again((sent.normed, lambda: self.post_attention_layernorm(hidden)), when=recompute.norms):
            shared = self.mlp.shared_experts(sent.normed, recompute=recompute, precision=precision)
        return hidden + through.receive_back(returning) + shared

    def forward(
        self, hidden: Float[Tensor, "token hidden"], **given: Any
    ) -> tuple[Float[Tensor, "token hidden"], Routing]:
        """Run the layer as `steps` does, without stopping."""
        return run_through(self.steps(hidden, **given))


Returned = TypeVar("Returned")


def run_through(steps: Generator[Any, None, Returned]) -> Returned:
    """Return what a generator returns, without stopping where it would."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


def parts_of(module: nn.Module, hidden: Tensor, *, cut: Cut, **given: Any) -> Generator[Part, None, Any]:
    """Run a module by its `steps`; where nothing is cut by a call, so that its hooks run."""
    if cut is keep_whole:
        return module(hidden, **given)
    return (yield from module.steps(hidden, cut=cut, **given))  # type: ignore[operator]
