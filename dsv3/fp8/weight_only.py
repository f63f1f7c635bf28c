"""Products of activations in full width with weights that lie in memory in FP8, at one byte a number.

Weights become FP32 where they are multiplied: for a few rows, which is decoding, in the registers of a C++ kernel; for
many in panels small enough to be of no account. What FP8 rounds is the weights alone, so this is what the dequantised
model computes, to the order of FP32 sums.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from dsv3 import native
from dsv3.fp8.quantise import BLOCKS, Quantised, dequantise

FEW_ROWS = 16
"""Rows up to which the kernel serves. On an EPYC of 2021 panels win from 16 to 64 on, depending on the weight."""
PANEL_ROWS = 256
"""Rows of a weight that are widened at a time; 7 MB of the longest of V3's experts. Measured best of 128 to 512."""


def weight_only_product(
    x: Float[Tensor, "row in"], *, weight: Quantised, rows_per_group: Sequence[int]
) -> Float[Tensor, "row out"]:
    """Return `x @ weight[g].T` in the type of x, with the group g of each row.

    `weight` is group x part x out x in, and the outputs of all parts stand side by side. Only groups that have rows are
    read. Sums are in FP32 at least, and the same for one row as for a few.
    """
    groups, parts, columns, depth = weight.values.shape
    wide = x.to(torch.promote_types(x.dtype, torch.float32)).contiguous()
    output = wide.new_empty(x.shape[0], parts * columns)
    few = FEW_ROWS if native.usable(wide) and serves(weight) and wide.numel() else 0
    if few:
        starts, shape = native.starts_of(rows_per_group), (groups, parts, columns, depth)
        native.call("fp8_linear", wide, weight.values, weight.scales, starts, *shape, few, output)
    start = 0
    for group, count in enumerate(rows_per_group):
        if count > few:
            here = slice(start, start + count)
            multiply_by_panels(wide[here], weight=weight[group], output=output[here])
        start += count
    return output.to(x.dtype)


def multiply_by_panels(
    x: Float[Tensor, "row in"], *, weight: Quantised, output: Float[Tensor, "row out"], panel_rows: int = PANEL_ROWS
) -> None:
    """Write `x @ weight.T` into `output`, for one group; never more than `panel_rows` rows of it are held wide."""
    parts, columns, _ = weight.values.shape
    assert panel_rows % weight.tile[0] == 0, "a panel must not end within a block"
    for part in range(parts):
        for first in range(0, columns, panel_rows):
            count = min(panel_rows, columns - first)
            here = output.narrow(1, part * columns + first, count)
            # One expression, so that a panel is gone before the next is made.
            torch.mm(x, weight_rows(weight[part], first=first, count=count).to(x.dtype).T, out=here)


def weight_rows(weight: Quantised, *, first: int, count: int) -> Float[Tensor, "some in"]:
    """Return `count` rows of one matrix in FP32, exactly; `first` is where a block begins."""
    height = weight.tile[0]
    blocks = slice(first // height, -(-(first + count) // height))
    rows = Quantised(values=weight.values[first : first + count], scales=weight.scales[blocks], tile=weight.tile)
    if not serves(weight):
        return dequantise(rows)
    output = torch.empty(rows.values.shape)
    native.call("fp8_widen", rows.values, rows.scales, *output.shape, output)
    return output


def serves(weight: Quantised) -> bool:
    """Whether our kernels read this weight: published blocks, without gaps, on a CPU."""
    dense = weight.values.is_contiguous() and weight.scales.is_contiguous()
    return dense and weight.tile == BLOCKS.tile and weight.values.dtype == BLOCKS.dtype and native.usable(weight.scales)
