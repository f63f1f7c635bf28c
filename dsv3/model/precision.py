"""In which numbers the products with weights are computed: the seam where FP8 comes in (report 3.3).

A `Precision` is passed down a forward pass as `recompute` is, and asked for every product of attention, dense layers,
shared and routed experts. Embedding, output head, eh_proj, routers, norms and the core of attention never ask: they
stay in the original precision (report 3.3.1).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dsv3.config import PrecisionConfig
from dsv3.fp8.choose import kernels_for
from dsv3.fp8.e5m6 import PackedE5M6
from dsv3.fp8.formats import is_fp8
from dsv3.fp8.linear import Fp8Product, fp8_products
from dsv3.fp8.quantise import TILES, Form, Quantised
from dsv3.fp8.recipe import AFTER_ATTENTION, ANYWHERE, Fp8Recipe, Site, recipe_named
from dsv3.ops.grouped_gemm import grouped_linear
from dsv3.ops.linear import linear
from dsv3.ops.recompute import Forget, is_made_again
from dsv3.runtime.later import Later


@runtime_checkable
class Precision(Protocol):
    """How products with weights are computed, and in how many bits two activations wait for the backward pass."""

    @property
    def keeps_less(self) -> bool:
        """Whether `swiglu_input` and `output_projection` narrow what is kept."""
        ...

    def putting_off(self, later: Later) -> "Precision":
        """Return the same, with gradients of weights made when `later` says so."""
        ...

    def products(
        self, x: Float[Tensor, "token in"], *weights: nn.Parameter, site: Site = ANYWHERE
    ) -> tuple[Float[Tensor, "token _"], ...]:
        """Return `x @ weight.T` for each weight."""
        ...

    def expert_products(
        self, rows: Float[Tensor, "row in"], *, weight: nn.Parameter, rows_per_expert: list[int], site: Site
    ) -> Float[Tensor, "row out"]:
        """Return `rows @ weight[e].T` with the expert e that each row belongs to."""
        ...

    def output_projection(
        self, heads: Float[Tensor, "token head v"], *, weight: nn.Parameter, forget: Forget
    ) -> Float[Tensor, "token hidden"]:
        """Return o_proj's product of what attention put out; `forget` may drop what attention kept of that."""
        ...

    def matrix(self, weight: nn.Parameter, *, dtype: torch.dtype) -> Float[Tensor, "out in"]:
        """Return a weight itself, for the one reader that takes it apart: attention in its absorbed form."""
        ...

    def swiglu_input(self, x: Float[Tensor, "row width"]) -> Callable[[], Float[Tensor, "row width"]]:
        """Return how to make an input of the experts' SwiGLU again from what is to be kept of it."""
        ...


@dataclass(frozen=True, kw_only=True)
class OriginalPrecision:
    """Everything in the type that the model computes in."""

    later: Later | None = None
    keeps_less: ClassVar[bool] = False

    def putting_off(self, later: Later) -> "OriginalPrecision":
        """Return the same, with gradients of weights made when `later` says so."""
        return replace(self, later=later)

    def products(
        self, x: Float[Tensor, "token in"], *weights: nn.Parameter, site: Site = ANYWHERE
    ) -> tuple[Float[Tensor, "token _"], ...]:
        """Return the products by torch, wherever they stand."""
        del site
        return tuple(linear(x, weight=self.matrix(weight, dtype=x.dtype), later=self.later) for weight in weights)

    def expert_products(
        self, rows: Float[Tensor, "row in"], *, weight: nn.Parameter, rows_per_expert: list[int], site: Site
    ) -> Float[Tensor, "row out"]:
        """Return the products of experts, wherever they stand."""
        del site
        assert not is_fp8(weight), NO_SCALES
        return grouped_linear(rows, weight=weight.to(rows.dtype), rows_per_expert=rows_per_expert, later=self.later)

    def output_projection(
        self, heads: Float[Tensor, "token head v"], *, weight: nn.Parameter, forget: Forget
    ) -> Float[Tensor, "token hidden"]:
        """Return the product; attention keeps its output as it is."""
        del forget
        return linear(heads.flatten(1), weight=self.matrix(weight, dtype=heads.dtype), later=self.later)

    def matrix(self, weight: nn.Parameter, *, dtype: torch.dtype) -> Float[Tensor, "out in"]:
        """Return the weight."""
        assert not is_fp8(weight), NO_SCALES
        return weight.to(dtype)

    def swiglu_input(self, x: Float[Tensor, "row width"]) -> Callable[[], Float[Tensor, "row width"]]:
        """Return x itself: all of it is kept."""
        return lambda: x


ORIGINAL = OriginalPrecision()
NO_SCALES = "a weight in FP8 was to be read without its scales; Transformer.stored_precision() has them"


