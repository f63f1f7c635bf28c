"""Report 2.1.1, eq. 1-11, and what 4.2 and 4.3 add to them: the latents' norms, and YaRN."""

import cmath
import math
from dataclasses import replace

import numpy as np
import pytest

from dsv3.batch import TokenBatch
from dsv3.config import YarnConfig
from dsv3.ops.rope import rope_frequencies, softmax_scale, yarn_correction_range

CLOSE = {"rtol": 1e-5, "atol": 1e-6}  # angles are FP32 in the published code and in ours


def rms_norm(x: np.ndarray, gain: np.ndarray) -> np.ndarray:
    return gain * x / math.sqrt(sum(value * value for value in x) / len(x) + 1e-6)


def turn(x: np.ndarray, *, position: int, frequencies: list[float]) -> np.ndarray:
    """RoPE on adjacent pairs, each one complex number."""
    turned = np.empty_like(x)
    for pair, frequency in enumerate(frequencies):
        number = complex(x[2 * pair], x[2 * pair + 1]) * cmath.exp(1j * position * frequency)
        turned[2 * pair], turned[2 * pair + 1] = number.real, number.imag
    return turned


def plain_frequencies(dim: int) -> list[float]:
    return [10_000.0 ** (-2 * pair / dim) for pair in range(dim // 2)]


def published_yarn_frequencies(dim: int) -> list[float]:
    """s = 40, alpha = 1, beta = 32 over 4096 positions, written out."""

    def corrected(rotations: float) -> float:
        return dim * math.log(4096 / (rotations * 2 * math.pi)) / (2 * math.log(10_000.0))

    low, high = math.floor(corrected(32)), min(math.ceil(corrected(1)), dim - 1)
    frequencies = []
    for pair, frequency in enumerate(plain_frequencies(dim)):
        ramp = min(max((pair - low) / (high - low), 0.0), 1.0)
        frequencies.append(frequency * (1 - ramp) + frequency / 40 * ramp)
    return frequencies


def heads_of(rows: np.ndarray, *, num_heads: int) -> np.ndarray:
    return rows.reshape(num_heads, -1)


def test_eq_1_the_latent_is_a_down_projection_of_the_hidden_state(attention_layers, shrunk):
    """Catches: rope rows taken for latent rows when the fused kv_a projection is cut."""
    rank = shrunk.model.kv_lora_rank
    for layer in attention_layers:
        down = layer.weights["kv_a_proj_with_mqa.weight"][:rank]
        for token, hidden in enumerate(layer.hidden):
            np.testing.assert_allclose(layer.latent_before_norm[token], down @ hidden, **CLOSE)


def test_eq_2_keys_come_up_from_the_latent(attention_layers, shrunk):
    """Catches: kv_b read as all keys and then all values, instead of keys then values within each head."""
    m = shrunk.model
    for layer in attention_layers:
        up = layer.weights["kv_b_proj.weight"].reshape(m.num_attention_heads, -1, m.kv_lora_rank)
        for token, latent in enumerate(layer.cached_latent):
            for head in range(m.num_attention_heads):
                expected = up[head, : m.qk_nope_head_dim] @ latent
                np.testing.assert_allclose(layer.key[token, head, : m.qk_nope_head_dim], expected, **CLOSE)


def test_eq_3_the_rope_key_is_projected_from_the_hidden_state_and_turned(attention_layers, shrunk):
    """Catches: half-split rotation on weights stored for adjacent pairs (llama.cpp #7118 and others)."""
    m = shrunk.model
    for layer in attention_layers:
        down = layer.weights["kv_a_proj_with_mqa.weight"][m.kv_lora_rank :]
        for token, hidden in enumerate(layer.hidden):
            expected = turn(
                down @ hidden, position=layer.positions[token], frequencies=plain_frequencies(m.qk_rope_head_dim)
            )
            np.testing.assert_allclose(layer.cached_rope_key[token], expected, **CLOSE)


def test_eq_4_every_head_shares_the_one_rope_key(attention_layers, shrunk):
    """Catches: a rope key for each head, or one put before the part without position."""
    m = shrunk.model
    for layer in attention_layers:
        assert layer.key.shape[-1] == m.qk_nope_head_dim + m.qk_rope_head_dim
        for head in range(m.num_attention_heads):
            np.testing.assert_allclose(layer.key[:, head, m.qk_nope_head_dim :], layer.cached_rope_key, **CLOSE)


def test_eq_5_values_come_up_from_the_same_latent(attention_layers, shrunk):
    """Catches: values of the wrong rows of kv_b; values are padded for the fused kernel, and padding must be zero."""
    m = shrunk.model
    for layer in attention_layers:
        up = layer.weights["kv_b_proj.weight"].reshape(m.num_attention_heads, -1, m.kv_lora_rank)
        for token, latent in enumerate(layer.cached_latent):
            for head in range(m.num_attention_heads):
                expected = up[head, m.qk_nope_head_dim :] @ latent
                np.testing.assert_allclose(layer.value[token, head, : m.v_head_dim], expected, **CLOSE)
                assert not layer.value[token, head, m.v_head_dim :].any()


def test_eq_6_queries_have_a_latent_of_their_own(attention_layers):
    """Catches: queries projected straight from the hidden state, as the 16B model does."""
    for layer in attention_layers:
        for token, hidden in enumerate(layer.hidden):
            expected = layer.weights["q_a_proj.weight"] @ hidden
            np.testing.assert_allclose(layer.query_latent_before_norm[token], expected, **CLOSE)


def queries(layer, token: int, *, num_heads: int) -> np.ndarray:
    """W^UQ and W^QR of the normed query latent, head by head, not turned yet."""
    latent = rms_norm(layer.query_latent_before_norm[token], layer.weights["q_a_layernorm.weight"])
    return heads_of(layer.weights["q_b_proj.weight"] @ latent, num_heads=num_heads)


def test_eq_7_the_part_of_a_query_without_position_comes_from_the_latent(attention_layers, shrunk):
    """Catches: rope rows first within a head of q_b; a rotation of the whole head."""
    m = shrunk.model
    for layer in attention_layers:
        for token in range(len(layer.hidden)):
            expected = queries(layer, token, num_heads=m.num_attention_heads)[:, : m.qk_nope_head_dim]
            np.testing.assert_allclose(layer.query[token, :, : m.qk_nope_head_dim], expected, **CLOSE)


def test_eq_8_the_rope_part_of_a_query_is_turned_by_its_position(attention_layers, shrunk):
    """Catches: positions that run on through a batch of rows instead of starting at 0 in each."""
    m = shrunk.model
    frequencies = plain_frequencies(m.qk_rope_head_dim)
    for layer in attention_layers:
        for token in range(len(layer.hidden)):
            for head, query in enumerate(queries(layer, token, num_heads=m.num_attention_heads)):
                position = token - max(start for start in layer.starts if start <= token)
                expected = turn(query[m.qk_nope_head_dim :], position=position, frequencies=frequencies)
                np.testing.assert_allclose(layer.query[token, head, m.qk_nope_head_dim :], expected, **CLOSE)


def test_eq_9_a_query_has_the_same_two_parts_in_the_same_order_as_a_key(attention_layers, shrunk):
    """Catches: parts joined in another order on one side only: every score would be wrong, and no shape."""
    m = shrunk.model
    for layer in attention_layers:
        assert layer.query.shape == layer.key.shape
        assert layer.query.shape[-1] == m.qk_nope_head_dim + m.qk_rope_head_dim
        first = layer.starts[0]  # position 0 is not turned, so the whole head can be read off
        expected = queries(layer, first, num_heads=m.num_attention_heads)
        np.testing.assert_allclose(layer.query[first], expected, **CLOSE)


def test_eq_10_attention_is_causal_softmax_over_the_root_of_both_widths(attention_layers, shrunk):
    """Catches: a scale of d_h alone (the rope part forgotten); a later token seen; one row seeing another."""
    m = shrunk.model
    for layer in attention_layers:
        for start, end in zip(layer.starts, layer.starts[1:], strict=False):
            for token in range(start, end):
                for head in range(m.num_attention_heads):
                    scores = [
                        layer.query[token, head]
                        @ layer.key[past, head]
                        / math.sqrt(m.qk_nope_head_dim + m.qk_rope_head_dim)
                        for past in range(start, token + 1)
                    ]
                    weights = [math.exp(score - max(scores)) for score in scores]
                    expected = sum(
                        weight / sum(weights) * layer.value[start + past, head, : m.v_head_dim]
                        for past, weight in enumerate(weights)
                    )
                    np.testing.assert_allclose(layer.heads[token, head], expected, **CLOSE)


def test_eq_11_the_heads_are_joined_and_projected(attention_layers):
    """Catches: dims and heads swapped before W^O."""
    for layer in attention_layers:
        for token, heads in enumerate(layer.heads):
            expected = layer.weights["o_proj.weight"] @ np.concatenate(list(heads))
            np.testing.assert_allclose(layer.output[token], expected, **CLOSE)


def test_both_latents_are_normed_and_the_rope_key_is_not(attention_layers, shrunk):
    """Catches: a norm over all 576 numbers of kv_a, or none (eq. 1-11 show none; report 4.2 adds them)."""
    m = shrunk.model
    for layer in attention_layers:
        for token, latent in enumerate(layer.latent_before_norm):
            expected = rms_norm(latent, layer.weights["kv_a_layernorm.weight"])
            np.testing.assert_allclose(layer.cached_latent[token], expected, **CLOSE)
        # A rotation keeps lengths, so a norm over the rope key would show.
        raw = layer.hidden @ layer.weights["kv_a_proj_with_mqa.weight"][m.kv_lora_rank :].T
        np.testing.assert_allclose(np.linalg.norm(layer.cached_rope_key, axis=1), np.linalg.norm(raw, axis=1), **CLOSE)


def test_yarn_is_off_in_pretraining_at_4k(published, attention_layers, shrunk):
    """Catches: torchtitan, which had YaRN on in 4K pre-training (and before that off where it belongs, #4117)."""
    assert published.batch.sequence_length == 4096
    assert published.model.rope_scaling is None
    assert softmax_scale(published.model) == pytest.approx(192**-0.5, rel=1e-12)
    np.testing.assert_allclose(rope_frequencies(published.model).numpy(), plain_frequencies(64), rtol=1e-6)
    m = shrunk.model
    for layer in attention_layers:  # and what the forward pass of the recipe really multiplies by
        assert layer.scale == pytest.approx((m.qk_nope_head_dim + m.qk_rope_head_dim) ** -0.5, rel=1e-12)


def test_yarn_of_the_long_context_settings_changes_frequencies_and_scale(
    published, shrunk, make_model, make_rows, watch
):
    """Catches: mscale on cos and sin as well, or only on the rope part (llama.cpp #7118, optimum-intel #1877)."""
    long = replace(published.model, rope_scaling=YarnConfig())
    assert yarn_correction_range(long) == (10, 23)
    np.testing.assert_allclose(rope_frequencies(long).numpy(), published_yarn_frequencies(64), rtol=1e-6)
    root_t = 0.1 * math.log(40) + 1
    assert root_t == pytest.approx(1.3688879454, abs=1e-10)
    assert softmax_scale(long) == pytest.approx(0.1352337789, abs=1e-10)

    # The forward pass with it on: same pairs turned by the new angles, whole logits times sqrt(t) squared.
    config = replace(shrunk, model=replace(shrunk.model, qk_rope_head_dim=8, rope_scaling=YarnConfig()))
    m = config.model
    layer = watch(make_model(config), TokenBatch.from_rows(make_rows(config, num_rows=1)))[0]
    down = layer.weights["kv_a_proj_with_mqa.weight"][m.kv_lora_rank :]
    assert layer.scale == pytest.approx((m.qk_nope_head_dim + 8) ** -0.5 * root_t**2, rel=1e-12)
    frequencies = published_yarn_frequencies(8)
    assert frequencies[-1] == pytest.approx(plain_frequencies(8)[-1] / 40)
    for token, hidden in enumerate(layer.hidden):
        expected = turn(down @ hidden, position=token, frequencies=frequencies)
        np.testing.assert_allclose(layer.cached_rope_key[token], expected, **CLOSE)


def test_a_cache_keeps_576_numbers_a_token_and_layer_of_the_published_model(published, attention_layers, shrunk):
    """Catches: keys and values of every head kept instead of the latent; 70,272 bytes a token become megabytes."""
    kept = published.model.kv_lora_rank + published.model.qk_rope_head_dim
    assert kept == 576
    assert 2 * kept * published.model.num_hidden_layers == 70_272
    for layer in attention_layers:
        assert layer.cached_latent.shape[1] == shrunk.model.kv_lora_rank
        assert layer.cached_rope_key.shape[1] == shrunk.model.qk_rope_head_dim
