"""The precision of a model whose weights lie in memory in FP8, as published: to be used, not trained.

On a GPU with FP8 products, activations are quantised too, in tiles of 1 x 128, as the published inference code does it.
Elsewhere products are computed in the type of the activations, as if the weights had been dequantised.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dsv3.errors import ConfigError
from dsv3.fp8.choose import kernels_for
from dsv3.fp8.quantise import Quantised
from dsv3.fp8.recipe import ANYWHERE, Site, recipe_named
from dsv3.fp8.weight_only import weight_only_product, weight_rows
from dsv3.model.precision import Fp8Precision, OriginalPrecision, Precision, stack_parts
from dsv3.ops.recompute import Forget
from dsv3.runtime.log import say_once

PUBLISHED = replace(recipe_named("fp8_v3"), powers_of_two=False, narrow_caches=False)
"""As the published inference code multiplies: no scale of an activation is rounded to a power of two."""
FIRST_WITH_FP8 = (9, 0)
"""Compute capability of the first GPUs that our FP8 products run on."""


def precision_of_stored(weights: Mapping[nn.Parameter, Quantised], *, device: torch.device) -> Precision:
    """Return how products with weights in FP8, each as group x part x out x in, are computed on a device."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= FIRST_WITH_FP8:
        say_once("weights stay in FP8 in memory; activations are quantised for each product (1 x 128)")
        stacked = {weight: stack_parts(quantised) for weight, quantised in weights.items()}
        return StoredFp8(recipe=PUBLISHED, weights=stacked)
    say_once(f"weights stay in FP8 in memory; products on {device.type} are computed as if they were dequantised")
    return WeightOnlyFp8(weights=weights)


@dataclass(frozen=True, kw_only=True)
class WeightOnlyFp8(OriginalPrecision):
    """Weights in FP8 and activations as they are."""

    weights: Mapping[nn.Parameter, Quantised]
    """group x part x out x in."""

    def products(
        self, x: Float[Tensor, "token in"], *weights: nn.Parameter, site: Site = ANYWHERE
    ) -> tuple[Float[Tensor, "token _"], ...]:
        """Return the products, weight by weight."""
        del site
        _refuse_gradients(x)
        return tuple(self._product(x, weight, [x.shape[0]]) for weight in weights)

    def expert_products(
        self, rows: Float[Tensor, "row in"], *, weight: nn.Parameter, rows_per_expert: list[int], site: Site
    ) -> Float[Tensor, "row out"]:
        """Return the products of experts; those without rows are not read."""
        del site
        _refuse_gradients(rows)
        return self._product(rows, weight, rows_per_expert)

    def output_projection(
        self, heads: Float[Tensor, "token head v"], *, weight: nn.Parameter, forget: Forget
    ) -> Float[Tensor, "token hidden"]:
        """Return the product."""
        del forget
        return self.products(heads.flatten(1), weight)[0]

    def matrix(self, weight: nn.Parameter, *, dtype: torch.dtype) -> Float[Tensor, "out in"]:
        """Return the one matrix dequantised."""
        stored = self.weights[weight][0][0]
        return weight_rows(stored, first=0, count=weight.shape[0]).to(dtype)

    def _product(self, x: Tensor, weight: nn.Parameter, rows_per_group: Sequence[int]) -> Tensor:
        return weight_only_product(x, weight=self.weights[weight], rows_per_group=rows_per_group)


@dataclass(frozen=True, kw_only=True)
class StoredFp8(Fp8Precision):
    """Weights in FP8 and activations quantised on the way: the training recipe's Fprop, without its masters."""

    def matrix(self, weight: nn.Parameter, *, dtype: torch.dtype) -> Float[Tensor, "out in"]:
        """Return the one matrix dequantised."""
        return kernels_for(weight.device).dequantise(self.weights[weight][0]).to(dtype)

    def _multiply(self, x: Tensor, **product: Any) -> tuple[Tensor, ...]:
        _refuse_gradients(x)
        return super()._multiply(x, **product)


def _refuse_gradients(x: Tensor) -> None:
    if torch.is_grad_enabled() and x.requires_grad:
        raise ConfigError(
            "gradients were asked of a model whose weights are in FP8, which is for use only; load it with dtype "
            "'float32' or 'bfloat16' to train it, or compute under torch.no_grad()"
        )
