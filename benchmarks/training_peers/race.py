"""Contenders at one size that get warm, then take turns: a step each, round after round."""

import math
import time
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from claims.process import Contender, Worker, WorkerError
from training_peers.sizes import SIZES
from training_peers.timings import Timings

OURS = Contender("dsv3", "same work")
WHOLE_LOSS = Contender("dsv3", "whole V3 loss")
SGEMM = Contender("sgemm", "2048^3")
EAGER_EXPERTS = Contender("transformers", "eager experts")
GROUPED = Contender("transformers", "grouped_mm")
COMPILED = Contender("transformers", "grouped_mm, compiled")
TORCHTITAN = Contender("torchtitan", "sdpa, FP32 experts")
SAME_WORK = (OURS, EAGER_EXPERTS, GROUPED, COMPILED, TORCHTITAN)
NEEDED = (OURS, WHOLE_LOSS, SGEMM)

FIRST_LOSS_TOLERANCE = 0.1
"""How far from log(vocabulary) the loss of small random weights may lie, in nats."""


class Race:
    """The workers of one size."""

    def __init__(self, size: str, *, scratch: Path) -> None:
        self.size = size
        self.workers: dict[Contender, Worker] = {}
        self.absent: dict[Contender, str] = {}
        """Why a contender is not in it."""
        self._scratch = scratch

    def warm_up(self, contender: Contender, *, threads: int) -> None:
        """Let a contender get warm on so many threads; start it first if it has not been. One that fails is absent."""
        new = contender not in self.workers
        if new:
            self.workers[contender] = Worker(
                "training_peers.worker", [contender.system, contender.mode, self.size], scratch=self._scratch
            )
        try:
            answer = self.workers[contender].ask({"threads": threads})
        except WorkerError as error:
            self._drop(contender, reason=str(error))
            return
        if new and contender in SAME_WORK:
            self._check_same_work(contender, answer=answer)

    def take_turns(
        self, contenders: Collection[Contender], *, seconds: float, min_rounds: int
    ) -> dict[Contender, Timings]:
        """Time those of the contenders that are warm, a step each in turn, for so long and so many rounds at least."""
        timings = {contender: Timings() for contender in contenders if contender in self.workers}
        end = time.monotonic() + seconds
        rounds = 0
        while rounds < min_rounds or time.monotonic() < end:
            for contender in list(timings):
                try:
                    timings[contender].add(self.workers[contender].ask({"steps": 1}))
                except WorkerError as error:
                    self._drop(contender, reason=str(error))
                    del timings[contender]
            rounds += 1
        return timings

    def close(self) -> None:
        """End all workers."""
        for worker in self.workers.values():
            worker.close()
        self.workers = {}

    def _check_same_work(self, contender: Contender, *, answer: dict[str, Any]) -> None:
        size = SIZES[self.size]
        found = answer["num_trained"]
        assert found == size.parameters, f"{contender} trains {found:,} parameters, not {size.parameters:,}"
        expected = math.log(size.model.vocab_size)
        loss = answer["first_loss"]
        assert abs(loss - expected) < FIRST_LOSS_TOLERANCE, f"{contender} begins at {loss:.3f}, not {expected:.3f} nats"

    def _drop(self, contender: Contender, *, reason: str) -> None:
        if contender in NEEDED:
            raise WorkerError(f"{contender}, without which there is nothing to compare: {reason}")
        self.absent[contender] = reason
        self.workers.pop(contender).close()


def together(jobs: Iterable[Callable[[], None]]) -> None:
    """Run jobs two at a time: a system that compiles keeps little more than one core busy."""
    with ThreadPoolExecutor(2) as pool:
        for future in [pool.submit(job) for job in jobs]:
            future.result()
