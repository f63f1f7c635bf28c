"""FP8 arithmetic on a GPU: cuBLAS through torch's `scaled_mm` where it serves, our Triton kernels for all else.

torch's grouped product knows no block scales, so products of experts are always ours. What neither serves (a tile other
than the report's, the emulation of a narrow accumulator) takes the plain form, with the same results.
"""

from collections.abc import Sequence
from functools import cache

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from dsv3.errors import ConfigError
from dsv3.fp8 import triton_launch
from dsv3.fp8.e5m6 import PackedE5M6
from dsv3.fp8.formats import TILE
from dsv3.fp8.gemm import Accumulator
from dsv3.fp8.kernels import OverTokens, PlainKernels
from dsv3.fp8.quantise import Form, Quantised
from dsv3.fp8.triton_launch import Operand, TokenTiles

ROWS, BLOCKS = (1, TILE), (TILE, TILE)
FIRST_CUDA = (12, 9)
"""The first CUDA whose cuBLAS has block scales."""


class GpuKernels(PlainKernels):
    """FP8 arithmetic on a GPU. `scaled_mm` says whether torch's product is taken; None: where this GPU has it.

    Raises:
        ConfigError: the GPU here is older than Hopper.
    """

    def __init__(self, *, scaled_mm: bool | None = None) -> None:
        refuse_older_gpus()
        why_not = why_no_scaled_mm() if scaled_mm is None else None if scaled_mm else "switched off"
        self.scaled_mm = why_not is None
        self.name = (
            "torch's scaled_mm (cuBLAS), Triton for experts and quantising"
            if why_not is None
            else f"Triton (no scaled_mm: {why_not})"
        )

    def quantise(self, x: Float[Tensor, "*batch row column"], *, form: Form) -> Quantised:
        """Return matrices in FP8."""
        if form.tile == ROWS:
            made = triton_launch.quantise_rows(x.flatten(0, -2), form=form)
            scales = made.scales.unflatten(0, x.shape[:-1])
        elif form.tile == BLOCKS:
            made = triton_launch.quantise_blocks(x.reshape(-1, *x.shape[-2:]), form=form)
            scales = made.scales.view(*x.shape[:-2], *made.scales.shape[1:])
        else:
            return super().quantise(x, form=form)
        return Quantised(values=made.values.view(x.shape), scales=scales, tile=form.tile)

    def quantise_swiglu(
        self, gate_up: Float[Tensor, "row twice_width"], *, factors: Float[Tensor, " row"] | None, form: Form
    ) -> Quantised:
        """Return silu(gate) * up * factor in FP8 without storing it; gate and up lie side by side in `gate_up`."""
        assert form.tile == ROWS
        return triton_launch.quantise_swiglu(gate_up, factors=factors, form=form)

    def dequantise(self, x: Quantised) -> Float[Tensor, "*batch row column"]:
        """Return the matrices in FP32, exactly."""
        if x.tile not in (ROWS, BLOCKS):
            return super().dequantise(x)
        return triton_launch.dequantise(x)

    def quantise_over_tokens(
        self, x: Float[Tensor, "row column"], *, form: Form, rows_per_group: Sequence[int]
    ) -> OverTokens:
        """Turn and quantise in one pass over x."""
        if form.tile != ROWS:
            return super().quantise_over_tokens(x, form=form, rows_per_group=rows_per_group)
        return triton_launch.quantise_over_tokens(x, form=form, rows_per_group=rows_per_group)

    def requantise_over_tokens(self, x: Quantised, *, form: Form, rows_per_group: Sequence[int]) -> OverTokens:
        """Dequantise, turn and quantise in one pass over x."""
        if form.tile != ROWS or x.tile != ROWS:
            return super().requantise_over_tokens(x, form=form, rows_per_group=rows_per_group)
        return triton_launch.quantise_over_tokens(x, form=form, rows_per_group=rows_per_group)

    def multiply(
        self,
        rows: Quantised,
        *,
        weight: Quantised,
        rows_per_group: Sequence[int],
        accumulator: Accumulator | None,
        dtype: torch.dtype = torch.float32,
    ) -> Float[Tensor, "row column"]:
        """Multiply with FP8 tensor cores; an emulated accumulator takes the plain form."""
        a, b = as_operand(rows), as_operand(weight)
        if accumulator is not None or a is None or b is None:
            return super().multiply(
                rows, weight=weight, rows_per_group=rows_per_group, accumulator=accumulator, dtype=dtype
            )
        if self.scaled_mm and len(rows_per_group) == 1:
            matrix = Operand(values=b.values[0], scales=b.scales[0], tile_rows=b.tile_rows)
            if fits_scaled_mm(a, matrix):
                return multiply_by_torch(a, matrix, dtype=dtype)
        return triton_launch.multiply(a, weight=b, rows_per_group=rows_per_group, dtype=dtype)

    def weight_gradients(
        self, slopes: OverTokens, *, rows: OverTokens, accumulator: Accumulator | None
    ) -> Float[Tensor, "group out in"]:
        """Multiply with FP8 tensor cores; an emulated accumulator takes the plain form."""
        if accumulator is not None or not (isinstance(slopes, TokenTiles) and isinstance(rows, TokenTiles)):
            return super().weight_gradients(slopes, rows=rows, accumulator=accumulator)
        if self.scaled_mm and len(rows.rows_per_group) == 1:
            a, b = (Operand(values=x.values, scales=x.scales, tile_rows=1) for x in (slopes, rows))
            if fits_scaled_mm(a, b):
                return multiply_by_torch(a, b)[None]
        return triton_launch.weight_gradients(slopes, rows=rows)

    def quantise_e5m6(self, x: Float[Tensor, "row column"]) -> PackedE5M6:
        """Return a matrix in E5M6."""
        return triton_launch.quantise_e5m6(x)

    def dequantise_e5m6(self, x: PackedE5M6) -> Float[Tensor, "row column"]:
        """Return the matrix in FP32, exactly."""
        return triton_launch.dequantise_e5m6(x)


