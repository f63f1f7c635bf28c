"""The core of attention, without parameters: causal over whole sequences, and absorbed over a latent cache."""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from dsv3 import native
from dsv3.ops import on_gpu
from dsv3.ops.rope import Rotation, rotate

SCORES_AT_ONCE = 1 << 24
"""Numbers of one matrix of scores, where scores are held at all: 64 MB in FP32, whatever the context."""


def expanded_attention(
    query: Float[Tensor, "token head qk"],
    *,
    key_value: Float[Tensor, "key head nope_and_v"],
    rope_key: Float[Tensor, "key rope"],
    rotation: Rotation,
    lengths: Sequence[int],
    scale: float,
    key_lengths: Sequence[int] | None = None,
) -> Float[Tensor, "token head v"]:
    """Attend from each token to itself and the tokens before it in its own sequence, from the projections as they are.

    Nothing is rotated yet: the last `rope` numbers of each query head and the one rope key are, here, by `rotation`,
    which is that of the keys. Each head of `key_value` holds its key without position, then its value. Sequences lie
    end to end. With `key_lengths` there are that many keys of each, of which the queries are those of the last ones.

    Source: report 2.1.1, eq. 2-5 and 7-10.
    """
    if native.usable(query, key_value, rope_key, rotation.cos, rotation.sin):
        counts = (tuple(lengths), tuple(key_lengths or lengths))
        return _ExpandedAttention.apply(query, key_value, rope_key, rotation.cos, rotation.sin, *counts, scale)
    if key_lengths is None and on_gpu.usable(query, key_value, rope_key):
        q, k, v = _AttentionInputs.apply(query, key_value, rope_key, rotation.cos, rotation.sin)
        return causal_attention(q, key=k, value=v, lengths=lengths, scale=scale)
    return expanded_attention_plain(
        query,
        key_value=key_value,
        rope_key=rope_key,
        rotation=rotation,
        lengths=lengths,
        scale=scale,
        key_lengths=key_lengths,
    )


def expanded_attention_plain(
    query: Float[Tensor, "token head qk"],
    *,
    key_value: Float[Tensor, "key head nope_and_v"],
    rope_key: Float[Tensor, "key rope"],
    rotation: Rotation,
    lengths: Sequence[int],
    scale: float,
    key_lengths: Sequence[int] | None = None,
) -> Float[Tensor, "token head v"]:
    """`expanded_attention` in the report's steps: rotate, give every head the shared key, attend."""
    heads, rope = query.shape[1], rope_key.shape[1]
    nope = query.shape[2] - rope
    query_nope, query_rope = query.split([nope, rope], dim=-1)
    key_nope, value = key_value.split([nope, key_value.shape[2] - nope], dim=-1)
    shared = rotate(rope_key[:, None, :], rotation=rotation).expand(-1, heads, -1)
    own = rotation if key_lengths is None else _last_of_each(rotation, lengths=lengths, key_lengths=key_lengths)
    return causal_attention(
        torch.cat((query_nope, rotate(query_rope, rotation=own)), dim=-1),
        key=torch.cat((key_nope, shared), dim=-1),
        value=value,
        lengths=lengths,
        scale=scale,
        key_lengths=key_lengths,
    )


def _last_of_each(rotation: Rotation, *, lengths: Sequence[int], key_lengths: Sequence[int]) -> Rotation:
    """Return the rotation of the last `lengths` of each sequence's keys."""
    ends = accumulate(key_lengths)
    places = torch.cat([torch.arange(end - length, end) for length, end in zip(lengths, ends, strict=True)])
    places = places.to(rotation.cos.device)
    return Rotation(cos=rotation.cos[places], sin=rotation.sin[places])


class _ExpandedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key_value: Tensor,
        rope_key: Tensor,
        cos: Tensor,
        sin: Tensor,
        lengths: tuple[int, ...],
        key_lengths: tuple[int, ...],
        scale: float,
    ) -> Tensor:
        inputs = [x.contiguous() for x in (query, key_value, rope_key, cos, sin)]
        tokens, heads, qk = query.shape
        rope = rope_key.shape[1]
        nope = qk - rope
        output = query.new_empty(tokens, heads, key_value.shape[2] - nope)
        log_sum = query.new_empty(tokens, heads)
        starts = (native.starts_of(lengths), native.starts_of(key_lengths))
        ctx.shape = (*starts, len(lengths), heads, nope, rope, output.shape[2], scale)
        native.call("attention_forward", *inputs, output, log_sum, *ctx.shape)
        ctx.save_for_backward(*inputs, output, log_sum)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, key_value, rope_key, *others = ctx.saved_tensors
        results = [torch.empty_like(x) for x in (query, key_value, rope_key)]
        slope = gradients[0].contiguous()
        native.call("attention_backward", slope, query, key_value, rope_key, *others, *results, *ctx.shape)
        return *results, None, None, None, None, None


