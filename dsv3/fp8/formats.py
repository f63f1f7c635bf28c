"""The number formats of the report's 3.3: which values they have, and how scales are chosen for them.

E4M3: 1 sign, 4 exponent and 3 mantissa bits, up to 448, no infinity. E5M2: up to 57,344. Both are torch's own types.
E5M6: 12 bits, for the one activation that FP8 would hurt (dsv3/fp8/e5m6.py).

A tile is quantised as `value / scale`, with the scale from the tile's largest magnitude, looked up at that moment
(no history of earlier steps). What happens at the edges of the number range, in every implementation alike:

- an all-zero tile has the scale 2^-100 and comes back as zeros;
- a tile below 448 * 2^-100 = 3.5e-28 shares that scale, so it is rounded more coarsely, in the end to zero;
- a tile with a NaN or an infinity in it comes back as NaN, all of it: a fault is spread, never hidden.
"""

import torch
from jaxtyping import Float
from torch import Tensor

TILE = 128
"""N_C: numbers that share a scale along the summed dim, and products summed before a promotion to FP32."""

E4M3_MAX = 448.0
E5M2_MAX = 57_344.0
"""Largest finite values of torch.float8_e4m3fn and torch.float8_e5m2."""
LARGEST = {torch.float8_e4m3fn: E4M3_MAX, torch.float8_e5m2: E5M2_MAX}

SMALLEST_SCALE = 2.0**-100
"""Not in the report: a floor, so that an all-zero tile has a scale to divide by and no product is subnormal."""

SCALE_LOW_BITS = 0xF
"""Not in the report: the lowest bits of a scale that are rounded up to zero.

A scale keeps 20 significant bits, so that its product with an E4M3 value of 4 bits is exact in FP32. Dequantising
then rounds nothing, and quantising the result again gives the very same bits.
"""
POWER_OF_TWO_LOW_BITS = 0x7F_FFFF


def is_fp8(x: Tensor) -> bool:
    """Whether a tensor's numbers have one byte, so that they mean nothing without their scales."""
    return x.dtype in LARGEST


def scale_for(
    largest: Float[Tensor, "*tile"], *, largest_of_format: float, power_of_two: bool
) -> Float[Tensor, "*tile"]:
    """Return the scale of tiles from their largest magnitudes: largest / largest_of_format, rounded up.

    To 20 significant bits, or with `power_of_two` to a power of two, which the report takes where a tensor will be
    quantised again in the other direction (3.3.2). NaN stays NaN and infinity stays infinite.
    """
    # On a GPU torch multiplies by the reciprocal of a number of the host, which is not division to the last bit.
    exact = largest.to(torch.float32) / torch.full((), largest_of_format, device=largest.device)
    low = POWER_OF_TWO_LOW_BITS if power_of_two else SCALE_LOW_BITS
    rounded = ((exact.view(torch.int32) + low) & ~low).view(torch.float32)
    return torch.where(exact.isfinite(), rounded, exact).clamp_min(SMALLEST_SCALE)
