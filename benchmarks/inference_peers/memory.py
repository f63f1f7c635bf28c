"""The yardstick: how fast all threads together read memory, by a product with one vector, which does little else."""

from collections.abc import Callable
from pathlib import Path

import torch
from inference_peers.tasks import Task

BYTES = 2**30


class Memory:
    """A gigabyte of weights, read once a task."""

    def __init__(self) -> None:
        self._weights = torch.randn(BYTES // 4 // 8192, 8192)
        self._vector = torch.randn(8192)

    def ready(self, task: Task) -> None:
        """Nothing is needed."""

    def go(self, task: Task) -> None:
        del task
        torch.mv(self._weights, self._vector)


def build(work: Path) -> Memory:
    del work
    return Memory()


MODES: dict[str, Callable[[Path], Memory]] = {"1 GiB": build}
