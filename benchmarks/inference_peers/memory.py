"""The yardstick: how fast all threads together read memory, by a sum, which does little else."""

from collections.abc import Callable
from pathlib import Path

import torch
from inference_peers.tasks import Task

BYTES = 2**30


class Memory:
    """A gigabyte of numbers, read once a task."""

    def __init__(self) -> None:
        self._numbers = torch.randn(BYTES // 4)

    def ready(self, task: Task) -> None:
        """Nothing is needed."""

    def go(self, task: Task) -> None:
        del task
        self._numbers.sum()


def build(work: Path) -> Memory:
    del work
    return Memory()


MODES: dict[str, Callable[[Path], Memory]] = {"1 GiB": build}
