"""One matrix product for each expert over rows that are already grouped by expert."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from dsv3.native.products import multiply_rows, weight_gradients


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
