"""A running average of the weights, in CPU memory, to see the model as it would be after the learning rate has fallen.

Source: report 3.2.3, 'Exponential Moving Average in CPU'. The report updates it beside the next step; here it is done
in line, which costs one pass over the weights.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class WeightAverage:
    """Weighted mean of the weights after each step, the newest step weighing `1 - decay` against the sum before it.

    The weights of the mean add up to one from the first step on, so that the random start is never part of it: after
    n steps, step i weighs decay^(n-i) (1 - decay) / (1 - decay^n). The plain recursion would still be half made of
    initial noise after 700 steps at 0.999. Router biases are not averaged: they steer, and are not learned.
    """

    def __init__(self, weights: Mapping[str, Tensor], *, decay: float) -> None:
        assert 0 < decay < 1
        self.decay = decay
        self.updates = 0
        self.average = {
            name: torch.zeros_like(weight, dtype=torch.float32, device="cpu") for name, weight in weights.items()
        }

    @torch.no_grad()
    def update(self, weights: Mapping[str, Tensor]) -> None:
        """Take in the weights after a step."""
        self.updates += 1
        newest = (1 - self.decay) / (1 - self.decay**self.updates)
        ours = list(self.average.values())
        theirs = [weights[name].detach().to("cpu", torch.float32) for name in self.average]
        torch._foreach_lerp_(ours, theirs, newest)

    def load(self, average: Mapping[str, Tensor], *, updates: int) -> None:
        """Continue from the `average` of a snapshot, which had taken in `updates` steps."""
        self.updates = updates
        for name, tensor in self.average.items():
            tensor.copy_(average[name])

    @contextmanager
    def in_place_of(
        self, parameters: Mapping[str, nn.Parameter], *, average: Mapping[str, Tensor] | None = None
    ) -> Iterator[None]:
        """Put the average into the model while the block runs, and the very same weights back after it.

        Where it is kept for some rows alone, `average` has all of them.
        """
        assert self.updates > 0, "there is no average before the first step"
        live = {name: parameters[name].data for name in self.average}
        average = average or self.average
        try:
            for name, weight in live.items():
                parameters[name].data = average[name].to(weight.device, weight.dtype)
            yield
        finally:
            for name, weight in live.items():
                parameters[name].data = weight
