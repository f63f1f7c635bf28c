"""What ranks wait for: the time it takes is counted, and can be made longer to see what a slower network would do."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch.distributed as dist

from dsv3.parallel.trace import NETWORK, Trace

# Renamed in torch 2.13, which warns of the old names; 2.11, on which GPUs were tried, has only those.
all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Message:
    """Something under way."""

    num_bytes: int
    began: float
    due: float
    """When it may be there; it may be later."""


@dataclass(kw_only=True)
class Link:
    """The network as one rank sees it. Given a latency, nothing is there before that time has passed too.

    Time that messages take is counted from when this rank begins, and they do not slow each other down.
    """

    latency_seconds: float = 0.0
    waited_seconds: float = 0.0
    """Time this rank has spent waiting, all in all."""
    trace: Trace = field(default_factory=Trace)

    @property
    def is_slowed(self) -> bool:
        """Whether messages take longer than the network needs."""
        return self.latency_seconds > 0

    def begin(self, num_bytes: int) -> Message:
        """Take note of a message of so many bytes that begins now."""
        now = time.perf_counter()
        return Message(num_bytes=num_bytes, began=now, due=now + self.latency_seconds)

    def end(self, work: dist.Work, *, message: Message) -> None:
        """Wait until it is there."""
        asked = time.perf_counter()
        with self.waiting():
            work.wait()
            time.sleep(max(0.0, message.due - time.perf_counter()))
        # When a message came that nobody waited for is known only where the delay was ours.
        there = message.due if self.is_slowed and message.due < asked else time.perf_counter()
        self.trace.note(f"{message.num_bytes:,} bytes", track=NETWORK, start=message.began, end=there)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time that the block takes as waiting."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.waited_seconds += time.perf_counter() - began
