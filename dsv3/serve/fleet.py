"""The processes of a deployment: started side by side, watched, started again when they end or fall silent."""

import asyncio
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from enum import StrEnum

from dsv3.errors import ConfigError
from dsv3.infer.request import EngineStats
from dsv3.runtime.log import get_logger
from dsv3.serve.messages import FromEngine, ProcessSettings, ToEngine
from dsv3.serve.placing import KnownPrefixes, Pace
from dsv3.serve.worker import Worker

log = get_logger(__name__)

MOST_FAILED_STARTS = 5
"""Of a worker one after another, before it is given up."""
PAUSE_SECONDS = (0.2, 30.0)
"""Before a worker is started again: at first, and at most."""
LONG_LIVED_SECONDS = 60.0
"""A worker that lasted so long has not failed to start."""
WATCH_SECONDS = 0.2


class Kind(StrEnum):
    """What a worker does."""

    PREFILL = "prefill"
    DECODE = "decode"


@dataclass(kw_only=True, eq=False)
class Slot:
    """A place for a worker; whoever fills it has the same name."""

    name: str
    kind: Kind
    worker: Worker | None = None
    """None while it is started again."""
    started: float = 0.0
    num_failed_starts: int = 0
    num_restarts: int = 0
    is_given_up: bool = False
    pace: Pace = field(default_factory=Pace)
    prefixes: KnownPrefixes = field(default_factory=lambda: KnownPrefixes(most=1))

    @property
    def is_up(self) -> bool:
        """Whether it takes requests."""
        return self.worker is not None and self.worker.is_alive

    def send(self, message: ToEngine) -> None:
        """Say something to the worker, if there is one."""
        if self.worker is not None:
            self.worker.send(message)


class Fleet:
    """All slots. It knows nothing of requests: `on_loss` and `on_ready` are told which slot became empty, or filled."""

    def __init__(
        self,
        settings: ProcessSettings,
        *,
        numbers: dict[Kind, int],
        on_message: Callable[[Slot, FromEngine], None],
        on_loss: Callable[[Slot, Worker], None],
        on_ready: Callable[[Slot], None],
        on_death: Callable[[], None],
    ) -> None:
        self.slots = [
            Slot(name=f"{kind}-{place}", kind=kind) for kind, count in numbers.items() for place in range(count)
        ]
        self._settings = settings
        self._on_message = on_message
        self._on_loss = on_loss
        self._on_ready = on_ready
        self._on_death = on_death
        self._past = EngineStats()
        """Counts of workers that have ended."""
        self._slot_of: dict[Worker, Slot] = {}
        self._beside: set[asyncio.Task[None]] = set()

    @property
    def is_alive(self) -> bool:
        """Whether some worker of each kind is there, or will be again."""
        return all(any(not slot.is_given_up for slot in self.of(kind)) for kind in Kind)

    @property
    def workers(self) -> list[Worker]:
        """All that there are just now."""
        return [slot.worker for slot in self.slots if slot.worker is not None]

    @property
    def stats(self) -> EngineStats:
        """The sum over all workers, since the start."""
        total = self._past
        for worker in self.workers:
            total = total.plus(worker.stats)
        return total

    def of(self, kind: Kind) -> list[Slot]:
        """Return all slots of a kind."""
        return [slot for slot in self.slots if slot.kind is kind]

    async def start(self) -> None:
        """Start all workers, and return when they have the model.

        Raises:
            ConfigError: it cannot be loaded; the message is the engine's.
        """
        for slot in self.slots:
            slot.worker = self._new_worker(slot)
        ended = await asyncio.gather(*(worker.start() for worker in self.workers), return_exceptions=True)
        for error in ended:
            if isinstance(error, BaseException):
                raise error
        for slot in self.slots:
            self._welcome(slot)

    async def stop(self) -> None:
        """End all processes and free everything."""
        for task in list(self._beside):
            task.cancel()
        if self._beside:
            await asyncio.wait(self._beside)
        await asyncio.gather(*(worker.stop() for worker in self.workers))

    def end_silent(self, *, after_seconds: float) -> None:
        """End workers that have said nothing for so long; idle ones say so every second."""
        for slot in self.slots:
            if slot.worker is None or not slot.worker.is_alive:
                continue
            silent = time.monotonic() - slot.worker.heard
            if silent > after_seconds:
                log.error("%s has said nothing for %.1f seconds, and is ended", slot.name, silent)
                slot.worker.kill()

    def go_beside(self, work: Coroutine[None, None, None]) -> None:
        """Run something until it ends or the fleet is stopped."""
        task = asyncio.ensure_future(work)
        self._beside.add(task)
        task.add_done_callback(self._beside.discard)

    def _new_worker(self, slot: Slot) -> Worker:
        return Worker(self._settings, name=slot.name, on_message=self._take, on_end=self._lose)

    def _take(self, worker: Worker, message: FromEngine) -> None:
        if slot := self._slot_of.get(worker):
            self._on_message(slot, message)

    def _welcome(self, slot: Slot) -> None:
        assert slot.worker is not None
        self._slot_of[slot.worker] = slot
        slot.started = time.monotonic()
        slot.pace, slot.prefixes = Pace(), KnownPrefixes(most=slot.worker.ready.num_pages)
        self._on_ready(slot)

    def _lose(self, worker: Worker) -> None:
        slot = self._slot_of.pop(worker)
        self._past = self._past.plus(worker.stats.counts())
        slot.worker = None
        if time.monotonic() - slot.started > LONG_LIVED_SECONDS:
            slot.num_failed_starts = 0
        self._on_loss(slot, worker)
        self.go_beside(self._start_again(slot, ended=worker))

    async def _start_again(self, slot: Slot, *, ended: Worker) -> None:
        """Fill a slot again, with pauses that grow while nothing lasts in it."""
        await ended.stop()
        while slot.num_failed_starts < MOST_FAILED_STARTS:
            shortest, longest = PAUSE_SECONDS
            await asyncio.sleep(min(longest, shortest * 4**slot.num_failed_starts))
            slot.num_failed_starts += 1  # until it has lasted
            slot.num_restarts += 1
            slot.worker = self._new_worker(slot)
            try:
                await slot.worker.start()
            except ConfigError as error:
                log.error("%s cannot be started again: %s", slot.name, error)
                slot.worker = None
                continue
            log.warning("%s is there again", slot.name)
            self._welcome(slot)
            return
        slot.is_given_up = True
        log.error("%s is given up after %d starts that did not last", slot.name, slot.num_failed_starts)
        if not self.is_alive:
            self._on_death()
