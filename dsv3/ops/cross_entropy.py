"""Output head and cross-entropy in one, so that the logits of all tokens are never held at once.

V3 has 129,280 logits a token: 2 GB in FP32 for one row of 4,096. Both functions walk over chunks of tokens. What waits
for the backward pass is the smaller of two: the gradient of the head, or the slope of the loss for each logit, in the
type that is computed with. For V3 in BF16 that is 1.1 GB for a row instead of 3.7.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from dsv3 import native
from dsv3.batch import IGNORE
from dsv3.ops import on_gpu

CHUNK_ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 27}
"""Logits held at once: in FP32 16 MB on a CPU and 512 MB on a GPU, whose products want many rows."""


def linear_cross_entropy(
    hidden: Float[Tensor, "token hidden"],
    *,
    weight: Float[Tensor, "vocab hidden"],
    targets: Int[Tensor, " token"],
    weights: Float[Tensor, " token"] | None = None,
) -> Float[Tensor, ""]:
    """Return the SUM over tokens of `weights * -log softmax(hidden @ weight.T)[target]`, in at least FP32.

    Divide by what the report divides by: for an MTP module that is the number of main-model targets (eq. 24), not the
    fewer targets it has itself. Targets of `IGNORE` count nothing. Gradients are made chunk by chunk in the forward
    pass, while the logits are there; so the function can be differentiated once.
    """
    wants_gradient = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    return _LinearCrossEntropy.apply(hidden, weight, targets, weights, wants_gradient)


@torch.no_grad()
def token_nll(
    hidden: Float[Tensor, "token hidden"],
    *,
    weight: Float[Tensor, "vocab hidden"],
    targets: Int[Tensor, " token"],
) -> Float[Tensor, " token"]:
    """Return each token's `-log softmax(hidden @ weight.T)[target]` in nats, 0 for `IGNORE`; without gradients."""
    pieces = []
    for rows in _chunks(hidden.shape[0], weight.shape[0], device=hidden.device):
        logits = _wide(hidden[rows] @ weight.T)
        pieces.append(_nll(logits, targets[rows]))
    return torch.cat(pieces) if pieces else hidden.new_zeros(0)


@torch.no_grad()
def token_entropy(
    hidden: Float[Tensor, "token hidden"], *, weight: Float[Tensor, "vocab hidden"]
) -> Float[Tensor, " token"]:
    """Return the entropy of each token's prediction in nats; without gradients."""
    pieces = []
    for rows in _chunks(hidden.shape[0], weight.shape[0], device=hidden.device):
        logprobs = _wide(hidden[rows] @ weight.T).log_softmax(-1)
        pieces.append(-(logprobs.exp() * logprobs).sum(-1))
    return torch.cat(pieces) if pieces else hidden.new_zeros(0)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor | None, wants_gradient: bool
    ) -> Tensor:
        accumulator = torch.promote_types(hidden.dtype, torch.float32)
        total = torch.zeros((), dtype=accumulator, device=hidden.device)
        of_hidden = torch.empty_like(hidden) if wants_gradient else None
        keeps_slopes = keeps_slopes_of(hidden.shape[0], hidden=hidden.shape[1], itemsize=hidden.element_size())
        slopes = hidden.new_empty(hidden.shape[0], weight.shape[0]) if wants_gradient and keeps_slopes else None
        of_weight = torch.zeros_like(weight, dtype=accumulator) if wants_gradient and not keeps_slopes else None
        for rows in _chunks(hidden.shape[0], weight.shape[0], device=hidden.device):
            logits = hidden[rows] @ weight.T
            target = targets[rows]
            coefficient = (target != IGNORE).to(accumulator)
            if weights is not None:
                coefficient = coefficient * weights[rows].to(accumulator)
            losses, slope = _losses_and_slopes(logits, target, coefficient, wants_gradient)
            total += (losses * coefficient).sum()
            if of_hidden is None:
                continue
            slope = slope.to(hidden.dtype)
            torch.mm(slope, weight, out=of_hidden[rows])
            if slopes is not None:
                slopes[rows] = slope
            elif of_weight is not None and of_weight.dtype == slope.dtype:
                of_weight.addmm_(slope.T, hidden[rows])
            elif of_weight is not None:
                of_weight += slope.T @ hidden[rows]
        ctx.save_for_backward(of_hidden, of_weight, *((slopes, hidden) if slopes is not None else ()))
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        of_hidden, of_weight, *kept = ctx.saved_tensors
        gradient = gradients[0]
        if kept:
            slopes, hidden = kept
            whole = (slopes.T @ hidden).mul_(gradient)
        else:
            whole = (of_weight * gradient).to(ctx.weight_dtype)
        return of_hidden * gradient.to(of_hidden.dtype), whole, None, None, None


def keeps_slopes_of(num_tokens: int, *, hidden: int, itemsize: int) -> bool:
    """Whether slopes of so many tokens take less memory until the backward pass than the head's gradient in FP32."""
    return num_tokens * itemsize < hidden * max(itemsize, torch.float32.itemsize)


def _losses_and_slopes(
    logits: Tensor, targets: Tensor, coefficients: Tensor, wants_slopes: bool
) -> tuple[Tensor, Tensor]:
    """Return each row's -log softmax[target] and, in the memory of `logits`, its gradient times the coefficient."""
    rows, vocab = logits.shape
    index = targets.long().clamp(min=0)
    if on_gpu.usable(logits, coefficients):
        losses = on_gpu.cross_entropy_rows(logits, targets=index, coefficients=coefficients, wants_slopes=wants_slopes)
        return losses, logits
    logits = _wide(logits)
    if native.usable(logits, coefficients):
        assert rows == 0 or int(index.max()) < vocab, "a target lies outside the vocabulary"
        losses = logits.new_empty(rows)
        native.call("cross_entropy_rows", logits, index, coefficients, losses, int(wants_slopes), rows, vocab)
        return losses, logits
    log_probability = logits.log_softmax(-1)
    losses = -log_probability.gather(1, index[:, None]).squeeze(1)
    if not wants_slopes:
        return losses, log_probability
    # d nll / d logits = softmax(logits) - onehot(target), in place of the log-probabilities.
    slope = log_probability.exp_()
    slope.scatter_add_(1, index[:, None], torch.full_like(index[:, None], -1, dtype=slope.dtype))
    return losses, slope.mul_(coefficients[:, None])


def _chunks(num_tokens: int, vocab_size: int, *, device: torch.device) -> list[slice]:
    step = max(1, CHUNK_ELEMENTS.get(device.type, CHUNK_ELEMENTS["cpu"]) // vocab_size)
    return [slice(start, min(start + step, num_tokens)) for start in range(0, num_tokens, step)]


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _nll(logits: Tensor, targets: Tensor) -> Tensor:
    chosen = logits.gather(1, targets.clamp(min=0)[:, None]).squeeze(1)
    return torch.where(targets == IGNORE, 0.0, logits.logsumexp(-1) - chosen)
