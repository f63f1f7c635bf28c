"""Runs a schedule of `plan/schedules.py` for good: the stages of a model, micro-batch by micro-batch, on many ranks.

One rank with the whole model is a pipeline too, of one stage. Where a schedule weaves a forward and a backward chunk
(DualPipe), both are cut into the parts of section 3.2.1 and run by turns:

    backward   COMBINE    MLP                 DISPATCH, MLP(W)    ATTN, ATTN(W)
    forward          ATTN      DISPATCH                      MLP               COMBINE

Rows that one of them sends travel while the other computes. Gradients of weights that a schedule puts off (W of ZB1P,
ZBV, DualPipe) wait in a queue; nothing is computed for them before.
"""

from collections.abc import Generator, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import zip_longest
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from dsv3.model.interfaces import Cut, ModelOutput, Part, keep_whole
from dsv3.parallel.messages import Messages
from dsv3.parallel.tape import Box, Tape
from dsv3.parallel.trace import Trace
from dsv3.plan.pipeline import Action, Kind, Schedule
from dsv3.runtime.later import Later, Waiting, make_gradients


@runtime_checkable
class ChunkWork(Protocol):
    """What is to be done with the micro-batches of a step; the pipeline says when, and with which layers."""

    def steps(
        self,
        micro_batch: int,
        *,
        layers: range,
        hidden: Float[Tensor, "token hidden"] | None,
        cut: Cut,
        later: Later | None,
    ) -> Generator[Part, None, ModelOutput]:
        """Run layers on a micro-batch: `Transformer.steps`."""
        ...

    def loss(self, micro_batch: int, *, layers: range, output: ModelOutput) -> Float[Tensor, ""]:
        """Return what these layers add to the loss, as it is to be differentiated."""
        ...

    def gradients_made(self) -> None:
        """Take note that weights have new gradients."""
        ...


@dataclass(frozen=True, kw_only=True)
class _Chunk:
    """What a forward chunk leaves for its backward one."""

    tape: Tape
    given: Box | None
    """Where the gradient of what it read will be found; None for the first stage."""
    made: GradientEdge | None
    """Of what it has passed on; None for the last stage."""
    loss: Tensor


@dataclass(kw_only=True)
class Pipeline:
    """One rank's run of a schedule over one batch."""

    schedule: Schedule
    rank: int
    layers: tuple[range, ...]
    """Of each stage."""
    work: ChunkWork
    messages: Messages | None = None
    """None where there is one rank."""
    trace: Trace = field(default_factory=Trace)
    _chunks: dict[tuple[int, int], _Chunk] = field(default_factory=dict)
    _waiting: dict[tuple[int, int], Waiting] = field(default_factory=dict)
    _stays: dict[Action, Tensor] = field(default_factory=dict)
    """What stages have made for others of this rank."""
    _later: Later = field(default_factory=Later)
    _cuts: bool = False
    _puts_off: bool = False

    def run(self) -> None:
        """Go through the schedule."""
        steps = self.schedule.steps[self.rank]
        self._cuts = any(len(step) > 1 for step in steps)
        self._puts_off = self._cuts or any(action.kind is Kind.INPUT for step in steps for action in step)
        for step in steps:
            turns = [self._traced(action) for action in reversed(step)]  # the backward chunk begins
            for _ in zip_longest(*turns):
                pass
            for action in step:
                self._hand_on(action)
        if self.messages is not None:
            self.messages.finish()
        assert not any((self._chunks, self._waiting, self._stays)), "a schedule leaves nothing over"

    def _traced(self, action: Action) -> Iterator[None]:
        """Do an action part by part, noting each."""
        parts = self._parts_of(action)
        while True:
            with self.trace.span(str(action)) as name:
                part = next(parts, None)
                if part is not None:
                    name.append(part)
            if part is None:
                return
            yield

    def _parts_of(self, action: Action) -> Iterator[Part]:
        if action.kind is Kind.FORWARD:
            return self._forward(action)
        if action.kind is Kind.WEIGHT:
            return self._weights(action)
        return self._backward(action)

    def _forward(self, action: Action) -> Generator[Part, None, None]:
        place, layers = (action.stage, action.micro_batch), self.layers[action.stage]
        tape, hidden, given = Tape(), None, None
        if action.stage > 0:
            (before,) = self.schedule.needs(action)
            hidden, given = tape.begin(self._take(before))
        output = yield from self.work.steps(
            action.micro_batch,
            layers=layers,
            hidden=hidden,
            cut=tape.cut if self._cuts else keep_whole,
            later=self._later if self._puts_off else None,
        )
        loss = self.work.loss(action.micro_batch, layers=layers, output=output)
        made = None
        if action.stage + 1 < self.schedule.num_stages:
            made = get_gradient_edge(output.before_norm)
            self._stays[action] = output.before_norm.detach()
        self._chunks[place] = _Chunk(tape=tape, given=given, made=made, loss=loss)

    def _backward(self, action: Action) -> Generator[Part, None, None]:
        place = (action.stage, action.micro_batch)
        chunk = self._chunks.pop(place)
        roots: list[GradientEdge] = []
        slopes: list[Tensor] = []
        if chunk.made is not None:
            _, after = self.schedule.needs(action)
            roots.append(chunk.made)
            slopes.append(self._take(after))
        if chunk.loss.requires_grad:  # not where layers without a balance loss are not the last
            roots.append(get_gradient_edge(chunk.loss))
            slopes.append(torch.ones_like(chunk.loss))
        puts_off = action.kind is Kind.INPUT
        waiting: Waiting = []
        pieces = chunk.tape.backward()
        putting_off = partial(self._later.into, waiting) if puts_off or self._cuts else nullcontext
        with putting_off():
            torch.autograd.backward(roots, slopes)
        while True:
            with putting_off():
                part = next(pieces, None)
            if part is None:
                break
            # Those of experts are made while the gradients of their inputs travel: after the next piece has begun that.
            if not puts_off and part is not Part.EXPERTS:
                make_gradients(waiting)
            if part is not Part.HEAD:
                yield part
        if chunk.given is not None:
            assert chunk.given.gradient is not None
            self._stays[action] = chunk.given.gradient
        if puts_off:
            self._waiting[place] = waiting
        else:
            make_gradients(waiting)
        self.work.gradients_made()

    def _weights(self, action: Action) -> Generator[Part, None, None]:
        make_gradients(self._waiting.pop((action.stage, action.micro_batch)))
        self.work.gradients_made()
        yield from ()

    def _take(self, made_by: Action) -> Tensor:
        """Return what an action has made, here or elsewhere."""
        if made_by in self._stays:
            return self._stays.pop(made_by)
        assert self.messages is not None
        return self.messages.receive(made_by)

    def _hand_on(self, action: Action) -> None:
        """Send what an action has made, if another rank waits for it."""
        if action in self._stays and action in self.schedule.carried:
            assert self.messages is not None
            self.messages.send(self._stays.pop(action), action=action)