class _AttentionInputs(torch.autograd.Function):
    """Queries, keys and values of every head as a GPU's attention reads them, in one pass each way."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key_value: Tensor, rope_key: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        inputs = [x.contiguous() for x in (query, key_value, rope_key, cos, sin)]
        ctx.save_for_backward(*inputs[3:])
        return on_gpu.attention_inputs(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        of_query, of_key, of_value = (gradient.contiguous() for gradient in gradients)
        rotation = dict(zip(("cos", "sin"), ctx.saved_tensors, strict=True))
        made = on_gpu.attention_inputs_backward(of_query, of_key=of_key, of_value=of_value, **rotation)
        return *made, None, None


def causal_attention(
    query: Float[Tensor, "token head qk"],
    *,
    key: Float[Tensor, "key head qk"],
    value: Float[Tensor, "key head v"],
    lengths: Sequence[int],
    scale: float,
    key_lengths: Sequence[int] | None = None,
) -> Float[Tensor, "token head v"]:
    """Attend from each token to itself and the tokens before it in its own sequence.

    Sequences lie end to end and are `lengths` long; with `key_lengths`, that is how many of the last tokens ask. Scores
    are never held: values are padded to the width of the keys where torch's fused kernels ask for equal widths (here v
    is narrower) and fall back to a T x T matrix; cuDNN's on a GPU does not.
    """
    width = value.shape[-1]
    pads = width < query.shape[-1] and not on_gpu.attends_to_narrow_values(query, value)
    padded = F.pad(value, (0, query.shape[-1] - width)) if pads else value
    if key_lengths is None and len(set(lengths)) == 1:
        return _batched_rows(query, key, padded, num_rows=len(lengths), scale=scale)[..., :width]
    of_keys = list(key_lengths or lengths)
    pieces = zip(query.split(list(lengths)), key.split(of_keys), padded.split(of_keys), strict=True)
    outputs = [_batched_rows(q, k, v, num_rows=1, scale=scale) for q, k, v in pieces if len(q)]
    return torch.cat(outputs)[..., :width]


def _batched_rows(query: Tensor, key: Tensor, value: Tensor, *, num_rows: int, scale: float) -> Tensor:
    """Fused causal attention over rows of equal length; token head dim in and out."""
    q, k, v = (x.unflatten(0, (num_rows, -1)).transpose(1, 2) for x in (query, key, value))  # row head token dim
    if len(query) == len(key):
        output = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    else:
        # Imported here, for it brings torch's compiler along: half the time that a process needs to begin.
        from torch.nn.attention.bias import causal_lower_right

        seen = causal_lower_right(q.shape[2], k.shape[2])
        output = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale)
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
    verification of drafts). Softmax in at least FP32. Scores are held of so many tokens at a time as fit in
    `SCORES_AT_ONCE`.

    Source: the absorbed form of eq. 1-10: q~ = W_UK^T q, score = scale * (q~ . c + q_R . k_R), o~ = sum p c.
    """
    at_once = max(1, SCORES_AT_ONCE // max(1, query_latent.shape[1] * latent.shape[0]))
    if len(query_latent) > at_once:
        parts = zip(query_latent.split(at_once), query_rope.split(at_once), positions.split(at_once), strict=True)
        return torch.cat(
            [
                latent_attention(q, query_rope=r, latent=latent, rope_key=rope_key, positions=p, scale=scale)
                for q, r, p in parts
            ]
        )
    scores = torch.einsum("thc,sc->ths", query_latent, latent) + torch.einsum("thr,sr->ths", query_rope, rope_key)
    past = torch.arange(latent.shape[0], device=positions.device)
    hidden_from = past[None, None, :] > positions[:, None, None]
    wide = (scores * scale).to(torch.promote_types(scores.dtype, torch.float32))
    weights = wide.masked_fill(hidden_from, float("-inf")).softmax(-1).to(latent.dtype)
    return torch.einsum("ths,sc->thc", weights, latent)
