"""What a worker asks of every system, and how every peer takes its step."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

LEARNING_RATE = 3e-4
BETAS = (0.9, 0.95)
EPSILON = 1e-8
WEIGHT_DECAY = 0.1
CLIP_GRADIENT_NORM = 1.0


class System(Protocol):
    """Something that trains, and is timed step by step."""

    num_trained: int
    """Parameters that gradients reach."""

    def step(self, rows: Tensor) -> float:
        """Train on packed rows of T + 1 tokens; return the loss."""
        ...


class PeerSystem:
    """A peer's model under torch's own training loop, with the fastest CPU setting of each of its parts.

    Fused AdamW and foreach clipping. `loss_of` maps rows to the loss; it may be compiled.
    """

    def __init__(self, model: nn.Module, *, loss_of: Callable[[Tensor], Tensor]) -> None:
        self.loss_of = loss_of
        self.parameters = list(model.parameters())
        self.num_trained = sum(parameter.numel() for parameter in self.parameters)
        groups = [
            {"params": [p for p in self.parameters if p.dim() >= 2], "weight_decay": WEIGHT_DECAY},
            {"params": [p for p in self.parameters if p.dim() < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=BETAS, eps=EPSILON, fused=True)

    def step(self, rows: Tensor) -> float:
        loss = self.loss_of(rows)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, CLIP_GRADIENT_NORM, foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()
