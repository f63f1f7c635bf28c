"""DeepSeekMoE (report 2.1.2, eq. 12): shared experts for every token, routed experts for those sent to them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from dsv3.config import KEEP_ALL, ModelConfig, RecomputeConfig
from dsv3.fp8.recipe import EXPERTS_DOWN, EXPERTS_UP
from dsv3.model.interfaces import DispatchedTokens, Routing
from dsv3.model.linear import BlockScaled, Linear
from dsv3.model.precision import ORIGINAL, Precision
from dsv3.model.router import Router
from dsv3.ops.permute import copy_to_rows, sum_to_tokens
from dsv3.ops.recompute import made_again
from dsv3.ops.swiglu import swiglu, weighted_swiglu


class FeedForward(nn.Module):
    """SwiGLU: W_down(silu(W_gate x) * W_up x). The dense layers, and the shared experts as one network."""

    def __init__(self, hidden_size: int, *, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = Linear(hidden_size, intermediate_size)
        self.up_proj = Linear(hidden_size, intermediate_size)
        self.down_proj = Linear(intermediate_size, hidden_size)

    def forward(
        self,
        x: Float[Tensor, "token hidden"],
        *,
        recompute: RecomputeConfig = KEEP_ALL,
        precision: Precision = ORIGINAL,
    ) -> Float[Tensor, "token hidden"]:
        """Return the network's output for every token."""
        gate, up = precision.products(x, self.gate_proj.weight, self.up_proj.weight)
        active = swiglu(gate, up=up)
        with made_again((active, lambda: swiglu(gate, up=up)), when=recompute.swiglu):
            return precision.products(active, self.down_proj.weight)[0]


class SharedExperts(FeedForward):
    """The shared experts, which are one network; an FP8 recipe keeps what their SwiGLU reads in FP8."""

    def forward(
        self,
        x: Float[Tensor, "token hidden"],
        *,
        recompute: RecomputeConfig = KEEP_ALL,
        precision: Precision = ORIGINAL,
    ) -> Float[Tensor, "token hidden"]:
        """Return their output for every token."""
        if not precision.keeps_less:
            return super().forward(x, recompute=recompute, precision=precision)
        gate, up = precision.products(x, self.gate_proj.weight, self.up_proj.weight)
        gate_again, up_again = precision.swiglu_input(gate), precision.swiglu_input(up)
        with made_again((gate, gate_again), (up, up_again)):
            active = swiglu(gate, up=up)
        with made_again((active, lambda: swiglu(gate_again(), up=up_again()))):
            return precision.products(active, self.down_proj.weight)[0]


class Experts(BlockScaled):
    """The routed experts held here, their weights stacked so that one call serves all."""

    matrices: ClassVar[Mapping[str, int]] = {"gate_up_proj": 2, "down_proj": 1}

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        experts, hidden, width = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * width, hidden))  # gate rows, then up rows
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, width))
        self.register_buffer("gate_up_proj_scale_inv", None)
        self.register_buffer("down_proj_scale_inv", None)

    def forward(
        self,
        dispatched: DispatchedTokens,
        *,
        recompute: RecomputeConfig = KEEP_ALL,
        precision: Precision = ORIGINAL,
    ) -> Float[Tensor, "row hidden"]:
        """Return each row's expert output, times the row's gate value.

        The gate multiplies before the down projection, as in the published training trace: the same sum, and the
        product can be fused into the activation.
        """
        counts, gates = dispatched.rows_per_expert, dispatched.gates
        gate_up = precision.expert_products(
            dispatched.rows, weight=self.gate_up_proj, rows_per_expert=counts, site=EXPERTS_UP
        )
        gate_up_again = precision.swiglu_input(gate_up)
        with made_again((gate_up, gate_up_again), when=precision.keeps_less):
            active = weighted_swiglu(gate_up, factors=gates)
        again = (active, lambda: weighted_swiglu(gate_up_again(), factors=gates))
        with made_again(again, when=recompute.swiglu or precision.keeps_less):
            return precision.expert_products(active, weight=self.down_proj, rows_per_expert=counts, site=EXPERTS_DOWN)


@dataclass(frozen=True, kw_only=True)
class ChosenHere:
    """Tokens and the experts chosen for them, all on this device."""

    tokens: Float[Tensor, "token hidden"]
    routing: Routing


@dataclass(frozen=True, kw_only=True)
class OutputsHere:
    """Outputs of experts, and whose they are."""

    outputs: Float[Tensor, "row hidden"]
    source: Int[Tensor, " row"]
    origin: Int[Tensor, "token chosen"]


class LocalDispatch:
    """TokenDispatch for experts that are all on this device: a sort by expert, and back. Nothing travels."""

    def announce(self, tokens: Float[Tensor, "token hidden"], *, routing: Routing) -> ChosenHere:
        """Take note of them."""
        return ChosenHere(tokens=tokens, routing=routing)

    def send(self, announced: ChosenHere) -> ChosenHere:
        """Do nothing yet."""
        return announced

    def receive(self, sent: ChosenHere) -> DispatchedTokens:
        """Copy each token once for every expert chosen for it, grouped by expert."""
        routing = sent.routing
        chosen = routing.experts.shape[1]
        order = routing.experts.flatten().argsort(stable=True)  # row -> (token, choice)
        origin = torch.empty_like(order)
        origin[order] = torch.arange(order.shape[0], device=order.device)
        source, origin = order // chosen, origin.unflatten(0, (-1, chosen))
        return DispatchedTokens(
            rows=copy_to_rows(sent.tokens, source=source, origin=origin),
            rows_per_expert=routing.load.tolist(),
            gates=routing.gates.flatten()[order],
            source=source,
            origin=origin,
            gathered_here=True,
        )

    def send_back(self, outputs: Float[Tensor, "row hidden"], *, dispatched: DispatchedTokens) -> OutputsHere:
        """Take note of what they belong to."""
        return OutputsHere(outputs=outputs, source=dispatched.source, origin=dispatched.origin)

    def receive_back(self, returning: OutputsHere) -> Float[Tensor, "token hidden"]:
        """Sum the outputs that belong to one token."""
        return sum_to_tokens(returning.outputs, source=returning.source, origin=returning.origin)


class MixtureOfExperts(nn.Module):
    """Router, routed experts and shared experts of one layer."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = Router(config)
        self.experts = Experts(config)
        if config.n_shared_experts:
            width = config.n_shared_experts * config.moe_intermediate_size
            self.shared_experts = SharedExperts(config.hidden_size, intermediate_size=width)
