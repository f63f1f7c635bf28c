"""The core of attention, without parameters: causal over whole sequences, and absorbed over a latent cache."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


def causal_attention(
    query: Float[Tensor, "token head qk"],
    *,
    key: Float[Tensor, "token head qk"],
    value: Float[Tensor, "token head v"],
    lengths: Sequence[int],
    scale: float,
) -> Float[Tensor, "token head v"]:
    """Attend from each token to itself and the tokens before it in its own sequence.

    Sequences lie end to end and are `lengths` long. Scores are never held: values are padded to the width of the keys,
    because torch's fused kernels on CPU ask for equal widths (here v is narrower) and fall back to a T x T matrix.
    """
    width = value.shape[-1]
    padded = F.pad(value, (0, query.shape[-1] - width)) if width < query.shape[-1] else value
    if len(set(lengths)) == 1:
        return _batched_rows(query, key, padded, num_rows=len(lengths), scale=scale)[..., :width]
    pieces = zip(query.split(list(lengths)), key.split(list(lengths)), padded.split(list(lengths)), strict=True)
    outputs = [_batched_rows(q, k, v, num_rows=1, scale=scale) for q, k, v in pieces if len(q)]
    return torch.cat(outputs)[..., :width]


def _batched_rows(query: Tensor, key: Tensor, value: Tensor, *, num_rows: int, scale: float) -> Tensor:
    """Fused causal attention over rows of equal length; token head dim in and out."""
    q, k, v = (x.unflatten(0, (num_rows, -1)).transpose(1, 2) for x in (query, key, value))  # row head token dim
    output = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    return output.transpose(1, 2).flatten(0, 1)


def causal_attention_plain(
    query: Float[Tensor, "token head qk"],
    *,
    key: Float[Tensor, "token head qk"],
    value: Float[Tensor, "token head v"],
    lengths: Sequence[int],
    scale: float,
) -> Float[Tensor, "token head v"]:
    """`causal_attention` as the formula reads (eq. 10), with all scores in memory."""
    sequence = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    place = torch.arange(len(sequence))
    visible = (sequence[:, None] == sequence[None, :]) & (place[:, None] >= place[None, :])
    scores = scale * torch.einsum("qhd,khd->hqk", query, key)
    weights = scores.masked_fill(~visible.to(scores.device), float("-inf")).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, value)


def latent_attention(
    query_latent: Float[Tensor, "token head latent"],
    *,
    query_rope: Float[Tensor, "token head rope"],
    latent: Float[Tensor, "past latent"],
    rope_key: Float[Tensor, "past rope"],
    positions: Int[Tensor, " token"],
    scale: float,
) -> Float[Tensor, "token head latent"]:
    """Attend from the tokens of one sequence to its cached latents: one key/value head shared by all query heads.

    Token at position p sees cache rows 0..p, so several tokens may follow a cached prefix (chunked prefill, or the
    verification of drafts). Softmax in at least FP32.

    Source: the absorbed form of eq. 1-10: q~ = W_UK^T q, score = scale * (q~ . c + q_R . k_R), o~ = sum p c.
    """
    scores = torch.einsum("thc,sc->ths", query_latent, latent) + torch.einsum("thr,sr->ths", query_rope, rope_key)
    past = torch.arange(latent.shape[0], device=positions.device)
    hidden_from = past[None, None, :] > positions[:, None, None]
    wide = (scores * scale).to(torch.promote_types(scores.dtype, torch.float32))
    weights = wide.masked_fill(hidden_from, float("-inf")).softmax(-1).to(latent.dtype)
    return torch.einsum("ths,sc->thc", weights, latent)
