"""One matrix product for each expert over rows that are already grouped by expert."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from dsv3.native.products import multiply_rows, weight_gradients
from dsv3.runtime.later import Later


def grouped_linear(
    rows: Float[Tensor, "row in"],
    *,
    weight: Float[Tensor, "expert out in"],
    rows_per_expert: list[int],
    later: Later | None = None,
) -> Float[Tensor, "row out"]:
    """Return `rows @ weight[e].T` with the expert e that each row belongs to.

    Rows are grouped by expert in rising order. No copies are made: every product writes into its slice of one output,
    and every weight gradient into its slice of one gradient, where indexing `weight[e]` under autograd would make a
    zero-filled gradient of all experts for each of them. `later` may put off the weight's gradient.
    """
    return _GroupedLinear.apply(rows, weight, rows_per_expert, later or Later())


def grouped_linear_plain(
    rows: Float[Tensor, "row in"], *, weight: Float[Tensor, "expert out in"], rows_per_expert: list[int]
) -> Float[Tensor, "row out"]:
    """`grouped_linear` as one reads it."""
    pieces = zip(rows.split(rows_per_expert), weight, strict=True)
    return torch.cat([piece @ matrix.T for piece, matrix in pieces])


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, rows_per_expert: list[int], later: Later) -> Tensor:
        ctx.save_for_backward(rows)
        # Not a saved tensor: those may come back as other objects, and `later` must add to this one's gradient.
        ctx.weight, ctx.rows_per_expert, ctx.later = weight, rows_per_expert, later
        return multiply_rows(rows, weight.transpose(1, 2), rows_per_expert=rows_per_expert)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        (gradient,) = gradients
        (rows,) = ctx.saved_tensors
        weight, counts, gradient = ctx.weight, ctx.rows_per_expert, gradient.contiguous()
        of_rows = of_weight = None
        if ctx.needs_input_grad[0]:
            of_rows = multiply_rows(gradient, weight, rows_per_expert=counts)
        if ctx.needs_input_grad[1]:
            of_weight = ctx.later.gradient(
                weight, make=lambda: weight_gradients(gradient, rows, rows_per_expert=counts)
            )
        return of_rows, of_weight, None, None
