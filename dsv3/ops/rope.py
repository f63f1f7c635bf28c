"""Rotary position embedding with YaRN, in the published layout: dims (2k, 2k+1) are one rotating pair.

Source: report 4.3; YaRN (arXiv 2309.00071). Conventions that are often got wrong:

- The layout is interleaved. Implementations that put all even dims before all odd ones permute queries and keys alike,
  so scores agree, but a cache written by one cannot be read by the other.
- YaRN is a setting of the model, not of the length at hand: released weights use it at every position.
- `mscale` squared multiplies the whole attention logit (see `softmax_scale`), not cos and sin, when
  `mscale == mscale_all_dim`, as published.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dsv3.config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class Rotation:
    """Cosine and sine of every token's angles, made once a forward pass and shared by all layers."""

    cos: Float[Tensor, "token pair"]
    sin: Float[Tensor, "token pair"]


def rope_frequencies(config: ModelConfig) -> Float[Tensor, " pair"]:
    """Return the angle per position of each pair, in FP32: theta_k, or YaRN's mixture of theta_k and theta_k / s."""
    dim = config.qk_rope_head_dim
    # FP32 throughout, as the published code has it: at position 163,839 a frequency that is one bit off turns by 0.01.
    # On the CPU even where a model without memory is made: they are no weights.
    steps = torch.arange(dim // 2, dtype=torch.float32, device="cpu")
    frequencies = 1.0 / (config.rope_theta ** (2 * steps / dim))
    if config.rope_scaling is None:
        return frequencies
    low, high = yarn_correction_range(config)
    ramp = ((steps - low) / (high - low)).clamp(0, 1)
    return frequencies * (1 - ramp) + frequencies / config.rope_scaling.factor * ramp


def yarn_correction_range(config: ModelConfig) -> tuple[float, float]:
    """Return the pairs between which YaRN ramps: at or below the first unchanged, at or above the second divided by s.

    For the published model (10, 23). Source: YaRN's correction range, with the report's alpha = 1 and beta = 32.
    """
    yarn = config.rope_scaling
    assert yarn is not None
    dim = config.qk_rope_head_dim

    def pair_that_turns(rotations: float) -> float:
        wavelength = yarn.original_max_position_embeddings / (rotations * 2 * math.pi)
        return dim * math.log(wavelength) / (2 * math.log(config.rope_theta))

    low = max(math.floor(pair_that_turns(yarn.beta_fast)), 0)
    high = min(math.ceil(pair_that_turns(yarn.beta_slow)), dim - 1)
    return float(low), float(high) if high != low else high + 0.001


def yarn_mscale(*, factor: float, weight: float) -> float:
    """Return `0.1 * weight * ln(factor) + 1`: sqrt(t) of the report for weight 1."""
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def softmax_scale(config: ModelConfig) -> float:
    """Return what multiplies every attention logit: `1 / sqrt(d_h + d_h^R)` (eq. 10), times mscale^2 under YaRN."""
    scale = config.qk_head_dim**-0.5
    yarn = config.rope_scaling
    if yarn is None or yarn.mscale_all_dim == 0:
        return scale
    return scale * yarn_mscale(factor=yarn.factor, weight=yarn.mscale_all_dim) ** 2


def rope_amplitude(config: ModelConfig) -> float:
    """Return what multiplies cos and sin: under YaRN the ratio of both mscales, which published settings make 1."""
    yarn = config.rope_scaling
    if yarn is None:
        return 1.0
    return yarn_mscale(factor=yarn.factor, weight=yarn.mscale) / yarn_mscale(
        factor=yarn.factor, weight=yarn.mscale_all_dim
    )


def rotation_at(positions: Int[Tensor, " token"], *, frequencies: Float[Tensor, " pair"], amplitude: float) -> Rotation:
    """Return cosine and sine of `position * frequency`, in FP32, times `amplitude`."""
    angles = positions.to(torch.float32)[:, None] * frequencies[None, :]
    return Rotation(cos=angles.cos() * amplitude, sin=angles.sin() * amplitude)


def rotate(x: Float[Tensor, "token head rope"], *, rotation: Rotation) -> Float[Tensor, "token head rope"]:
    """Turn each adjacent pair of the last dim by its token's angle; computed in at least FP32."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    even, odd = wide.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = rotation.cos[:, None, :], rotation.sin[:, None, :]
    turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return turned.flatten(-2).to(x.dtype)
