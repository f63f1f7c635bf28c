"""Attention cores against the formula with all scores in memory."""

import pytest
import torch

from dsv3.ops.attention import causal_attention, causal_attention_plain, latent_attention


@pytest.mark.parametrize("lengths", [[7], [5, 5, 5], [3, 1, 8]])
@pytest.mark.parametrize("widths", [(24, 16), (16, 16), (192, 128)])
def test_fused_attention_equals_the_formula_with_gradients(lengths, widths):
    qk, v = widths
    inputs = [torch.randn(sum(lengths), 4, width, dtype=torch.float64) for width in (qk, qk, v)]
    results = []
    for attend in (causal_attention, causal_attention_plain):
        query, key, value = (x.clone().requires_grad_() for x in inputs)
        output = attend(query, key=key, value=value, lengths=lengths, scale=0.17)
        output.square().sum().backward()
        results.append((output.detach(), query.grad, key.grad, value.grad))
    for fused, plain in zip(*results, strict=True):
        torch.testing.assert_close(fused, plain)


def test_latent_attention_over_a_prefix_equals_one_shared_head_of_plain_attention():
    """Absorbed attention is multi-query attention with key [c; k_R] and value c (fact sheet 1.2)."""
    tokens, heads, latent_dim, rope_dim = 9, 3, 8, 4
    latent, rope_key = torch.randn(tokens, latent_dim).double(), torch.randn(tokens, rope_dim).double()
    query_latent = torch.randn(tokens, heads, latent_dim).double()
    query_rope = torch.randn(tokens, heads, rope_dim).double()
    expected = causal_attention_plain(
        torch.cat((query_latent, query_rope), -1),
        key=torch.cat((latent, rope_key), -1)[:, None].expand(-1, heads, -1),
        value=latent[:, None].expand(-1, heads, -1),
        lengths=[tokens],
        scale=0.3,
    )
    for first in (0, 4, 8):
        output = latent_attention(
            query_latent[first:],
            query_rope=query_rope[first:],
            latent=latent,
            rope_key=rope_key,
            positions=torch.arange(first, tokens),
            scale=0.3,
        )
        torch.testing.assert_close(output, expected[first:])


def test_latent_attention_holds_the_scores_of_few_tokens_at_a_time(monkeypatch):
    given = {
        "query_rope": torch.randn(9, 3, 4),
        "latent": torch.randn(20, 8),
        "rope_key": torch.randn(20, 4),
        "positions": torch.arange(11, 20),
        "scale": 0.3,
    }
    query = torch.randn(9, 3, 8)
    whole = latent_attention(query, **given)
    sizes = []
    einsum = torch.einsum
    monkeypatch.setattr(torch, "einsum", lambda *args: sizes.append((made := einsum(*args)).numel()) or made)
    monkeypatch.setattr("dsv3.ops.attention.SCORES_AT_ONCE", 150)
    torch.testing.assert_close(latent_attention(query, **given), whole)
    assert max(sizes) <= 150
