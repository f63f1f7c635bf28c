"""Which operand of which product is quantised how: the report's recipe, and those it is measured against."""

from dataclasses import dataclass, replace

import torch

from dsv3.errors import ConfigError
from dsv3.fp8.gemm import HOPPER, Accumulator
from dsv3.fp8.quantise import BLOCKS, TILES, WHOLE, Form


@dataclass(frozen=True, kw_only=True)
class Fp8Recipe:
    """Forms of the six operands of a Linear's three products, and how they are summed.

    Fprop   y  = x    @ W^T        activation, weight
    Dgrad   dx = dy   @ W          gradient, weight
    Wgrad   dW = dy^T @ x          gradient and activation over tokens
    """

    activation: Form = TILES
    weight: Form = BLOCKS
    gradient: Form = TILES
    activation_over_tokens: Form = TILES
    gradient_over_tokens: Form = TILES
    accumulator: Accumulator | None = None
    """None: FP32, as after a promotion every 128 products."""
    narrow_caches: bool = True
    """Whether the input of o_proj is kept in E5M6 and that of the experts' SwiGLU in E4M3 (report 3.3.3)."""
    powers_of_two: bool = True
    """Whether the scales at the three places of `Site` are powers of two."""
    loss_scale: float = 1.0
    """What the loss is multiplied by for the backward pass."""


@dataclass(frozen=True, kw_only=True)
class Site:
    """Where in the model a product stands, for what the report does at some places only (3.3.2, 3.3.3)."""

    round_activation: bool = False
    """Scales of the input are powers of two: o_proj, and the experts' up projection."""
    round_gradient: bool = False
    """Scales of the output's gradient are powers of two: the experts' down projection."""


ANYWHERE = Site()
AFTER_ATTENTION = Site(round_activation=True)
EXPERTS_UP = Site(round_activation=True)
EXPERTS_DOWN = Site(round_gradient=True)

_E5M2_WHOLE = replace(WHOLE, dtype=torch.float8_e5m2)

RECIPES = {
    "fp8_v3": Fp8Recipe(),
    # As other frameworks do it: one scale a tensor, gradients in the format with the wider range.
    "fp8_per_tensor": Fp8Recipe(
        activation=WHOLE,
        weight=WHOLE,
        gradient=_E5M2_WHOLE,
        activation_over_tokens=WHOLE,
        gradient_over_tokens=_E5M2_WHOLE,
        narrow_caches=False,
        powers_of_two=False,
        loss_scale=65_536.0,
    ),
    # Report B.2: everything that Dgrad reads in 128 x 128 blocks, output gradients included.
    "fp8_blockwise_all": Fp8Recipe(gradient=BLOCKS),
    # Report 3.3.2: what the tensor cores of an H800 do when nothing is promoted to FP32.
    "fp8_no_promotion": Fp8Recipe(accumulator=HOPPER),
}


def recipe_named(name: str) -> Fp8Recipe:
    """Return the recipe of that name.

    Raises:
        ConfigError: there is none.
    """
    if name not in RECIPES:
        raise ConfigError(f"precision.recipe = '{name}' is no FP8 recipe; choose one of {', '.join(RECIPES)}")
    return RECIPES[name]


def form_at(form: Form, *, rounded: bool, recipe: Fp8Recipe) -> Form:
    """Return a form with scales that are powers of two, where the site and the recipe want them."""
    return replace(form, power_of_two=True) if rounded and recipe.powers_of_two else form
