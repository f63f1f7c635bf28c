"""Products with weights whose three matrix products run in FP8: Fprop, Dgrad and Wgrad (report 3.3.1).

The weight's own values never enter: it is quantised once a step, by the caller, and its gradient is FP32. Rows of
several experts lie end to end, each group with its own matrix; an ordinary Linear is one group of rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from dsv3.fp8.e5m6 import PackedE5M6
from dsv3.fp8.kernels import Kernels, OverTokens
from dsv3.fp8.quantise import Form, Quantised
from dsv3.fp8.recipe import ANYWHERE, Fp8Recipe, Site, form_at
from dsv3.runtime.later import Later


@dataclass(frozen=True, kw_only=True)
class Fp8Product:
    """How one input is multiplied with its weights."""

    recipe: Fp8Recipe
    kernels: Kernels
    weights: tuple[Quantised, ...]
    """group x out x in, one for each product of the same input."""
    rows_per_group: tuple[int, ...]
    site: Site = ANYWHERE
    input_is_kept: bool = False
    """Whether the input is there again in the backward pass whatever we do: then it is quantised again, not kept."""
    packed_input: PackedE5M6 | None = None
    """The input in E5M6, kept for another reader: Wgrad then reads that."""
    later: Later = field(default_factory=Later)
    """May put Wgrad off."""

    @property
    def activation(self) -> Form:
        """Form of the input in Fprop."""
        return form_at(self.recipe.activation, rounded=self.site.round_activation, recipe=self.recipe)

    @property
    def activation_over_tokens(self) -> Form:
        """Form of the input in Wgrad."""
        return form_at(self.recipe.activation_over_tokens, rounded=self.site.round_activation, recipe=self.recipe)

    @property
    def gradient(self) -> Form:
        """Form of the output's gradient in Dgrad."""
        return form_at(self.recipe.gradient, rounded=self.site.round_gradient, recipe=self.recipe)

    @property
    def gradient_over_tokens(self) -> Form:
        """Form of the output's gradient in Wgrad."""
        return form_at(self.recipe.gradient_over_tokens, rounded=self.site.round_gradient, recipe=self.recipe)


def fp8_products(
    x: Float[Tensor, "row in"], *, parameters: Sequence[Tensor], product: Fp8Product
) -> tuple[Float[Tensor, "row _"], ...]:
    """Return x times each weight, in the type of x; x is quantised once for all of them.

    `parameters` are what the weights were quantised from: they receive FP32 gradients, in their own shape and type.
    """
    return _Fp8Products.apply(x, product, *parameters)


class _Fp8Products(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, product: Fp8Product, *parameters: Tensor) -> tuple[Tensor, ...]:
        rows = product.kernels.quantise(x, form=product.activation)
        ctx.product, ctx.parameters = product, parameters
        if product.input_is_kept:
            ctx.save_for_backward(x)
        elif product.packed_input is None:
            ctx.save_for_backward(rows.values, rows.scales)
            ctx.tile = rows.tile
        return tuple(
            product.kernels.multiply(
                rows,
                weight=weight,
                rows_per_group=product.rows_per_group,
                accumulator=product.recipe.accumulator,
                dtype=x.dtype,
            )
            for weight in product.weights
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        product: Fp8Product = ctx.product
        kernels = product.kernels
        of_x: Tensor | None = None
        if ctx.needs_input_grad[0]:
            sum_type = torch.float32 if len(gradients) > 1 else gradients[0].dtype
            for gradient, weight in zip(gradients, product.weights, strict=True):
                part = kernels.multiply(
                    kernels.quantise(gradient, form=product.gradient),
                    weight=weight.T,
                    rows_per_group=product.rows_per_group,
                    accumulator=product.recipe.accumulator,
                    dtype=sum_type,
                )
                of_x = part if of_x is None else of_x.add_(part)
            assert of_x is not None
            of_x = of_x.to(gradients[0].dtype)
        of_parameters: list[Tensor | None] = [None] * len(product.weights)
        if any(ctx.needs_input_grad[2:]):
            kept = ctx.saved_tensors
            tile = getattr(ctx, "tile", None)
            rows = cache(lambda: _input_over_tokens(product, kept=kept, tile=tile))

            def make(gradient: Tensor, parameter: Tensor) -> Tensor:
                slopes = kernels.quantise_over_tokens(
                    gradient, form=product.gradient_over_tokens, rows_per_group=product.rows_per_group
                )
                made = kernels.weight_gradients(slopes, rows=rows(), accumulator=product.recipe.accumulator)
                return made.view(parameter.shape).to(parameter.dtype)

            of_parameters = [
                product.later.gradient(parameter, make=partial(make, gradient, parameter))
                for gradient, parameter in zip(gradients, ctx.parameters, strict=True)
            ]
        return of_x, None, *of_parameters


def _input_over_tokens(product: Fp8Product, *, kept: Sequence[Tensor], tile: tuple[int, int] | None) -> OverTokens:
    """Return the input as Wgrad reads it, from whatever was kept of it."""
    kernels, form, groups = product.kernels, product.activation_over_tokens, product.rows_per_group
    if product.packed_input is not None:
        wide = kernels.dequantise_e5m6(product.packed_input)
        return kernels.quantise_over_tokens(wide, form=form, rows_per_group=groups)
    if product.input_is_kept:
        (x,) = kept
        rows = kernels.quantise(x, form=product.activation)
    else:
        values, scales = kept
        assert tile is not None
        rows = Quantised(values=values, scales=scales, tile=tile)
    return kernels.requantise_over_tokens(rows, form=form, rows_per_group=groups)
