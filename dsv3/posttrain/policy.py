"""What GRPO minimises (report 5.2.2, eq. 26-28), token by token as DeepSeekMath writes it (eq. 3).

    r_t = pi(o_t) / pi_old(o_t),   d_t = log pi_ref(o_t) - log pi(o_t)
    L   = - sum_t share_t ( min(r_t A, clip(r_t, 1 - low, 1 + high) A) - beta (exp(d_t) - d_t - 1) )

Logits are never held whole: the slope of every term by log pi(o_t) is found first, and a cross-entropy with those
slopes for weights has the gradient of the loss.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dsv3.batch import TokenBatch
from dsv3.config import BalanceConfig
from dsv3.config.teaching import GrpoConfig
from dsv3.model.interfaces import ModelOutput
from dsv3.model.transformer import Transformer
from dsv3.ops.cross_entropy import linear_cross_entropy, token_entropy, token_nll
from dsv3.train.balance import balance_loss
from dsv3.train.loss import LossParts, WholeBatch


@dataclass(frozen=True, kw_only=True)
class PolicyBatch(TokenBatch):
    """Prompts with their answers; what is known of every token of an answer, and 0 of those of prompts."""

    advantages: Float[Tensor, " token"]
    old_logprobs: Float[Tensor, " token"]
    """Log-probabilities when the answers were drawn."""
    reference_logprobs: Float[Tensor, " token"]
    drawn_experts: Int[Tensor, "token layer chosen"] | None = None
    """Where the engine had sent the tokens, to be compared with where they go now."""
    shares: Float[Tensor, " token"]
    """What each token counts in the mean; those of all micro-batches of a step add up to 1."""

    def to(self, device: torch.device | str) -> "PolicyBatch":
        """Move to a device everything but `starts`."""
        moved = super().to(device)
        assert isinstance(moved, PolicyBatch)
        return replace(
            moved,
            advantages=self.advantages.to(device),
            old_logprobs=self.old_logprobs.to(device),
            reference_logprobs=self.reference_logprobs.to(device),
            shares=self.shares.to(device),
            drawn_experts=None if self.drawn_experts is None else self.drawn_experts.to(device),
        )


@dataclass(kw_only=True)
class PolicyLoss:
    """The loss as `train_step` asks for it, and what was seen on the way."""

    lesson: GrpoConfig
    vocab_size: int
    """Tokens there are; rows of the head beyond them are never drawn, and so have no probability."""
    seen: list[dict[str, float]] = field(default_factory=list)
    """Of every micro-batch, sums over its tokens times their shares; `ratio_off` is the largest |r - 1|."""

    def __call__(
        self,
        model: Transformer,
        *,
        output: ModelOutput,
        batch: TokenBatch,
        whole: WholeBatch,
        mtp_weight: float,  # noqa: ARG002 - answers are drawn by the main model, and MTP learns nothing from them
        balance: BalanceConfig,
        is_last: bool = True,
    ) -> LossParts:
        """Return the share of one micro-batch."""
        even = balance_loss(output, config=balance, model_config=model.config, num_sequences=whole.num_sequences)
        if not is_last:
            return LossParts(total=even, next_token=even.new_zeros(()), mtp=(), balance=even)
        assert isinstance(batch, PolicyBatch)
        assert batch.targets is not None
        head, hidden = self._head(model), output.hidden / self.lesson.temperature
        logprobs = -token_nll(hidden.detach(), weight=head, targets=batch.targets)
        value, slopes, seen = policy_terms(logprobs, batch=batch, lesson=self.lesson)
        surrogate = linear_cross_entropy(hidden, weight=head, targets=batch.targets, weights=-slopes)
        policy = surrogate - surrogate.detach() + value
        entropy = (token_entropy(hidden.detach(), weight=head) * batch.shares).sum().item()
        if batch.drawn_experts is not None and output.routings:
            seen["rerouted"] = _share_rerouted(output, drawn=batch.drawn_experts, shares=batch.shares)
        self.seen.append(seen | {"entropy": entropy})
        return LossParts(total=policy + even, next_token=policy, mtp=(), balance=even)

    def logprobs(self, model: Transformer, *, batch: TokenBatch) -> Float[Tensor, " token"]:
        """Return the log-probability of each target under a model, 0 where there is none."""
        assert batch.targets is not None
        with torch.no_grad():
            hidden = model(batch).hidden / self.lesson.temperature
        return -token_nll(hidden, weight=self._head(model), targets=batch.targets)

    def _head(self, model: Transformer) -> Tensor:
        return model.lm_head.weight[: self.vocab_size]

    def take_seen(self) -> dict[str, float]:
        """Return what was seen since the last call, of all micro-batches together."""
        seen, self.seen = self.seen, []
        if not seen:
            return {}
        total = {name: sum(one[name] for one in seen) for name in seen[0]}
        return total | {"ratio_off": max(one["ratio_off"] for one in seen)}


def _share_rerouted(
    output: ModelOutput, *, drawn: Int[Tensor, "token layer chosen"], shares: Float[Tensor, " token"]
) -> float:
    """Return the share of choices, of tokens that count, which are not the engine's; their order means nothing."""
    now = torch.stack([one.experts for one in output.routings], dim=1)
    differs = (now.sort(dim=-1).values != drawn.sort(dim=-1).values).any(dim=-1)
    return (differs.to(shares.dtype).mean(dim=1) * shares).sum().item()


def policy_terms(
    logprobs: Float[Tensor, " token"], *, batch: PolicyBatch, lesson: GrpoConfig
) -> tuple[Float[Tensor, ""], Float[Tensor, " token"], dict[str, float]]:
    """Return the loss, its slope by each log-probability, and what is worth knowing of both."""
    ratio = (logprobs - batch.old_logprobs).exp()
    clipped = ratio.clamp(1 - lesson.clip_low, 1 + lesson.clip_high)
    free, held = ratio * batch.advantages, clipped * batch.advantages
    is_free = free <= held
    # A ratio that is cut off has no slope; one that lies between the bounds is the same in both, and has.
    slopes = -free * is_free
    loss = -torch.minimum(free, held)
    distance = torch.zeros_like(loss)
    if lesson.kl_weight:
        away = batch.reference_logprobs - logprobs
        distance = away.exp() - away - 1
        loss = loss + lesson.kl_weight * distance
        slopes = slopes + lesson.kl_weight * (1 - away.exp())
    shares, counts = batch.shares, batch.shares > 0
    off = (ratio - 1).abs()[counts]
    seen = {
        "kl": (distance * shares).sum().item(),
        "clipped": ((~is_free) * shares).sum().item(),
        "ratio": (ratio * shares).sum().item(),
        "ratio_off": off.max().item() if len(off) else 0.0,
    }
    return (loss * shares).sum(), slopes * shares, seen


def advantages_of(rewards: Sequence[float], *, scale_by_deviation: bool) -> list[float] | None:
    """Return how much better each answer of a group is than its mean, or None where all are alike (eq. 28).

    Divided by the standard deviation over the group (that of G, not of G - 1; unpublished).
    """
    count = len(rewards)
    mean = sum(rewards) / count
    deviation = (sum((reward - mean) ** 2 for reward in rewards) / count) ** 0.5
    if deviation < 1e-8:
        return None
    return [(reward - mean) / (deviation if scale_by_deviation else 1.0) for reward in rewards]
