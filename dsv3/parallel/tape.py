"""A backward pass in pieces, so that another chunk's forward pass can be woven into it (report 3.2.1)."""

from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from dsv3.model.interfaces import Part


@dataclass
class Box:
    """What goes over a cut: forward a tensor, and back the sum of its gradients."""

    value: Tensor | None
    gradient: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class _Piece:
    part: Part
    made: list[tuple[GradientEdge, Box]]


@dataclass(kw_only=True)
class Tape:
    """The pieces of one chunk's forward pass. It holds what autograd keeps and nothing else: no tensor that was cut."""

    pieces: list[_Piece] = field(default_factory=list)
    _boxes: dict[int, tuple[Tensor, Tensor, Box]] = field(default_factory=dict)
    """Of the cut at hand, so that a tensor that stands in it twice is cut once."""

    def cut(self, made: Any, part: Part) -> Any:
        """Return a tensor, or a record of tensors, with the same numbers and no past: it ends a piece."""
        passed = self._cut_all(made)
        edges = [(get_gradient_edge(tensor), box) for tensor, _, box in self._boxes.values()]
        self.pieces.append(_Piece(part=part, made=edges))
        self._boxes = {}
        return passed

    def begin(self, given: Tensor) -> tuple[Tensor, Box]:
        """Return what the first piece reads, and the box that its gradient will be found in."""
        box = Box(value=given.detach())
        return _over_a_cut(box), box

    def backward(self) -> Iterator[Part]:
        """Run the pieces, last first, when the gradient of what came after the last is there; yield after each."""
        while self.pieces:
            piece = self.pieces.pop()
            roots = [(edge, box.gradient) for edge, box in piece.made if box.gradient is not None]
            if roots:
                edges, gradients = zip(*roots, strict=True)
                torch.autograd.backward(edges, gradients)
            yield piece.part

    def _cut_all(self, made: Any) -> Any:
        if isinstance(made, Tensor):
            return self._cut_one(made) if made.requires_grad else made
        # Only what cannot change is taken apart: all else is one thing, which both sides share.
        if is_dataclass(made) and not isinstance(made, type) and made.__dataclass_params__.frozen:  # type: ignore[attr-defined]
            parts = {one.name: getattr(made, one.name) for one in fields(made)}
            passed = {name: self._cut_all(value) for name, value in parts.items()}
            changed = {name: value for name, value in passed.items() if value is not parts[name]}
            return replace(made, **changed) if changed else made
        return made

    def _cut_one(self, tensor: Tensor) -> Tensor:
        if id(tensor) not in self._boxes:
            box = Box(value=tensor.detach())
            self._boxes[id(tensor)] = (tensor, _over_a_cut(box), box)
        return self._boxes[id(tensor)][1]


def _over_a_cut(box: Box) -> Tensor:
    return _OverACut.apply(torch.empty(0, requires_grad=True), box)


class _OverACut(torch.autograd.Function):
    """Begins a graph with a tensor without keeping it: a leaf would, as long as the graph is there."""

    @staticmethod
    def forward(ctx: Any, leaf: Tensor, box: Box) -> Tensor:
        del leaf
        ctx.box = box
        value, box.value = box.value, None
        assert value is not None
        return value

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None]:
        box: Box = ctx.box
        box.gradient = gradients[0] if box.gradient is None else box.gradient + gradients[0]
        return None, None