@dataclass(frozen=True, kw_only=True)
class Fp8Precision:
    """Products in FP8. It holds the quantised weights, so it lives from one change of the weights to the next."""

    recipe: Fp8Recipe
    weights: Mapping[nn.Parameter, Quantised]
    """group x out x in."""
    swiglu_cache: Form = TILES
    """How inputs of the experts' SwiGLU are kept."""
    later: Later = field(default_factory=Later)

    def putting_off(self, later: Later) -> "Fp8Precision":
        """Return the same, with gradients of weights made when `later` says so."""
        return replace(self, later=later)

    @property
    def num_bytes(self) -> int:
        """Memory of the quantised weights."""
        return sum(weight.num_bytes for weight in self.weights.values())

    @property
    def keeps_less(self) -> bool:
        """Whether the recipe has its two narrow caches."""
        return self.recipe.narrow_caches

    def products(
        self, x: Float[Tensor, "token in"], *weights: nn.Parameter, site: Site = ANYWHERE
    ) -> tuple[Float[Tensor, "token _"], ...]:
        """Return the products in FP8; x is quantised once for all."""
        return self._multiply(x, weights=weights, rows_per_group=(x.shape[0],), site=site)

    def expert_products(
        self, rows: Float[Tensor, "row in"], *, weight: nn.Parameter, rows_per_expert: list[int], site: Site
    ) -> Float[Tensor, "row out"]:
        """Return the products of experts in FP8."""
        return self._multiply(rows, weights=(weight,), rows_per_group=rows_per_expert, site=site)[0]

    def output_projection(
        self, heads: Float[Tensor, "token head v"], *, weight: nn.Parameter, forget: Forget
    ) -> Float[Tensor, "token hidden"]:
        """Return the product in FP8. What is kept of its input is one copy in E5M6, for Wgrad and for attention.

        Source: report 3.3.3, 'Inputs of the Linear after the attention operator'.
        """
        joined = heads.flatten(1)
        packed = None
        if self.keeps_less and heads.requires_grad:
            kernels, shape, dtype = kernels_for(heads.device), heads.shape, heads.dtype
            packed = kept = kernels.quantise_e5m6(joined.detach())
            forget(heads, lambda: kernels.dequantise_e5m6(kept).to(dtype).view(shape))
        groups = (joined.shape[0],)
        return self._multiply(
            joined, weights=(weight,), rows_per_group=groups, site=AFTER_ATTENTION, packed_input=packed
        )[0]

    def matrix(self, weight: nn.Parameter, *, dtype: torch.dtype) -> Float[Tensor, "out in"]:
        """Return the weight that training keeps beside the quantised one."""
        return weight.to(dtype)

    def swiglu_input(self, x: Float[Tensor, "row width"]) -> Callable[[], Float[Tensor, "row width"]]:
        """Return how to make x again from E4M3 (report 3.3.3, 'Inputs of the SwiGLU operator in MoE')."""
        if not (self.keeps_less and x.requires_grad):
            return lambda: x
        kernels, dtype = kernels_for(x.device), x.dtype
        kept = kernels.quantise(x.detach(), form=self.swiglu_cache)
        return lambda: kernels.dequantise(kept).to(dtype)

    def _multiply(
        self,
        x: Tensor,
        *,
        weights: Sequence[nn.Parameter],
        rows_per_group: Sequence[int],
        site: Site,
        packed_input: PackedE5M6 | None = None,
    ) -> tuple[Tensor, ...]:
        product = Fp8Product(
            recipe=self.recipe,
            kernels=kernels_for(x.device),
            weights=tuple(self.weights[weight] for weight in weights),
            rows_per_group=tuple(rows_per_group),
            site=site,
            input_is_kept=is_made_again(x),
            packed_input=packed_input,
            later=self.later,
        )
        return fp8_products(x, parameters=weights, product=product)


@torch.no_grad()
def quantise_weights(weights: Iterable[tuple[nn.Parameter, int]], *, config: PrecisionConfig) -> Precision:
    """Return the precision to train in until the weights change: for an FP8 recipe, with all of them quantised.

    Each weight comes with the number of matrices that lie one above the other in it (`Transformer.weights_in_fp8`).
    """
    if config.recipe == "original":
        return ORIGINAL
    recipe = recipe_named(config.recipe)
    return Fp8Precision(
        recipe=recipe,
        weights={weight: quantise_weight(weight, parts=parts, form=recipe.weight) for weight, parts in weights},
        swiglu_cache=replace(TILES, power_of_two=config.swiglu_cache_power_of_two),
    )


def quantise_weight(weight: Float[Tensor, "*group out in"], *, parts: int, form: Form) -> Quantised:
    """Return a weight as group x out x in; tiles do not cross from one of its `parts` into the next.

    Gate and up projection of an expert are two matrices here as in the published files, though they lie in one tensor.
    """
    size = weight.shape[-2] // parts
    split = weight.detach().view(-1, parts, size, weight.shape[-1])
    return stack_parts(kernels_for(weight.device).quantise(split, form=form))


def stack_parts(weight: Quantised) -> Quantised:
    """Return a weight of group x part x out x in as group x out x in."""
    parts, size = weight.values.shape[1:3]
    scales, (height, width) = weight.scales, weight.tile
    if parts > 1 and size % height:
        # A part ends within a tile, so one number for each tile no longer says which rows it has.
        scales, height = scales.repeat_interleave(height, dim=-2)[..., :size, :], 1
    return Quantised(values=weight.values.flatten(1, 2), scales=scales.flatten(1, 2), tile=(height, width))
