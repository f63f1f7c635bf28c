"""RMSNorm."""

import torch
from jaxtyping import Float
from torch import Tensor


def rms_norm(
    x: Float[Tensor, "*batch dim"], *, weight: Float[Tensor, " dim"], eps: float
) -> Float[Tensor, "*batch dim"]:
    """Return `weight * x / sqrt(mean(x^2) + eps)` over the last dim, reduced in at least FP32.

    Source: report 2.1 and fact sheet 1.1; eps is 1e-6 in the published configuration.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale).to(x.dtype) * weight
