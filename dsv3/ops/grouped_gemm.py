"""One matrix product for each expert over rows that are already grouped by expert."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


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
        for e, source, target in _slices(rows_per_expert, rows, output):
            torch.mm(source, weight[e].T, out=target)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (gradient,) = gradients
        rows, weight = ctx.saved_tensors
        gradient = gradient.contiguous()
        of_rows = of_weight = None
        if ctx.needs_input_grad[0]:
            of_rows = torch.empty_like(rows)
            for e, source, target in _slices(ctx.rows_per_expert, gradient, of_rows):
                torch.mm(source, weight[e], out=target)
        if ctx.needs_input_grad[1]:
            of_weight = torch.empty_like(weight)
            for e, gradient_slice, row_slice in _slices(ctx.rows_per_expert, gradient, rows):
                torch.mm(gradient_slice.T, row_slice, out=of_weight[e])
        return of_rows, of_weight, None


def _slices(rows_per_expert: list[int], first: Tensor, second: Tensor) -> list[tuple[int, Tensor, Tensor]]:
    """Return (expert, its rows of the first tensor, its rows of the second). An idle expert has empty slices."""
    pairs = zip(first.split(rows_per_expert), second.split(rows_per_expert), strict=True)
    return [(expert, a, b) for expert, (a, b) in enumerate(pairs)]
