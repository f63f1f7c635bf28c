"""The one matrix product with a weight: the seam where FP8 comes in (report 3.3)."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from dsv3.ops.norm import rms_norm


class Linear(nn.Module):
    """`x @ weight.T`; no V3 layer has a bias. The weight is uninitialised until `Transformer.init_weights`."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """Return the product over the last dim."""
        return F.linear(x, self.weight)


class RMSNorm(nn.Module):
    """RMSNorm with a learnable gain."""

    def __init__(self, dim: int, *, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim))

    def forward(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        """Return x normalised over the last dim."""
        return rms_norm(x, weight=self.weight, eps=self.eps)
