"""Tensors that are not kept for the backward pass but made again in it (report 3.2.3, 'Recomputation').

Autograd keeps what an operation needs for its gradient. Within `made_again` it keeps, instead of the tensors named,
how to make them: memory for a little work. What is computed does not change by a bit, unless a recipe says so: the
FP8 recipes keep two tensors in a narrower format, and what is made from that is not quite what was there.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Forget = Callable[[Tensor, Callable[[], Tensor]], None]

_scope: ContextVar["_Scope | None"] = ContextVar("_scope", default=None)
"""The innermost block, as autograd itself has only its innermost hooks act."""


@contextmanager
def made_again(
    *recipes: tuple[Tensor, Callable[[], Tensor]], when: bool = True, outputs: bool = False
) -> Iterator[Forget]:
    """While the block runs, keep for backward how to make each tensor, not the tensor; views of it included.

    A recipe must return the very numbers in the same layout, and hold only tensors that are kept anyway. One tensor
    that several operations of the block need is made once, for all of them. Blocks may nest; the inner one rules.
    With `when` False everything is kept as usual.

    What is yielded forgets a tensor that only came to be inside the block, such as an output that its own operation
    keeps: call it with the tensor and its recipe, before the block ends. That takes `outputs`.
    """
    if not torch.is_grad_enabled() or not (outputs or (when and recipes)):
        yield _forget_nothing
        return
    scope = _Scope({_memory(tensor): _Forgotten(make) for tensor, make in recipes if when})
    token = _scope.set(scope)
    try:
        with torch.autograd.graph.saved_tensors_hooks(scope.pack if not outputs else scope.hold, _unpack):
            yield scope.forget
    finally:
        _scope.reset(token)


def is_made_again(tensor: Tensor) -> bool:
    """Whether an operation that keeps this tensor now would keep how to make it instead."""
    scope = _scope.get()
    return scope is not None and torch.is_grad_enabled() and _memory(tensor) in scope.forgotten


@dataclass
class _Scope:
    forgotten: dict[int, "_Forgotten"]
    """By the memory of a tensor."""
    held: list["_Held"] = field(default_factory=list)

    def pack(self, tensor: Tensor) -> Any:
        """Return what to keep instead of a tensor."""
        source = self.forgotten.get(_memory(tensor))
        return tensor if source is None else source.view_like(tensor)

    def hold(self, tensor: Tensor) -> Any:
        """Return the same, in a shape that may still be changed when the operation is over."""
        self.held.append(_Held(self.pack(tensor)))
        return self.held[-1]

    def forget(self, tensor: Tensor, make: Callable[[], Tensor]) -> None:
        """Let go of a tensor kept in this block, unless it is a part of something larger that is kept."""
        if not tensor.is_contiguous() or tensor.untyped_storage().nbytes() != tensor.nbytes:
            return
        source = _Forgotten(make)
        for held in self.held:
            if isinstance(held.kept, Tensor) and _memory(held.kept) == _memory(tensor):
                held.kept = source.view_like(held.kept)


@dataclass
class _Held:
    kept: Any


def _forget_nothing(tensor: Tensor, make: Callable[[], Tensor]) -> None:
    pass


def _memory(tensor: Tensor) -> int:
    """Return what all views of one memory share; its address would be 0 for all tensors that have none."""
    return tensor.untyped_storage()._cdata


def _unpack(kept: Any) -> Tensor:
    if isinstance(kept, _Held):
        kept = kept.kept
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

    def view_like(self, tensor: Tensor) -> tuple[Any, ...]:
        """Return how to find, in what will be made, what `tensor` is in what was there."""
        self.wanted += 1
        return self, tensor.size(), tensor.stride(), tensor.storage_offset()

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
