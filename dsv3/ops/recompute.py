"""Tensors that are not kept for the backward pass but made again in it (report 3.2.3, 'Recomputation').

Autograd keeps what an operation needs for its gradient. Within `made_again` it keeps, instead of the tensors named,
how to make them: memory for a little work. What is computed does not change by a bit.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@contextmanager
def made_again(*recipes: tuple[Tensor, Callable[[], Tensor]], when: bool = True) -> Iterator[None]:
    """While the block runs, keep for backward how to make each tensor, not the tensor; views of it included.

    A recipe must return the very numbers in the same layout, and hold only tensors that are kept anyway. One tensor
    that several operations of the block need is made once, for all of them. Blocks may nest; the inner one rules.
    With `when` False everything is kept as usual.
    """
    if not (when and torch.is_grad_enabled()):
        yield
        return
    forgotten = {tensor.untyped_storage().data_ptr(): _Forgotten(make) for tensor, make in recipes}

    def pack(tensor: Tensor) -> Any:
        source = forgotten.get(tensor.untyped_storage().data_ptr())
        if source is None:
            return tensor
        source.wanted += 1
        return source, tensor.size(), tensor.stride(), tensor.storage_offset()

    with torch.autograd.graph.saved_tensors_hooks(pack, _unpack):
        yield


def _unpack(kept: Any) -> Tensor:
    if isinstance(kept, Tensor):
        return kept
    source, size, stride, offset = kept
    return source.take().as_strided(size, stride, offset)


@dataclass
class _Forgotten:
    make: Callable[[], Tensor]
    wanted: int = 0
    """By operations whose backward pass has not run yet."""
    made: Tensor | None = None

    def take(self) -> Tensor:
        """Return the tensor, and let go of it when this was the last operation that wanted it."""
        if self.made is None:
            with torch.no_grad():
                self.made = self.make()
        made = self.made
        self.wanted -= 1
        if self.wanted <= 0:
            self.made = None
        return made
