"""What ranks wait for: the time it takes is counted, and can be made longer to see what a slower network would do."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch.distributed as dist


@dataclass(kw_only=True)
class Link:
    """The network as one rank sees it. Given a latency or a speed, nothing is there before that time has passed too.

    Time that messages take is counted from when this rank begins, and they do not slow each other down.
    """

    latency_seconds: float = 0.0
    bytes_per_second: float = float("inf")
    waited_seconds: float = 0.0
    """Time this rank has spent waiting, all in all."""

    @property
    def is_slowed(self) -> bool:
        """Whether messages take longer than the network needs."""
        return self.seconds(1) > 0

    def seconds(self, num_bytes: int) -> float:
        """Return how long a message of so many bytes takes at least."""
        return self.latency_seconds + num_bytes / self.bytes_per_second

    def begin(self, num_bytes: int) -> float:
        """Return when a message of so many bytes that begins now may be there."""
        return time.perf_counter() + self.seconds(num_bytes)

    def end(self, work: dist.Work, *, due: float) -> None:
        """Wait until it is there."""
        with self.waiting():
            work.wait()
            time.sleep(max(0.0, due - time.perf_counter()))

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time that the block takes as waiting."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.waited_seconds += time.perf_counter() - began
