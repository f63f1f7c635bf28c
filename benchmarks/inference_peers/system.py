"""What a worker asks of every system."""

from typing import Protocol

import torch
from inference_peers.mini import MINI
from inference_peers.tasks import Task


class System(Protocol):
    """Something that serves the model, greedily or by drawing: it makes the tokens' logits and looks at them."""

    def ready(self, task: Task) -> None:
        """Read what the task wants read before the clock starts."""
        ...

    def go(self, task: Task) -> None:
        """Do what is timed."""
        ...


class Tokens:
    """Random tokens, the same for every system: prompts, and what a peer is fed instead of what it chose.

    Random weights would lead every system into a loop of few tokens and experts.
    """

    def __init__(self) -> None:
        self._generator = torch.Generator().manual_seed(1)
        self._long = self.fresh(2048)

    def fresh(self, count: int) -> list[int]:
        """Return tokens that nobody has seen."""
        return torch.randint(2, MINI.vocab_size, (count,), generator=self._generator).tolist()

    def prompt(self, task: Task) -> list[int]:
        """Return a prompt of the task's length. The long one is always the same, so that it can be kept."""
        return self._long if task.context == len(self._long) else self.fresh(task.context)
