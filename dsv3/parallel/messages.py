"""What stages of a pipeline send each other: hidden states forward, their gradients back.

Every rank knows the whole schedule, so no message says what it is: those of one rank to another come in the order in
which its schedule makes them.
"""

import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from dsv3.parallel.link import Link
from dsv3.plan.pipeline import Action, Kind, Schedule

AHEAD = 2
"""Messages that a rank is ready to take before it needs them."""


def receiver(schedule: Schedule, action: Action) -> int | None:
    """Return the pipeline rank that waits for what an action makes; None if it stays, or is for nobody."""
    forward = action.kind is Kind.FORWARD
    if action.kind is Kind.WEIGHT:
        return None
    stage = action.stage + (1 if forward else -1)
    if not 0 <= stage < schedule.num_stages:
        return None
    there = schedule.rank_of(Action(Kind.FORWARD, stage, action.micro_batch))
    return None if there == schedule.rank_of(action) else there


@dataclass(kw_only=True)
class _Coming:
    """A message that this rank has got ready for."""

    buffer: Tensor
    works: list[dist.Work]
    sent_at: Tensor | None


@dataclass(kw_only=True)
class Messages:
    """The messages of one run of a schedule, to and from one rank."""

    schedule: Schedule
    group: dist.ProcessGroup
    """The pipeline's ranks, in order."""
    link: Link
    room: Callable[[int], Tensor]
    """Makes room for the hidden states of a micro-batch."""
    _coming: dict[int, list[Action]] = field(init=False)
    """By the rank that they come from, in order."""
    _ready: dict[Action, _Coming] = field(default_factory=dict)
    _num_ready: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    _leaving: list[tuple[dist.Work, Tensor]] = field(default_factory=list)

    def __post_init__(self) -> None:
        me = self.group.rank()
        self._coming = {
            rank: [action for step in steps for action in step if receiver(self.schedule, action) == me]
            for rank, steps in enumerate(self.schedule.steps)
        }

    def send(self, tensor: Tensor, *, action: Action) -> None:
        """Begin to send what an action has made to the rank that waits for it."""
        to = receiver(self.schedule, action)
        assert to is not None
        for part in (tensor.contiguous(), self._now()):
            if part is not None:
                work = dist.isend(part, group=self.group, group_dst=to)
                assert work is not None
                self._leaving.append((work, part))

    def receive(self, action: Action) -> Tensor:
        """Return what an action on another rank has made."""
        source = self.schedule.rank_of(action)
        order = self._coming[source]
        place = order.index(action)
        for one in order[self._num_ready[source] : place + 1 + AHEAD]:
            self._get_ready(one, source=source)
        coming = self._ready.pop(action)
        with self.link.waiting():
            for work in coming.works:
                work.wait()
            if coming.sent_at is not None:
                late = coming.sent_at.item() + self.link.seconds(coming.buffer.nbytes) - time.perf_counter()
                time.sleep(max(0.0, late))
        return coming.buffer

    def finish(self) -> None:
        """Wait until everything that was sent has been taken."""
        with self.link.waiting():
            for work, _ in self._leaving:
                work.wait()
        self._leaving.clear()

    def _get_ready(self, action: Action, *, source: int) -> None:
        buffer = self.room(action.micro_batch)
        sent_at = self._now()
        works = []
        for part in (buffer, sent_at):
            if part is not None:
                work = dist.irecv(part, group=self.group, group_src=source)
                assert work is not None
                works.append(work)
        self._ready[action] = _Coming(buffer=buffer, works=works, sent_at=sent_at)
        self._num_ready[source] += 1

    def _now(self) -> Tensor | None:
        """Return the time, to be sent along where the network is made slower than it is; the clock is the machine's."""
        return torch.tensor([time.perf_counter()], dtype=torch.float64) if self.link.is_slowed else None
