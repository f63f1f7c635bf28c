"""E4M3 weights with one multiplier for each 128x128 block: how the released checkpoint stores its matrices.

The field is called `weight_scale_inv` and is the number to multiply by. Where a side of the matrix is no multiple of
128, the last block is smaller; nothing is padded in the file. Source: report 3.3.2 (weights are scaled in 128x128
blocks) and the published weight files.
"""

import torch
from jaxtyping import Float
from torch import Tensor

E4M3_MAX = 448.0
"""Largest finite value of torch.float8_e4m3fn."""


def blocks_of(shape: tuple[int, ...], *, block: tuple[int, int] = (128, 128)) -> tuple[int, int]:
    """Return how many blocks a matrix of the given shape has down and across, smaller ones at the edges included."""
    rows, columns = shape
    return -(-rows // block[0]), -(-columns // block[1])


def dequantise_blocks(
    weight: Float[Tensor, "row column"],
    *,
    scale_inv: Float[Tensor, "row_block column_block"],
    block: tuple[int, int] = (128, 128),
) -> Float[Tensor, "row column"]:
    """Return the matrix in FP32, each block times its multiplier; the product is exact but for its last rounding."""
    assert tuple(scale_inv.shape) == blocks_of(tuple(weight.shape), block=block)
    return weight.to(torch.float32) * _spread(scale_inv.to(torch.float32), over=weight, block=block)


def quantise_blocks(
    weight: Float[Tensor, "row column"], *, block: tuple[int, int] = (128, 128)
) -> tuple[Float[Tensor, "row column"], Float[Tensor, "row_block column_block"]]:
    """Return the matrix in E4M3, and the multiplier of each block: its largest magnitude over 448, in FP32."""
    wide = weight.to(torch.float32)
    down, across = blocks_of(tuple(weight.shape), block=block)
    padded = torch.zeros(down * block[0], across * block[1], device=weight.device)
    padded[: weight.shape[0], : weight.shape[1]] = wide.abs()
    largest = padded.unflatten(1, (across, block[1])).unflatten(0, (down, block[0])).amax(dim=(1, 3))
    # Not in the report: the smallest normal number as a floor, so that an all-zero block has a scale to divide by.
    scale_inv = (largest / E4M3_MAX).clamp_min(torch.finfo(torch.float32).tiny)
    quantised = wide / _spread(scale_inv, over=weight, block=block)
    return quantised.to(torch.float8_e4m3fn), scale_inv


def _spread(
    scale_inv: Float[Tensor, "row_block column_block"], *, over: Float[Tensor, "row column"], block: tuple[int, int]
) -> Float[Tensor, "row column"]:
    """Repeat each multiplier over its block, cut off at the edges of the matrix `over`."""
    rows, columns = over.shape
    return scale_inv.repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)[:, :columns]