def refuse_older_gpus() -> None:
    """Raise unless the GPU here multiplies FP8 from as much shared memory as our kernels take, 128 KiB."""
    if not torch.cuda.is_available():
        return
    major, minor = torch.cuda.get_device_capability()
    if major < 9:
        raise ConfigError(
            f"FP8 was asked of {torch.cuda.get_device_name()}, whose compute capability is {major}.{minor}; it takes "
            "9.0 (H100) or later. precision.recipe = 'original' trains in BF16"
        )


@cache
def why_no_scaled_mm() -> str | None:
    """Return why torch's `scaled_mm` has no block scales here, or None if it has them."""
    if torch.version.cuda is None:
        return "this build of torch has no CUDA"
    if tuple(map(int, torch.version.cuda.split(".")[:2])) < FIRST_CUDA:
        return f"block scales need CUDA 12.9, torch was built with {torch.version.cuda}"
    if not torch.cuda.is_available():
        return "there is no GPU here"
    major, minor = torch.cuda.get_device_capability()
    return None if major == 9 else f"cuBLAS has block scales on Hopper (9.0) only, and this GPU is {major}.{minor}"


def as_operand(x: Quantised) -> Operand | None:
    """Return x as our products read it, K-major, or None for tiles that they do not know.

    FP8 tensor cores of Hopper read both operands along the depth, so a transposed view is copied: its bytes, once a
    product. The one scale of a whole matrix stands for the scale of each tile.
    """
    rows, depth = x.values.shape[-2:]
    scales, (height, width) = x.scales, x.tile
    if width != TILE:
        if scales.shape[-1] != 1:
            return None
        scales = scales.expand(*scales.shape[:-1], -(-depth // TILE))
    if height not in (1, TILE):
        if scales.shape[-2] != 1:
            return None
        scales, height = scales.expand(*scales.shape[:-2], rows, scales.shape[-1]), 1
    values = x.values if x.values.stride(-1) == 1 else triton_launch.turn(x.values)
    return Operand(values=values, scales=scales, tile_rows=height)


def fits_scaled_mm(a: Operand, b: Operand) -> bool:
    """Whether torch multiplies these: E4M3, one scale a row of a, whole tiles and blocks, columns of 16 bytes.

    torch itself asks for multiples of 16 only. Not asked for by it, but by us: whole tiles of depth and whole blocks,
    which not all of its versions can do without, and rows in multiples of 4, so that the scales of every tile of `a`
    start at 16 bytes as those of `b` must.
    """
    (rows, depth), columns = a.values.shape, b.values.shape[0]
    e4m3 = a.values.dtype == b.values.dtype == torch.float8_e4m3fn
    whole = depth % TILE == 0 and columns % max(16, b.tile_rows) == 0 and rows % 4 == 0
    return e4m3 and whole and a.tile_rows == 1 and rows > 0 and depth > 0


def multiply_by_torch(a: Operand, b: Operand, *, dtype: torch.dtype = torch.float32) -> Float[Tensor, "row column"]:
    """Return a @ b.T by cuBLAS, which wants scales of rows lying tile by tile.

    Those of blocks it wants lying block row by block row, each row of them filled up to a multiple of 4.
    """
    if b.tile_rows == TILE:
        b_scales = F.pad(b.scales, (0, -b.scales.shape[1] % 4)).contiguous().T
        b_recipe = F.ScalingType.BlockWise128x128
    else:
        b_scales, b_recipe = tile_by_tile(b.scales), F.ScalingType.BlockWise1x128
    return F.scaled_mm(
        a.values.contiguous(),
        b.values.contiguous().T,
        scale_a=tile_by_tile(a.scales),
        scale_recipe_a=F.ScalingType.BlockWise1x128,
        scale_b=b_scales,
        scale_recipe_b=b_recipe,
        output_dtype=dtype,
    )


def tile_by_tile(scales: Float[Tensor, "row tile"]) -> Float[Tensor, "row tile"]:
    """Return the same scales, in memory one column after the other."""
    if scales.stride() == (1, scales.shape[0]):
        return scales
    return torch.empty_like(scales.mT, memory_format=torch.contiguous_format).mT.copy_(scales)
