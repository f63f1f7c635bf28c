"""The one matrix product with a weight: the seam where FP8 comes in (report 3.3)."""

from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from dsv3.fp8.formats import TILE, is_fp8
from dsv3.fp8.quantise import Quantised, tiles_of
from dsv3.ops.norm import rms_norm

BLOCK = (TILE, TILE)
"""Rows and columns of a weight that share a scale."""


class BlockScaled(nn.Module):
    """A module whose matrices may lie in memory as the released files have them: E4M3, and a scale for each block.

    The scales of a parameter NAME are the buffer NAME_scale_inv, which is None as long as NAME is of an ordinary type;
    state dicts then do not have it.
    """

    matrices: ClassVar[Mapping[str, int]]
    """Names of the parameters, and how many matrices lie one above the other in each."""

    def make_room_in_fp8(self) -> None:
        """Replace the parameters by uninitialised ones in FP8, which take no gradient, with their scales."""
        for name, parts in self.matrices.items():
            wide = self.get_parameter(name)
            values = torch.empty_like(wide, dtype=torch.float8_e4m3fn)
            setattr(self, name, nn.Parameter(values, requires_grad=False))
            groups = wide.shape[:-2] if parts == 1 else (*wide.shape[:-2], parts)
            blocks = tiles_of(wide.shape[-2] // parts, wide.shape[-1], tile=BLOCK)
            self.register_buffer(f"{name}_scale_inv", torch.empty(*groups, *blocks, device=wide.device))

    def in_blocks(self, name: str) -> Quantised:
        """Return a parameter that lies in FP8, with its scales, as group x part x out x in. Nothing is copied."""
        parts, values, scales = self.matrices[name], self.get_parameter(name), self.get_buffer(f"{name}_scale_inv")
        rows, columns = values.shape[-2:]
        return Quantised(
            values=values.detach().view(-1, parts, rows // parts, columns),
            scales=scales.view(-1, parts, *scales.shape[-2:]),
            tile=BLOCK,
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "BlockScaled":
        """Move with the module, but stay in FP8 with FP32 scales whatever type the module is cast to."""
        if not any(is_fp8(parameter) for parameter in self.parameters(recurse=False)):
            return super()._apply(fn, recurse)
        # A cast leaves alone what is not floating point, and moving does not ask what the bytes mean.
        return super()._apply(lambda tensor: fn(tensor.view(torch.uint8)).view(tensor.dtype), recurse)


class Linear(BlockScaled):
    """`x @ weight.T`; no V3 layer has a bias. The weight is uninitialised until `Transformer.init_weights`."""

    matrices: ClassVar[Mapping[str, int]] = {"weight": 1}

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.register_buffer("weight_scale_inv", None)

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
