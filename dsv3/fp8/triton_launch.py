"""Starts the Triton kernels: allocates their results, cuts the work into programs, and knows nothing of recipes.

Tensors without memory behind them (meta, FakeTensorMode) get results of the right shape, type and device and no kernel
runs, so that a whole model can be traced where there is no GPU. Scales of 1 x 128 tiles lie tile by tile, not row by
row: that is how products read them, ours and cuBLAS's.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from dsv3.fp8 import triton_kernels
from dsv3.fp8.e5m6 import E5M6_MAX, PackedE5M6
from dsv3.fp8.formats import LARGEST, TILE
from dsv3.fp8.kernels import OverTokens, group_tiles
from dsv3.fp8.quantise import Form, Quantised, tiles_of
from dsv3.fp8.triton_kernels import TensorDescriptor
from dsv3.native.triton_start import start_kernel

BLOCK_ROWS = 32
"""Rows of 128 numbers that one program quantises: 32 numbers a thread."""
BLOCK_ROWS_E5M6 = 8
"""The same where numbers are packed into words: with 32, a third as fast on an H200."""
BLOCK_COLUMNS = 32
"""Columns of 128 tokens that one program quantises and turns."""


@dataclass(frozen=True, kw_only=True)
class TokenTiles(OverTokens):
    """`OverTokens` whose every tile takes 128 columns of `values`, filled up with zeros.

    So no group of tokens begins at an address that the tensor core's copies cannot start from. `values` is longer than
    the tokens; `group` returns what it returns elsewhere.
    """

    def group(self, index: int) -> Quantised:
        """Return the columns of one group of rows, as an operand whose depth is its tokens."""
        tiles = [-(-rows // self.tile) for rows in self.rows_per_group]
        first, rows = sum(tiles[:index]), self.rows_per_group[index]
        values = self.values[:, first * self.tile : first * self.tile + rows]
        return Quantised(values=values, scales=self.scales[:, first : first + tiles[index]], tile=(1, self.tile))


@dataclass(frozen=True, kw_only=True)
class Operand:
    """An operand of a product as the kernel reads it: K-major bytes, one scale for each 128 of depth."""

    values: Float[Tensor, "*group row depth"]
    scales: Float[Tensor, "*group row_tile depth_tile"]
    tile_rows: int
    """Rows that share a scale: 1 or 128."""


def quantise_rows(x: Float[Tensor, "row column"], *, form: Form) -> Quantised:
    """Return a matrix in 1 x 128 tiles."""
    rows, columns = x.shape
    values = torch.empty(rows, columns, dtype=form.dtype, device=x.device)
    scales = _scales_by_tile(rows, columns, device=x.device)
    start_kernel(
        triton_kernels.quantise_rows,
        (-(-rows // BLOCK_ROWS), scales.shape[1]),
        x, values, scales, rows, columns, *x.stride(), *scales.stride(),
        largest_of_format=LARGEST[form.dtype], power_of_two=form.power_of_two, block_rows=BLOCK_ROWS,
    )  # fmt: skip
    return Quantised(values=values, scales=scales, tile=(1, TILE))


def quantise_swiglu(
    gate_up: Float[Tensor, "row twice_width"], *, factors: Float[Tensor, " row"] | None, form: Form
) -> Quantised:
    """Return silu(gate) * up * factor in 1 x 128 tiles, where `gate_up` holds gate and up side by side."""
    gate_up = gate_up if gate_up.stride(1) == 1 else gate_up.contiguous()
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    values = torch.empty(rows, width, dtype=form.dtype, device=gate_up.device)
    scales = _scales_by_tile(rows, width, device=gate_up.device)
    start_kernel(
        triton_kernels.quantise_swiglu,
        (-(-rows // BLOCK_ROWS), scales.shape[1]),
        gate_up, scales if factors is None else factors.contiguous(), values, scales, rows, width, gate_up.stride(0),
        *scales.stride(),
        has_factors=factors is not None, largest_of_format=LARGEST[form.dtype], power_of_two=form.power_of_two,
        block_rows=BLOCK_ROWS,
    )  # fmt: skip
    return Quantised(values=values, scales=scales, tile=(1, TILE))


def quantise_blocks(x: Float[Tensor, "matrix row column"], *, form: Form) -> Quantised:
    """Return matrices in 128 x 128 blocks."""
    matrices, rows, columns = x.shape
    down, across = tiles_of(rows, columns, tile=(TILE, TILE))
    values = torch.empty(matrices, rows, columns, dtype=form.dtype, device=x.device)
    scales = torch.empty(matrices, down, across, device=x.device)
    start_kernel(
        triton_kernels.quantise_blocks,
        (down, across, matrices),
        x, values, scales, rows, columns, *x.stride(),
        largest_of_format=LARGEST[form.dtype], power_of_two=form.power_of_two, num_warps=8,
    )  # fmt: skip
    return Quantised(values=values, scales=scales, tile=(TILE, TILE))


def quantise_over_tokens(
    x: Float[Tensor, "row column"] | Quantised, *, form: Form, rows_per_group: Sequence[int]
) -> TokenTiles:
    """Return the transpose of rows, or of rows in 1 x 128 tiles, quantised along the tokens, group by group."""
    rows, of_rows = (x.values, x.scales) if isinstance(x, Quantised) else (x, x)
    columns = rows.shape[1]
    starts = group_tiles(rows_per_group)
    tiles = len(starts) - 1
    values = torch.empty(columns, tiles * TILE, dtype=form.dtype, device=rows.device)
    scales = _scales_by_tile(columns, tiles * TILE, device=rows.device)
    start_kernel(
        triton_kernels.quantise_over_tokens,
        (tiles, -(-columns // BLOCK_COLUMNS)),
        rows, of_rows, on_device(starts, rows.device), values, scales, columns, tiles, *rows.stride(),
        *of_rows.stride(),
        is_quantised=isinstance(x, Quantised), largest_of_format=LARGEST[form.dtype], power_of_two=form.power_of_two,
        block_columns=BLOCK_COLUMNS,
    )  # fmt: skip
    return TokenTiles(values=values, scales=scales, tile=TILE, rows_per_group=tuple(rows_per_group))


def dequantise(x: Quantised, *, dtype: torch.dtype = torch.float32) -> Float[Tensor, "*batch row column"]:
    """Return matrices whose tiles are 1 or 128 high and 128 wide."""
    values, scales = x.values.reshape(-1, *x.values.shape[-2:]), x.scales.reshape(-1, *x.scales.shape[-2:])
    matrices, rows, columns = values.shape
    output = torch.empty(x.values.shape, dtype=dtype, device=values.device)
    start_kernel(
        triton_kernels.dequantise_tiles,
        (-(-rows // BLOCK_ROWS), -(-columns // TILE), matrices),
        values, scales, output, rows, columns, *values.stride(), *scales.stride(),
        tile_rows=x.tile[0], block_rows=BLOCK_ROWS,
    )  # fmt: skip
    return output


def quantise_e5m6(x: Float[Tensor, "row column"]) -> PackedE5M6:
    """Return a matrix in E5M6."""
    rows, columns = x.shape
    words = torch.empty(rows, -(-columns // 8) * 3, dtype=torch.int32, device=x.device)
    scales = torch.empty(rows, -(-columns // TILE), device=x.device)
    start_kernel(
        triton_kernels.quantise_e5m6,
        (-(-rows // BLOCK_ROWS_E5M6), scales.shape[1]),
        x, words, scales, rows, columns, *x.stride(), words.stride(0), *scales.stride(),
        largest_of_format=E5M6_MAX, block_rows=BLOCK_ROWS_E5M6,
    )  # fmt: skip
    packed = words.view(torch.uint8)[:, : -(-columns // 2) * 3]
    return PackedE5M6(packed=packed, scales=scales, columns=columns)


def dequantise_e5m6(x: PackedE5M6, *, dtype: torch.dtype = torch.float32) -> Float[Tensor, "row column"]:
    """Return a matrix from E5M6."""
    packed, rows = x.packed, x.packed.shape[0]
    output = torch.empty(rows, x.columns, dtype=dtype, device=packed.device)
    start_kernel(
        triton_kernels.dequantise_e5m6,
        (-(-rows // BLOCK_ROWS), x.scales.shape[1]),
        packed, x.scales, output, rows, x.columns, packed.stride(0), *x.scales.stride(),
        block_rows=BLOCK_ROWS,
    )  # fmt: skip
    return output


@dataclass(frozen=True, kw_only=True)
class ProductShape:
    """How a product is cut: the block of output that one program makes, and on what."""

    block_rows: int
    block_columns: int
    num_warps: int
    num_stages: int


WIDE = ProductShape(block_rows=128, block_columns=128, num_warps=8, num_stages=4)
"""Two warpgroups of 64 rows each: one promotes while the other multiplies (report 3.3.2)."""
LOW = ProductShape(block_rows=64, block_columns=128, num_warps=4, num_stages=4)
"""For groups of at most 64 rows, as in decoding."""
OVER_TOKENS = ProductShape(block_rows=64, block_columns=128, num_warps=4, num_stages=3)
"""For Wgrad, whose promotion is twice the work: three programs on a multiprocessor take turns."""
COPY_BYTES = 16
"""Rows of operands begin at multiples of so many bytes: what the copies of a GPU ask for."""


def turn(values: Float[Tensor, "*group row column"]) -> Float[Tensor, "*group row column"]:
    """Return FP8 matrices row by row that lie column by column."""
    matrices = values.reshape(-1, *values.shape[-2:])
    count, rows, columns = matrices.shape
    output = torch.empty(values.shape, dtype=values.dtype, device=values.device)
    start_kernel(
        triton_kernels.turn,
        (-(-rows // TILE), -(-columns // TILE), count),
        matrices.view(torch.uint8), output.view(torch.uint8), rows, columns, matrices.stride(0), matrices.stride(2),
        num_warps=8,
    )  # fmt: skip
    return output


def multiply(
    rows: Operand, *, weight: Operand, rows_per_group: Sequence[int], dtype: torch.dtype = torch.float32
) -> Float[Tensor, "row column"]:
    """Return `rows @ weight[g].T` with the group g of each row; the sum is promoted every 128 of depth."""
    shape = LOW if max(rows_per_group, default=0) <= LOW.block_rows else WIDE
    columns, depth = weight.values.shape[1:]
    output = torch.empty(rows.values.shape[0], columns, dtype=dtype, device=rows.values.device)
    if not (output.numel() and depth):
        return output.zero_()
    tiles = row_tiles(tuple(rows_per_group), height=shape.block_rows, device=output.device)
    start_kernel(
        triton_kernels.multiply_groups,
        (len(tiles) * -(-columns // shape.block_columns),),
        _reader(rows.values, height=shape.block_rows), _reader(weight.values, height=shape.block_columns),
        rows.scales, weight.scales, tiles, output, len(tiles), columns, -(-depth // TILE),
        *rows.scales.stride(), *weight.scales.stride(),
        a_tile_rows=rows.tile_rows, b_tile_rows=weight.tile_rows,
        block_rows=shape.block_rows, block_columns=shape.block_columns,
        num_warps=shape.num_warps, num_stages=shape.num_stages,
    )  # fmt: skip
    return output


def weight_gradients(slopes: TokenTiles, *, rows: TokenTiles) -> Float[Tensor, "group out in"]:
    """Return `slopes_g @ rows_g.T` in FP32 for each group g of tokens; zeros for an empty one."""
    groups, outs, ins = len(rows.rows_per_group), slopes.values.shape[0], rows.values.shape[0]
    output = torch.empty(groups, outs, ins, device=rows.values.device)
    first = [0]
    for count in rows.rows_per_group:
        first.append(first[-1] + -(-count // TILE))
    if not (first[-1] and outs and ins):
        return output.zero_()
    start_kernel(
        triton_kernels.multiply_over_tokens,
        (-(-outs // OVER_TOKENS.block_rows), -(-ins // OVER_TOKENS.block_columns), groups),
        _reader(slopes.values, height=OVER_TOKENS.block_rows), _reader(rows.values, height=OVER_TOKENS.block_columns),
        slopes.scales, rows.scales, on_device(first, output.device), output, outs, ins,
        *slopes.scales.stride(), *rows.scales.stride(),
        block_rows=OVER_TOKENS.block_rows, block_columns=OVER_TOKENS.block_columns,
        num_warps=OVER_TOKENS.num_warps, num_stages=OVER_TOKENS.num_stages,
    )  # fmt: skip
    return output


def _reader(values: Float[Tensor, "*group row depth"], *, height: int) -> TensorDescriptor:
    """Return what reads tiles of `height` rows and 128 of depth; rows of all groups lie one below the other."""
    matrix = values.flatten(0, -2)
    if matrix.stride(0) % COPY_BYTES:
        matrix = nn.functional.pad(matrix.view(torch.uint8), (0, -matrix.shape[1] % COPY_BYTES)).view(values.dtype)
    return TensorDescriptor.from_tensor(matrix, [height, TILE])


@lru_cache(maxsize=64)
def row_tiles(rows_per_group: tuple[int, ...], *, height: int, device: torch.device) -> Int[Tensor, "tile 3"]:
    """Return (group, first row, end of the group's rows) of every tile of rows; empty groups have none.

    Kept, since every product of a layer's experts has the same, and it takes longer to make than many a product.
    """
    tiles, begin = [], 0
    for group, count in enumerate(rows_per_group):
        tiles += [(group, row, begin + count) for row in range(begin, begin + count, height)]
        begin += count
    return on_device(tiles, device)


def on_device(numbers: Sequence[Any], device: torch.device) -> Tensor:
    """Return whole numbers as a tensor there, without waiting for what the device is doing."""
    return torch.tensor(numbers, dtype=torch.int32).to(device, non_blocking=True)


def _scales_by_tile(rows: int, columns: int, *, device: torch.device) -> Float[Tensor, "row tile"]:
    return torch.empty(-(-columns // TILE), rows, device=device).mT
