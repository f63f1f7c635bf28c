"""Golden test 3 of the fact sheet: YaRN's constants, and the interleaved layout."""

import math

import pytest
import torch

from dsv3.config import ModelConfig, YarnConfig
from dsv3.ops.rope import (
    rope_amplitude,
    rope_frequencies,
    rotate,
    rotation_at,
    softmax_scale,
    yarn_correction_range,
    yarn_mscale,
)

V3 = ModelConfig(rope_scaling=YarnConfig())


def test_published_correction_range_is_10_to_23():
    assert yarn_correction_range(V3) == (10, 23)


def test_published_mscale_and_softmax_scale():
    assert yarn_mscale(factor=40.0, weight=1.0) == pytest.approx(1.3688879454, abs=1e-10)
    assert softmax_scale(V3) == pytest.approx(0.1352337789, abs=1e-10)
    assert softmax_scale(ModelConfig()) == pytest.approx(0.0721687836, abs=1e-10)
    lite = ModelConfig(rope_scaling=YarnConfig(mscale=0.707, mscale_all_dim=0.707))
    assert softmax_scale(lite) == pytest.approx(0.1147213867, abs=1e-10)


def test_frequencies_up_to_pair_10_are_unchanged_and_from_23_divided_by_40():
    plain, yarn = rope_frequencies(ModelConfig()), rope_frequencies(V3)
    assert torch.equal(plain[:11], yarn[:11])
    torch.testing.assert_close(yarn[23:], plain[23:] / 40)
    theta_16 = 10_000 ** (-2 * 16 / 64)
    ramp = (16 - 10) / 13
    assert yarn[16].item() == pytest.approx(theta_16 * (1 - ramp) + theta_16 / 40 * ramp, rel=1e-6)


def test_rotation_is_multiplication_by_a_unit_complex_number_of_adjacent_dims():
    x = torch.randn(5, 3, 64, dtype=torch.float64)
    positions = torch.tensor([0, 1, 7, 4095, 163_839])
    frequencies = rope_frequencies(V3)
    turned = rotate(x, rotation=rotation_at(positions, frequencies=frequencies, amplitude=1.0))
    angles = (positions[:, None].float() * frequencies).double()
    unit = torch.polar(torch.ones_like(angles), angles)
    expected = torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * unit[:, None, :]).flatten(-2)
    torch.testing.assert_close(turned, expected, atol=2e-6, rtol=1e-6)  # cos and sin are FP32, as published


def test_interleaved_scores_equal_half_split_scores():
    """Permuting the dims of query and key alike, as implementations with halves do, leaves the scores as they are."""
    query, key = torch.randn(2, 4, 1, 64, dtype=torch.float64)
    positions = torch.tensor([0, 3, 9, 4000])
    rotation = rotation_at(positions, frequencies=rope_frequencies(V3), amplitude=rope_amplitude(V3))
    scores = rotate(query, rotation=rotation)[:, 0] @ rotate(key, rotation=rotation)[:, 0].T

    cos, sin = (x.double().repeat(1, 2) for x in (rotation.cos, rotation.sin))

    def halves(x):
        split = torch.cat((x[:, 0, 0::2], x[:, 0, 1::2]), dim=-1)
        swapped = torch.cat((-split[:, 32:], split[:, :32]), dim=-1)
        return split * cos + swapped * sin

    torch.testing.assert_close(scores, halves(query) @ halves(key).T)


def test_scores_depend_on_the_distance_alone():
    config = ModelConfig()
    query, key = torch.randn(2, 1, 1, 64, dtype=torch.float64)

    def score(at_query, at_key):
        def turned(x, position):
            rotation = rotation_at(torch.tensor([position]), frequencies=rope_frequencies(config), amplitude=1.0)
            return rotate(x, rotation=rotation)[0, 0]

        return (turned(query, at_query) @ turned(key, at_key)).item()

    assert score(17, 5) == pytest.approx(score(112, 100), rel=1e-4)


def test_unequal_mscales_scale_cos_and_sin():
    yarn = YarnConfig(mscale=1.0, mscale_all_dim=0.0)
    assert rope_amplitude(ModelConfig(rope_scaling=yarn)) == pytest.approx(0.1 * math.log(40) + 1)
    rotation = rotation_at(torch.tensor([0]), frequencies=rope_frequencies(V3), amplitude=1.5)
    assert rotation.cos[0, 0].item() == 1.5
    assert softmax_scale(ModelConfig(rope_scaling=yarn)) == pytest.approx(192**-0.5)
