"""One matrix product for each expert over rows that are already grouped by expert."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from dsv3 import native


def grouped_linear(
    rows: Float[Tensor, "row in"], *, weight: Float[Tensor, "expert out in"], rows_per_expert: list[int]
) -> Float[Tensor, "row out"]:
    """Return `rows @ weight[e].T` with the expert e that each row belongs to.

    Rows are grouped by expert in rising order. No copies are made: every product writes into its slice of one output,
    and every weight gradient into its slice of one gradient, where indexing `weight[e]` under autograd would make a
    zero-filled gradient of all experts for each of them.
    """
    return _GroupedLinear.apply(rows, weight, rows_per_expert)


def grouped_linear_plain(
    rows: Float[Tensor, "row in"], *, weight: Float[Tensor, "expert out in"], rows_per_expert: list[int]
) -> Float[Tensor, "row out"]:
    """`grouped_linear` as one reads it."""
    pieces = zip(rows.split(rows_per_expert), weight, strict=True)
    return torch.cat([piece @ matrix.T for piece, matrix in pieces])


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, rows_per_expert: list[int]) -> Tensor:
        ctx.save_for_backward(rows, weight)
        ctx.rows_per_expert = rows_per_expert
        output = rows.new_empty(rows.shape[0], weight.shape[1])
        multiply_rows(rows, weight.transpose(1, 2), output=output, rows_per_expert=rows_per_expert)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (gradient,) = gradients
        rows, weight = ctx.saved_tensors
        gradient = gradient.contiguous()
        of_rows = of_weight = None
        if ctx.needs_input_grad[0]:
            of_rows = torch.empty_like(rows)
            multiply_rows(gradient, weight, output=of_rows, rows_per_expert=ctx.rows_per_expert)
        if ctx.needs_input_grad[1]:
            of_weight = torch.empty_like(weight)
            weight_gradients(gradient, rows, output=of_weight, rows_per_expert=ctx.rows_per_expert)
        return of_rows, of_weight, None


def multiply_rows(
    rows: Float[Tensor, "row in"],
    matrices: Float[Tensor, "expert in out"],
    *,
    output: Float[Tensor, "row out"],
    rows_per_expert: list[int],
) -> None:
    """Write `rows @ matrices[e]` into `output`, with the expert e that each row belongs to."""
    if native.multiplies_faster() and native.usable(rows, output) and _is_dense(rows, output):
        starts = native.starts_of(rows_per_expert)
        size, down, across = matrices.stride()
        num_experts, depth, columns = matrices.shape
        native.call("grouped_rows", rows, matrices, size, down, across, output, starts, num_experts, columns, depth)
        return
    for e, source, target in _slices(rows_per_expert, rows, output):
        torch.mm(source, matrices[e], out=target)


def weight_gradients(
    slopes: Float[Tensor, "row out"],
    rows: Float[Tensor, "row in"],
    *,
    output: Float[Tensor, "expert out in"],
    rows_per_expert: list[int],
) -> None:
    """Write `slopes_e.T @ rows_e` into `output[e]`, over the rows of each expert e; zeros for an idle one."""
    if native.multiplies_faster() and native.usable(slopes, rows, output) and _is_dense(slopes, rows, output):
        native.call("grouped_weights", slopes, rows, output, native.starts_of(rows_per_expert), *output.shape)
        return
    for e, slope, row in _slices(rows_per_expert, slopes, rows):
        torch.mm(slope.T, row, out=output[e])


def _is_dense(*tensors: Tensor) -> bool:
    return all(tensor.is_contiguous() for tensor in tensors)


def _slices(rows_per_expert: list[int], first: Tensor, second: Tensor) -> list[tuple[int, Tensor, Tensor]]:
    """Return (expert, its rows of the first tensor, its rows of the second). An idle expert has empty slices."""
    pairs = zip(first.split(rows_per_expert), second.split(rows_per_expert), strict=True)
    return [(expert, a, b) for expert, (a, b) in enumerate(pairs)]
