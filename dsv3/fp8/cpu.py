"""FP8 arithmetic on a CPU without FP8: bytes and scales by C++ kernels, products by FP32 matrix products.

Operands are widened to FP32, exactly, and multiplied by the fastest product there is. That differs from the report's
sum in nothing but the order of FP32 additions, which is why a promotion every 128 products costs nothing here. What
the emulation costs against plain FP32 is measured by benchmarks/fp8_loss.py.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from dsv3 import native
from dsv3.fp8.e5m6 import PackedE5M6, dequantise_e5m6, quantise_e5m6
from dsv3.fp8.formats import TILE
from dsv3.fp8.gemm import AT_ONCE, Accumulator
from dsv3.fp8.kernels import OverTokens, PlainKernels, group_tiles
from dsv3.fp8.quantise import Form, Quantised, tiles_of
from dsv3.native.products import multiply_rows, weight_gradients

WIDEST_VECTOR = 16
"""Tiles narrower than this, or of an odd width, are left to the plain form."""


class CpuKernels(PlainKernels):
    """FP8 arithmetic by our C++ kernels; whatever they do not serve takes the plain form."""

    name = "C++ kernels and FP32 products"

    def quantise(self, x: Float[Tensor, "*batch row column"], *, form: Form) -> Quantised:
        """Return matrices in FP8."""
        rows, columns = x.shape[-2:]
        tile = form.tile_of(rows, columns)
        if not native.usable(x) or x.numel() == 0:
            return super().quantise(x, form=form)
        x = x if x.stride(-1) == 1 and (x.dim() == 2 or x.is_contiguous()) else x.contiguous()
        values = torch.empty(x.shape, dtype=torch.uint8)
        scales = x.new_empty(*x.shape[:-2], *tiles_of(rows, columns, tile=tile))
        matrices = x.shape[:-2].numel()
        shape = (x.stride(-2), matrices, rows, columns, *tile, int(form.power_of_two), _is_e5m2(form.dtype))
        native.call("fp8_quantise_tiles", x, *shape, values, scales)
        return Quantised(values=values.view(form.dtype), scales=scales, tile=tile)

    def dequantise(self, x: Quantised) -> Float[Tensor, "*batch row column"]:
        """Return the matrices in FP32; the transpose of a matrix as the transpose of what it becomes."""
        if not x.values.is_contiguous() and x.values.mT.is_contiguous():
            return self.dequantise(x.T).mT
        if not _serves(x) or x.values.numel() == 0:
            return super().dequantise(x)
        rows, columns = x.values.shape[-2:]
        output = torch.empty(x.values.shape)
        matrices = x.values.shape[:-2].numel()
        shape = (matrices, rows, columns, *x.tile, _is_e5m2(x.values.dtype))
        native.call("fp8_dequantise_tiles", x.values, *shape, x.scales.contiguous(), output)
        return output

    def quantise_over_tokens(
        self, x: Float[Tensor, "row column"], *, form: Form, rows_per_group: Sequence[int]
    ) -> OverTokens:
        """Quantise column by column in the order the rows lie in; the transpose is a view."""
        if not native.usable(x) or form.tile is None or x.numel() == 0:
            return super().quantise_over_tokens(x, form=form, rows_per_group=rows_per_group)
        x = x if x.stride(1) == 1 else x.contiguous()
        made = _OverTokensInPlace(*x.shape, form=form, rows_per_group=rows_per_group)
        shape = (x.stride(0), x.shape[1], made.starts, made.num_tiles, int(form.power_of_two), _is_e5m2(form.dtype))
        native.call("fp8_quantise_columns", x, *shape, made.values, made.scales)
        return made.finished()

    def requantise_over_tokens(self, x: Quantised, *, form: Form, rows_per_group: Sequence[int]) -> OverTokens:
        """Dequantise into the cache, a block at a time, and quantise column by column."""
        e4m3 = torch.float8_e4m3fn
        fits = form.tile is not None and x.tile[0] == 1 and x.tile[1] % WIDEST_VECTOR == 0
        if not (fits and _serves(x) and x.values.is_contiguous() and form.dtype == x.values.dtype == e4m3):
            return super().requantise_over_tokens(x, form=form, rows_per_group=rows_per_group)
        rows, columns = x.values.shape
        made = _OverTokensInPlace(rows, columns, form=form, rows_per_group=rows_per_group)
        shape = (x.tile[1], columns, made.starts, made.num_tiles, int(form.power_of_two))
        native.call("fp8_requantise_columns", x.values, x.scales.contiguous(), *shape, made.values, made.scales)
        return made.finished()

    def multiply(
        self,
        rows: Quantised,
        *,
        weight: Quantised,
        rows_per_group: Sequence[int],
        accumulator: Accumulator | None,
        dtype: torch.dtype = torch.float32,
    ) -> Float[Tensor, "row column"]:
        """Widen both and multiply."""
        if not _serves(rows) or (accumulator is not None and accumulator.promote_every):
            return super().multiply(
                rows, weight=weight, rows_per_group=rows_per_group, accumulator=accumulator, dtype=dtype
            )
        a, b = self.dequantise(rows), self.dequantise(weight)
        if accumulator is not None:
            return _truncating(a, b.mT, rows_per_group=rows_per_group, bits=accumulator.bits).to(dtype)
        if len(rows_per_group) == 1:
            return (a @ b[0].T).to(dtype)
        return multiply_rows(a, b.mT, rows_per_expert=rows_per_group).to(dtype)

    def weight_gradients(
        self, slopes: OverTokens, *, rows: OverTokens, accumulator: Accumulator | None
    ) -> Float[Tensor, "group out in"]:
        """Widen both and multiply."""
        if not native.choice_allows() or (accumulator is not None and accumulator.promote_every):
            return super().weight_gradients(slopes, rows=rows, accumulator=accumulator)
        a, b = self._widen(slopes), self._widen(rows)
        groups = rows.rows_per_group
        if accumulator is not None:
            pairs = zip(a.split(list(groups)), b.split(list(groups)), strict=True)
            return torch.stack(
                [_truncating(x.T, y[None], rows_per_group=[a.shape[1]], bits=accumulator.bits) for x, y in pairs]
            )
        if len(groups) == 1:
            return (a.T @ b)[None]
        return weight_gradients(a, b, rows_per_expert=groups)

    def _widen(self, x: OverTokens) -> Float[Tensor, "row column"]:
        """Return the rows that x is the quantised transpose of, in FP32."""
        values, scales = x.values.T.contiguous(), x.scales.T.contiguous()
        starts = group_tiles(x.rows_per_group, tile=x.tile)
        output = torch.empty(values.shape)
        shape = (values.shape[1], torch.tensor(starts), len(starts) - 1, _is_e5m2(values.dtype))
        native.call("fp8_dequantise_columns", values, *shape, scales, output)
        return output

    def quantise_e5m6(self, x: Float[Tensor, "row column"]) -> PackedE5M6:
        """Return a matrix in E5M6."""
        if not native.usable(x):
            return quantise_e5m6(x)
        x = x.contiguous()
        rows, columns = x.shape
        packed = torch.empty(rows, -(-columns // 2) * 3, dtype=torch.uint8)
        scales = x.new_empty(rows, -(-columns // TILE))
        native.call("e5m6_quantise", x, x.stride(0), rows, columns, TILE, packed, scales)
        return PackedE5M6(packed=packed, scales=scales, columns=columns)

    def dequantise_e5m6(self, x: PackedE5M6) -> Float[Tensor, "row column"]:
        """Return the matrix in FP32, exactly."""
        if not native.choice_allows():
            return dequantise_e5m6(x)
        output = torch.empty(x.packed.shape[0], x.columns)
        native.call("e5m6_dequantise", x.packed, *output.shape, TILE, x.scales, output)
        return output


class _OverTokensInPlace:
    """The memory of a result whose columns are quantised where they lie, row by row as the tokens."""

    def __init__(self, rows: int, columns: int, *, form: Form, rows_per_group: Sequence[int]) -> None:
        assert form.tile is not None
        assert form.tile[0] == 1
        self.tile, self.dtype, self.rows_per_group = form.tile[1], form.dtype, tuple(rows_per_group)
        starts = group_tiles(rows_per_group, tile=self.tile)
        self.starts, self.num_tiles = torch.tensor(starts), len(starts) - 1
        self.values = torch.empty(rows, columns, dtype=torch.uint8)
        self.scales = torch.empty(self.num_tiles, columns)

    def finished(self) -> OverTokens:
        values = self.values.view(self.dtype).T
        return OverTokens(values=values, scales=self.scales.T, tile=self.tile, rows_per_group=self.rows_per_group)


def _truncating(
    a: Float[Tensor, "row depth"], b: Float[Tensor, "group depth column"], *, rows_per_group: Sequence[int], bits: int
) -> Float[Tensor, "row column"]:
    """Return the product as `gemm.Accumulator` adds it, never promoted."""
    a = a.contiguous()
    depth, columns = b.shape[1:]
    padded = torch.nn.functional.pad(b, (0, -columns % WIDEST_VECTOR)).contiguous()
    output = a.new_empty(a.shape[0], columns)
    start = 0
    for group, count in enumerate(rows_per_group):
        here = slice(start, start + count)
        shape = (count, columns, depth, AT_ONCE, bits)
        native.call("truncating_product", a[here], a.stride(0), padded[group], padded.stride(1), output[here], *shape)
        start += count
    return output


def _is_e5m2(dtype: torch.dtype) -> int:
    return int(dtype == torch.float8_e5m2)


def _serves(x: Quantised) -> bool:
    return native.choice_allows() and x.values.device.type == "cpu"
