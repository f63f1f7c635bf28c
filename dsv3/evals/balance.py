"""How evenly a model loads its experts on given text, and which of them a source of text prefers."""

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from dsv3.model.interfaces import Routing
from dsv3.train.balance import max_violation


class ExpertLoad:
    """Tokens sent to each expert of each MoE layer, summed over as many forward passes as are added."""

    def __init__(self) -> None:
        self._layers: list[Int[Tensor, " expert"]] = []

    def add(self, routings: Sequence[Routing]) -> None:
        """Add the routings of one forward pass: one for each MoE layer, in the order of `ModelOutput.routings`."""
        loads = [routing.load.detach().cpu().to(torch.int64) for routing in routings]
        if not self._layers:
            self._layers = loads
            return
        self._layers = [total + load for total, load in zip(self._layers, loads, strict=True)]

    @property
    def layers(self) -> tuple[Int[Tensor, " expert"], ...]:
        """Load of each layer; empty before anything was added, and for a model without experts."""
        return tuple(self._layers)

    def max_violations(self) -> list[float]:
        """Return MaxVio of each layer: how far the busiest expert lies above the mean, in means. 0 is even.

        Counted over all text that was added, so it is lower than over single batches, which cannot be even.
        Source: Wang et al. (2024), "Auxiliary-loss-free load balancing", eq. 4; report 4.5.2 measures it so.
        """
        return [max_violation(load) for load in self._layers]
