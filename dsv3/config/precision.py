"""In which numbers the products with weights are computed (report 3.3)."""

from dataclasses import dataclass

from dsv3.config.check import require_choice
from dsv3.errors import ConfigError

PRECISION_RECIPES = ("original", "fp8_v3", "fp8_per_tensor", "fp8_blockwise_all", "fp8_no_promotion")


@dataclass(frozen=True, kw_only=True)
class PrecisionConfig:
    """How the Linear layers of attention, dense networks, shared and routed experts are trained."""

    recipe: str = "fp8_v3"
    """'original' (everything in `runtime.dtype`: BF16 or FP32), 'fp8_v3' (the report's), and three that it is measured
    against: 'fp8_per_tensor' (one scale a tensor, as other frameworks do it), 'fp8_blockwise_all' (the diverging
    ablation of report B.2) and 'fp8_no_promotion' (sums kept in the tensor core's 14 bits, emulated)."""
    swiglu_cache_power_of_two: bool = False
    """Whether the FP8 copies kept of the SwiGLU's inputs have powers of two as scales. Unpublished."""
    loss_scale: float = 0.0
    """A power of two that the loss is multiplied by before the backward pass, and gradients divided by after it; halved
    for a step whose gradients are not finite. 0 takes the recipe's own: 65,536 for 'fp8_per_tensor', else 1."""

    def __post_init__(self) -> None:
        require_choice(self, "recipe", choices=PRECISION_RECIPES)
        if self.loss_scale != 0 and (self.loss_scale < 1 or self.loss_scale.hex().split("p")[0] != "0x1.0000000000000"):
            raise ConfigError(
                f"loss_scale = {self.loss_scale} would round gradients; use a power of two from 1 up, or 0 for the "
                "recipe's own"
            )
