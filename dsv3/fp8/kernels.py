"""What FP8 training asks of a device, and the plain form that any device can run.

Three implementations: `PlainKernels` here, written as the formulas read; `CpuKernels` (cpu.py); `GpuKernels` (gpu.py).
`choose.py: kernels_for` picks by device. Rows of several experts lie end to end; a plain Linear is one group of rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from dsv3.fp8.e5m6 import PackedE5M6, dequantise_e5m6, quantise_e5m6
from dsv3.fp8.formats import TILE
from dsv3.fp8.gemm import Accumulator, multiply
from dsv3.fp8.quantise import Form, Quantised, dequantise, quantise


@dataclass(frozen=True, kw_only=True)
class OverTokens:
    """The transpose of rows of tokens, quantised along the tokens: 128 x 1 of the rows, 1 x 128 of this.

    Both operands of Wgrad are of this kind. A tile never crosses from one expert's rows to the next's.
    """

    values: Float[Tensor, "column row"]
    scales: Float[Tensor, "column tile"]
    """All tiles of the first group, then those of the second, and so on."""
    tile: int
    """Tokens that share a scale; fewer at the end of a group."""
    rows_per_group: tuple[int, ...]

    def group(self, index: int) -> Quantised:
        """Return the columns of one group of rows, as an operand whose depth is its tokens."""
        row = sum(self.rows_per_group[:index])
        first = sum(-(-rows // self.tile) for rows in self.rows_per_group[:index])
        rows = self.rows_per_group[index]
        return Quantised(
            values=self.values[:, row : row + rows],
            scales=self.scales[:, first : first + -(-rows // self.tile)],
            tile=(1, self.tile),
        )


@runtime_checkable
class Kernels(Protocol):
    """One implementation of FP8 arithmetic. All agree on every quantised bit, and on products but for FP32 rounding."""

    name: str
    """What the log calls it."""

    def quantise(self, x: Float[Tensor, "*batch row column"], *, form: Form) -> Quantised:
        """Return matrices in FP8."""
        ...

    def dequantise(self, x: Quantised) -> Float[Tensor, "*batch row column"]:
        """Return the matrices in FP32, exactly."""
        ...

    def quantise_over_tokens(
        self, x: Float[Tensor, "row column"], *, form: Form, rows_per_group: Sequence[int]
    ) -> OverTokens:
        """Return the transpose of x, quantised along the tokens, group by group. `form.tile` is (1, n) or None."""
        ...

    def requantise_over_tokens(self, x: Quantised, *, form: Form, rows_per_group: Sequence[int]) -> OverTokens:
        """Return what was kept in 1 x 128 tiles in 128 x 1 tiles: dequantise, transpose, quantise (report 3.5.2)."""
        ...

    def multiply(
        self,
        rows: Quantised,
        *,
        weight: Quantised,
        rows_per_group: Sequence[int],
        accumulator: Accumulator | None,
        dtype: torch.dtype = torch.float32,
    ) -> Float[Tensor, "row column"]:
        """Return `rows @ weight[g].T` with the group g of each row; `weight` is group x column x depth.

        Sums are FP32, and rounded once to `dtype`.
        """
        ...

    def weight_gradients(
        self, slopes: OverTokens, *, rows: OverTokens, accumulator: Accumulator | None
    ) -> Float[Tensor, "group out in"]:
        """Return `slopes_g @ rows_g.T` in FP32 for each group g of rows; zeros for an empty one."""
        ...

    def quantise_e5m6(self, x: Float[Tensor, "row column"]) -> PackedE5M6:
        """Return a matrix in E5M6."""
        ...

    def dequantise_e5m6(self, x: PackedE5M6) -> Float[Tensor, "row column"]:
        """Return the matrix in FP32, exactly."""
        ...


class PlainKernels:
    """FP8 arithmetic in plain PyTorch."""

    name = "plain PyTorch"

    def quantise(self, x: Float[Tensor, "*batch row column"], *, form: Form) -> Quantised:
        """Return matrices in FP8."""
        return quantise(x, form=form)

    def dequantise(self, x: Quantised) -> Float[Tensor, "*batch row column"]:
        """Return the matrices in FP32."""
        return dequantise(x)

    def quantise_over_tokens(
        self, x: Float[Tensor, "row column"], *, form: Form, rows_per_group: Sequence[int]
    ) -> OverTokens:
        """Quantise the transpose of each group of rows by itself."""
        groups = [self.quantise(part.T, form=form) for part in x.split(list(rows_per_group))]
        return OverTokens(
            values=torch.cat([group.values for group in groups], dim=1),
            scales=torch.cat([group.scales.expand(x.shape[1], -1) for group in groups], dim=1),
            tile=form.tile_of(1, max(rows_per_group, default=1))[1],
            rows_per_group=tuple(rows_per_group),
        )

    def requantise_over_tokens(self, x: Quantised, *, form: Form, rows_per_group: Sequence[int]) -> OverTokens:
        """Dequantise, transpose, quantise."""
        return self.quantise_over_tokens(self.dequantise(x), form=form, rows_per_group=rows_per_group)

    def multiply(
        self,
        rows: Quantised,
        *,
        weight: Quantised,
        rows_per_group: Sequence[int],
        accumulator: Accumulator | None,
        dtype: torch.dtype = torch.float32,
    ) -> Float[Tensor, "row column"]:
        """Multiply group by group."""
        output = torch.empty(rows.values.shape[0], weight.values.shape[-2], dtype=dtype, device=rows.values.device)
        start = 0
        for group, count in enumerate(rows_per_group):
            if count:
                part = slice_rows(rows, start=start, count=count)
                output[start : start + count] = multiply(part, weight[group], accumulator=accumulator)
            start += count
        return output

    def weight_gradients(
        self, slopes: OverTokens, *, rows: OverTokens, accumulator: Accumulator | None
    ) -> Float[Tensor, "group out in"]:
        """Multiply group by group."""
        groups = range(len(rows.rows_per_group))
        return torch.stack([multiply(slopes.group(g), rows.group(g), accumulator=accumulator) for g in groups])

    def quantise_e5m6(self, x: Float[Tensor, "row column"]) -> PackedE5M6:
        """Return a matrix in E5M6."""
        return quantise_e5m6(x)

    def dequantise_e5m6(self, x: PackedE5M6) -> Float[Tensor, "row column"]:
        """Return the matrix in FP32, exactly."""
        return dequantise_e5m6(x)


def slice_rows(x: Quantised, *, start: int, count: int) -> Quantised:
    """Return some consecutive rows of a matrix. A tile that is cut has its scale repeated row by row."""
    if x.tile[0] == 1:
        scales = x.scales[start : start + count]
    else:
        scales = x.scales.repeat_interleave(x.tile[0], dim=0)[start : start + count]
    return Quantised(values=x.values[start : start + count], scales=scales, tile=(1, x.tile[1]))


def group_tiles(rows_per_group: Sequence[int], *, tile: int = TILE) -> list[int]:
    """Return where each tile of tokens begins, and at the end the number of tokens; tiles end with their group."""
    starts: list[int] = []
    row = 0
    for rows in rows_per_group:
        starts += range(row, row + rows, tile)
        row += rows
    return [*starts, row]
