"""Products with weights whose gradients may wait."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from dsv3.runtime.later import Later


def linear(
    x: Float[Tensor, "token in"], *, weight: Float[Tensor, "out in"], later: Later | None = None
) -> Float[Tensor, "token out"]:
    """Return `x @ weight.T`; `later` may put off the weight's gradient."""
    return F.linear(x, weight) if later is None else _Linear.apply(x, weight, later)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, later: Later) -> Tensor:
        ctx.save_for_backward(x)
        ctx.weight, ctx.later = weight, later
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (gradient,) = gradients
        (x,) = ctx.saved_tensors
        weight = ctx.weight
        of_x = gradient @ weight if ctx.needs_input_grad[0] else None
        of_weight = None
        if ctx.needs_input_grad[1]:
            of_weight = ctx.later.gradient(weight, make=lambda: gradient.T @ x)
        return of_x, of_weight, None
