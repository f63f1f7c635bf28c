"""What stages of a pipeline send each other: hidden states forward, their gradients back.

Every rank knows the whole schedule, so no message says what it is: those of one rank to another come in the order in
which its schedule makes them.
"""

import time
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from dsv3.parallel.link import Link
from dsv3.plan.pipeline import Action, Schedule
from dsv3.plan.stages import MESSAGES_AHEAD


@dataclass(kw_only=True)
class _Coming:
    """A message that this rank has got ready for."""

    buffer: Tensor
    works: list[dist.Work]
    sent_at: Tensor | None


@dataclass(frozen=True, kw_only=True)
class _Leaving:
    """A message on its way from here."""

    work: dist.Work
    tensor: Tensor
    """Kept until it has gone."""
    taken_in: int
    """Step of its receiver that it is for."""


@dataclass(kw_only=True)
class Messages:
    """The messages of one run of a schedule, to and from one rank."""

    schedule: Schedule
    towards_last: dist.ProcessGroup
    """The pipeline's ranks, in order: the channel of messages to ranks of a higher number."""
    towards_first: dist.ProcessGroup
    """The same ranks: that of messages to lower ones."""
    link: Link
    room: Callable[[int], Tensor]
    """Makes room for the hidden states of a micro-batch."""
    _coming: dict[int, list[Action]] = field(init=False)
    """By the rank that they come from, in order."""
    _step_of: dict[Action, int] = field(init=False)
    """Which step of its rank each action is."""
    _ready: dict[Action, _Coming] = field(default_factory=dict)
    _num_ready: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    _leaving: dict[int, deque[_Leaving]] = field(default_factory=lambda: defaultdict(deque))
    """By the rank that they go to, in order."""

    def __post_init__(self) -> None:
        schedule, me = self.schedule, self.towards_last.rank()
        for_me = {made for made, wanted in schedule.carried.items() if schedule.rank_of(wanted) == me}
        self._coming = {
            rank: [action for step in steps for action in step if action in for_me]
            for rank, steps in enumerate(schedule.steps)
        }
        self._step_of = {
            action: number for steps in schedule.steps for number, step in enumerate(steps) for action in step
        }

    def send(self, tensor: Tensor, *, action: Action) -> None:
        """Begin to send what an action has made to the rank that waits for it."""
        wanted = self.schedule.carried[action]
        to = self.schedule.rank_of(wanted)
        for part in (tensor.contiguous(), self._now()):
            if part is not None:
                work = dist.isend(part, group=self._channel(self.towards_last.rank(), to), group_dst=to)
                assert work is not None
                self._leaving[to].append(_Leaving(work=work, tensor=part, taken_in=self._step_of[wanted]))

    def receive(self, action: Action) -> Tensor:
        """Return what an action on another rank has made."""
        source = self.schedule.rank_of(action)
        order = self._coming[source]
        for one in order[self._num_ready[source] : order.index(action) + 1 + MESSAGES_AHEAD]:
            self._get_ready(one, source=source)
        coming = self._ready.pop(action)
        with self.link.waiting():
            for work in coming.works:
                work.wait()
            if coming.sent_at is not None:
                late = coming.sent_at.item() + self.link.latency_seconds - time.perf_counter()
                time.sleep(max(0.0, late))
        # That rank has done this step, so it has taken what it needed for it: no wait, and the memory is free.
        leaving = self._leaving[source]
        while leaving and leaving[0].taken_in <= self._step_of[action]:
            leaving.popleft().work.wait()
        return coming.buffer

    def finish(self) -> None:
        """Wait until everything that was sent has been taken."""
        with self.link.waiting():
            for leaving in self._leaving.values():
                while leaving:
                    leaving.popleft().work.wait()

    def _get_ready(self, action: Action, *, source: int) -> None:
        buffer = self.room(action.micro_batch)
        sent_at = self._now()
        works = []
        for part in (buffer, sent_at):
            if part is not None:
                work = dist.irecv(part, group=self._channel(source, self.towards_last.rank()), group_src=source)
                assert work is not None
                works.append(work)
        self._ready[action] = _Coming(buffer=buffer, works=works, sent_at=sent_at)
        self._num_ready[source] += 1

    def _channel(self, source: int, to: int) -> dist.ProcessGroup:
        return self.towards_last if source < to else self.towards_first

    def _now(self) -> Tensor | None:
        """Return the time, to be sent along where the network is made slower than it is; the clock is the machine's."""
        return torch.tensor([time.perf_counter()], dtype=torch.float64) if self.link.is_slowed else None
