"""E5M6: 12 bits for the input of o_proj, which the backward pass of attention reads as well (report 3.3.3).

1 sign, 5 exponent and 6 mantissa bits; the exponent bias is unpublished: 15 here, as in FP16, with subnormals, and
without infinity or NaN of its own. A tile of 128 shares a power of two as scale. Two numbers lie in three bytes.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from dsv3.fp8.formats import TILE, scale_for
from dsv3.fp8.quantise import largest_in_tiles, spread

E5M6_MAX = 2.0**15 * (2 - 2.0**-6)
SMALLEST_EXPONENT = -14
"""Of normal numbers; below it the step stays 2^-20."""


@dataclass(frozen=True, kw_only=True)
class PackedE5M6:
    """A matrix of E5M6 numbers with a scale for each 1 x 128 tile."""

    packed: UInt8[Tensor, "row bytes"]
    """Three bytes for two columns: low eight bits of the first, its high four with the second's low four, the rest."""
    scales: Float[Tensor, "row column_tile"]
    columns: int


def quantise_e5m6(x: Float[Tensor, "row column"]) -> PackedE5M6:
    """Return x in E5M6. A tile with NaN or infinity in it comes back as NaN, all of it."""
    rows, columns = x.shape
    largest = largest_in_tiles(x, tile=(1, TILE))
    scales = scale_for(largest, largest_of_format=E5M6_MAX, power_of_two=True)
    scaled = x.to(torch.float32) / spread(scales, rows=rows, columns=columns, tile=(1, TILE))
    return PackedE5M6(packed=_pack(_codes(round_to_e5m6(scaled))), scales=scales, columns=columns)


def dequantise_e5m6(x: PackedE5M6) -> Float[Tensor, "row column"]:
    """Return the matrix in FP32, exactly."""
    values = _values(_unpack(x.packed, columns=x.columns))
    return values * spread(x.scales, rows=values.shape[0], columns=x.columns, tile=(1, TILE))


def round_to_e5m6(x: Float[Tensor, "row column"]) -> Float[Tensor, "row column"]:
    """Return the nearest number that E5M6 has, ties to even, for magnitudes up to its largest; NaN stays."""
    exponent = (x.view(torch.int32) >> 23 & 0xFF) - 127
    step = torch.ldexp(torch.ones_like(x), exponent.clamp_min(SMALLEST_EXPONENT) - 6)
    return torch.round(x / step) * step


def _codes(exact: Tensor) -> Tensor:
    """Return the 12 bits of numbers that E5M6 has: those of FP16 without its lowest four, which are zero."""
    return exact.to(torch.float16).view(torch.int16).to(torch.int32) >> 4 & 0xFFF


def _values(codes: Tensor) -> Tensor:
    return (codes << 4).to(torch.int16).view(torch.float16).to(torch.float32)


def _pack(codes: Tensor) -> Tensor:
    padded = torch.nn.functional.pad(codes, (0, codes.shape[1] % 2)).unflatten(1, (-1, 2))
    first, second = padded.unbind(-1)
    packed = torch.stack((first & 0xFF, first >> 8 | (second & 0xF) << 4, second >> 4), dim=-1)
    return packed.to(torch.uint8).flatten(1)


def _unpack(packed: Tensor, *, columns: int) -> Tensor:
    low, middle, high = packed.to(torch.int32).unflatten(1, (-1, 3)).unbind(-1)
    return torch.stack((low | (middle & 0xF) << 8, middle >> 4 | high << 4), dim=-1).flatten(1)[:, :columns]
