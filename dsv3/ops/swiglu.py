"""SwiGLU: silu(gate) * up, the activation of every feed-forward network of the model (fact sheet 1.3)."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from dsv3 import native
from dsv3.ops import on_gpu
from dsv3.ops.on_gpu import runs_on_gpu


def swiglu(gate: Float[Tensor, "row width"], *, up: Float[Tensor, "row width"]) -> Float[Tensor, "row width"]:
    """Return silu(gate) * up."""
    if native.usable(gate, up) or on_gpu.usable(gate, up):
        return _Swiglu.apply(gate, up)
    return F.silu(gate) * up


def weighted_swiglu(
    gate_up: Float[Tensor, "row twice_width"], *, factors: Float[Tensor, " row"]
) -> Float[Tensor, "row width"]:
    """Return silu(gate) * up * factor, where `gate_up` holds gate and up side by side and each row has one factor."""
    if native.usable(gate_up, factors) or on_gpu.usable(gate_up, factors):
        return _WeightedSwiglu.apply(gate_up, factors)
    return weighted_swiglu_plain(gate_up, factors=factors)


def weighted_swiglu_plain(
    gate_up: Float[Tensor, "row twice_width"], *, factors: Float[Tensor, " row"]
) -> Float[Tensor, "row width"]:
    """`weighted_swiglu` as one reads it."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up * factors[:, None].to(gate_up.dtype)


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        if runs_on_gpu(gate):
            return on_gpu.swiglu_forward(gate, up=up)
        output = torch.empty_like(gate)
        rows, width = gate.shape
        native.call("swiglu_forward", gate, up, width, None, output, rows, width)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        rows, width = gate.shape
        of_gate, of_up = torch.empty_like(gate), torch.empty_like(up)
        slope = gradients[0].contiguous()
        if runs_on_gpu(gate):
            on_gpu.swiglu_backward(slope, gate=gate, up=up, of_gate=of_gate, of_up=of_up)
            return of_gate, of_up
        native.call("swiglu_backward", slope, gate, up, width, None, of_gate, of_up, width, None, rows, width)
        return of_gate, of_up


class _WeightedSwiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, factors: Tensor) -> Tensor:
        gate_up, factors = gate_up.contiguous(), factors.contiguous()
        ctx.save_for_backward(gate_up, factors)
        rows, width = gate_up.shape[0], gate_up.shape[1] // 2
        up = gate_up[:, width:]
        if runs_on_gpu(gate_up):
            return on_gpu.swiglu_forward(gate_up[:, :width], up=up, factors=factors)
        output = gate_up.new_empty(rows, width)
        native.call("swiglu_forward", gate_up, up, 2 * width, factors, output, rows, width)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        gate_up, factors = ctx.saved_tensors
        rows, width = gate_up.shape[0], gate_up.shape[1] // 2
        of_both, of_factors = torch.empty_like(gate_up), torch.empty_like(factors)
        if runs_on_gpu(gate_up):
            (gate, up), (of_gate, of_up) = gate_up.chunk(2, dim=1), of_both.chunk(2, dim=1)
            to = {"of_gate": of_gate, "of_up": of_up, "of_factors": of_factors}
            on_gpu.swiglu_backward(gradients[0], gate=gate, up=up, factors=factors, **to)
            return of_both, of_factors
        native.call(
            "swiglu_backward",
            gradients[0].contiguous(),
            gate_up,
            gate_up[:, width:],
            2 * width,
            factors,
            of_both,
            of_both[:, width:],
            2 * width,
            of_factors,
            rows,
            width,
        )
        return of_both, of_factors
