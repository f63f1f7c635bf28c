"""Gradients of weights that are put off: nobody waits for them but the optimizer (report 3.2.1, after ZeroBubble)."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

Waiting = list[tuple[Tensor, Callable[[], Tensor]]]
"""Weights, and how to make a gradient of each; what that takes is held as long."""


@dataclass(kw_only=True)
class Later:
    """Is asked by backward passes whether gradients of weights may wait; unless something puts them off they do not."""

    _waiting: Waiting | None = field(default=None)

    @contextmanager
    def into(self, waiting: Waiting) -> Iterator[None]:
        """While the block runs, put gradients off into `waiting`."""
        before, self._waiting = self._waiting, waiting
        try:
            yield
        finally:
            self._waiting = before

    def gradient(self, weight: Tensor, *, make: Callable[[], Tensor]) -> Tensor | None:
        """Return a weight's gradient, or None where it is put off."""
        if self._waiting is None or not weight.is_leaf:  # what a weight was made into passes its gradient on at once
            return make()
        self._waiting.append((weight, make))
        return None


@torch.no_grad()
def make_gradients(waiting: Waiting) -> None:
    """Make all that was put off, first in first out, and add it where autograd would have."""
    for weight, make in waiting:
        gradient = make()
        weight.grad = gradient if weight.grad is None else weight.grad.add_(gradient)
    waiting.clear()
