"""The processes of a deployment: started side by side, watched, started again when they end or fall silent.

Those that share the experts of their layers are a group, which begins and ends as a whole: what its ranks were in the
midst of, none of them can go on with alone.
"""

import asyncio
import tempfile
import time
from collections.abc import Callable, Coroutine, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

import msgspec

from dsv3.errors import ConfigError
from dsv3.infer.events import EngineStats
from dsv3.runtime.log import get_logger
from dsv3.serve.messages import FromEngine, ProcessSettings, RankPlace, ToEngine, Wake
from dsv3.serve.placing import KnownPrefixes, Pace
from dsv3.serve.worker import AnyWorker, Worker

log = get_logger(__name__)

MOST_FAILED_STARTS = 5
"""Of a worker one after another, before it is given up."""
PAUSE_SECONDS = (0.2, 30.0)
"""Before a worker is started again: at first, and at most."""
LONG_LIVED_SECONDS = 10.0
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
    worker: AnyWorker | None = None
    """None while it is started again."""
    started: float = 0.0
    num_failed_starts: int = 0
    num_restarts: int = 0
    is_given_up: bool = False
    pace: Pace = field(default_factory=Pace)
    prefixes: KnownPrefixes = field(default_factory=lambda: KnownPrefixes(most=1))
    group: "Group"

    @property
    def is_up(self) -> bool:
        """Whether it takes requests: for that all of its group must be there."""
        return all(slot.worker is not None and slot.worker.is_alive for slot in self.group.slots)

    def send(self, message: ToEngine) -> None:
        """Say something to the worker, if there is one."""
        if self.worker is not None:
            self.worker.send(message)


@dataclass(kw_only=True, eq=False)
class Group:
    """Slots whose workers begin and end together: those that share experts, or one alone."""

    slots: list[Slot] = field(default_factory=list)
    num_woken: int = 0

    @property
    def is_one_alone(self) -> bool:
        """Whether there is nobody to be in step with."""
        return len(self.slots) == 1

    def wake(self) -> None:
        """Tell all ranks that one of them has work, or will have."""
        if not self.is_one_alone:
            self.num_woken += 1
            for slot in self.slots:
                slot.send(Wake(self.num_woken))

    def place_of(self, slot: Slot, *, meeting: str) -> RankPlace | None:
        """Return what a worker is told of the others, whom it finds where all meet."""
        if self.is_one_alone:
            return None
        return RankPlace(
            meeting=meeting,
            rank=self.slots.index(slot),
            size=len(self.slots),
            decodes=slot.kind is Kind.DECODE,
        )


class NewWorker(Protocol):
    """Makes a worker, not started yet."""

    def __call__(
        self,
        settings: ProcessSettings,
        *,
        name: str,
        on_message: Callable[[AnyWorker, FromEngine], None],
        on_end: Callable[[AnyWorker], None],
    ) -> AnyWorker:
        """Return it."""
        ...


class Workplace(Protocol):
    """Where workers run."""

    async def seats(self, kind: Kind, *, count: int) -> Sequence[NewWorker]:
        """Return places for so many workers of a kind, once there are as many.

        Raises:
            ConfigError: there will not be.
        """
        ...

    def meeting(self) -> AbstractContextManager[str]:
        """Keep a place where ranks that share experts find each other, while they begin."""
        ...


class ThisMachine:
    """A `Workplace` with room for all."""

    async def seats(self, kind: Kind, *, count: int) -> Sequence[NewWorker]:
        """Return places for so many workers."""
        del kind
        return [Worker] * count

    def meeting(self) -> AbstractContextManager[str]:
        """Keep a folder, which is of no more use once they have met: nothing stays whatever ends this process."""
        return tempfile.TemporaryDirectory(prefix="dsv3-ranks-")


class Fleet:
    """All slots. It knows nothing of requests: `on_loss` and `on_ready` are told which slot became empty, or filled."""

    def __init__(
        self,
        settings: ProcessSettings,
        *,
        workplace: Workplace,
        numbers: dict[Kind, int],
        on_message: Callable[[Slot, FromEngine], None],
        on_loss: Callable[[Slot, AnyWorker], None],
        on_ready: Callable[[Slot], None],
        on_death: Callable[[], None],
    ) -> None:
        self._settings = settings
        self._workplace = workplace
        self._groups = [group for kind, count in numbers.items() for group in self._groups_of(kind, count=count)]
        self.slots = [slot for group in self._groups for slot in group.slots]
        self._on_message = on_message
        self._on_loss = on_loss
        self._on_ready = on_ready
        self._on_death = on_death
        self._past = EngineStats()
        """Counts of workers that have ended."""
        self._slot_of: dict[AnyWorker, Slot] = {}
        self._beside: set[asyncio.Task[None]] = set()

    @property
    def is_alive(self) -> bool:
        """Whether some worker of each kind is there, or will be again."""
        return all(any(not slot.is_given_up for slot in self.of(kind)) for kind in Kind)

    @property
    def absent(self) -> list[str]:
        """The kinds of which no worker is there just now, so that requests wait."""
        return [kind.value for kind in Kind if not any(slot.is_up for slot in self.of(kind))]

    @property
    def workers(self) -> list[AnyWorker]:
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
        starts = [asyncio.ensure_future(self._start_group(group)) for group in self._groups]
        try:
            await asyncio.gather(*starts)
        except BaseException:
            for start in starts:
                start.cancel()
            await asyncio.gather(*starts, return_exceptions=True)
            raise
        for group in self._groups:
            self._welcome(group)

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

    def _groups_of(self, kind: Kind, *, count: int) -> list[Group]:
        """Return the groups of one kind: one of all workers where they share experts, else one for each."""
        size = count if self._settings.config.expert_parallel else 1
        groups = [Group() for _ in range(count // size)]
        for place in range(count):
            group = groups[place // size]
            group.slots.append(Slot(name=f"{kind}-{place}", kind=kind, group=group))
        return groups

    async def _start_group(self, group: Group) -> None:
        """Start all workers of a group, and return when they have the model; if one has not, end the others."""
        group.num_woken = 0
        seats = await self._workplace.seats(group.slots[0].kind, count=len(group.slots))
        with nullcontext("") if group.is_one_alone else self._workplace.meeting() as meeting:
            workers = []
            for slot, new_worker in zip(group.slots, seats, strict=True):
                settings = msgspec.structs.replace(self._settings, place=group.place_of(slot, meeting=meeting))
                slot.worker = new_worker(settings, name=slot.name, on_message=self._take, on_end=self._lose)
                workers.append(slot.worker)
            await start_together(workers)

    def _take(self, worker: AnyWorker, message: FromEngine) -> None:
        if slot := self._slot_of.get(worker):
            self._on_message(slot, message)

    def _welcome(self, group: Group) -> None:
        for slot in group.slots:
            assert slot.worker is not None
            self._slot_of[slot.worker] = slot
            slot.started = time.monotonic()
            slot.pace, slot.prefixes = Pace(), KnownPrefixes(most=slot.worker.ready.num_pages)
        ended = [slot.worker for slot in group.slots if slot.worker is not None and not slot.worker.is_alive]
        if ended:
            self._lose(ended[0])
            return
        for slot in group.slots:
            self._on_ready(slot)

    def _lose(self, worker: AnyWorker) -> None:
        if worker not in self._slot_of:  # It was ready, and others are not yet: `_welcome` will see.
            return
        group = self._slot_of[worker].group
        ended: list[tuple[Slot, AnyWorker]] = []
        for slot in group.slots:
            assert slot.worker is not None
            ended.append((slot, slot.worker))
            del self._slot_of[slot.worker]
            self._past = self._past.plus(slot.worker.stats.counts())
            slot.worker.abandon()
            slot.worker = None
            if time.monotonic() - slot.started > LONG_LIVED_SECONDS:
                slot.num_failed_starts = 0
        if len(ended) > 1:
            names = ", ".join(slot.name for slot in group.slots)
            log.error("%s share experts: they are all started again, since %s ended", names, worker.name)
        for slot, one in ended:
            self._on_loss(slot, one)
        self.go_beside(self._start_again(group, ended=[one for _, one in ended]))

    async def _start_again(self, group: Group, *, ended: list[AnyWorker]) -> None:
        """Fill the slots of a group again, with pauses that grow while nothing lasts in them."""
        await asyncio.gather(*(worker.stop() for worker in ended))
        names = ", ".join(slot.name for slot in group.slots)
        while (failed := max(slot.num_failed_starts for slot in group.slots)) < MOST_FAILED_STARTS:
            shortest, longest = PAUSE_SECONDS
            await asyncio.sleep(min(longest, shortest * 4**failed))
            for slot in group.slots:
                slot.num_failed_starts += 1  # until it has lasted
                slot.num_restarts += 1
            try:
                await self._start_group(group)
            except ConfigError as error:
                log.error("%s cannot be started again: %s", names, error)
                for slot in group.slots:
                    slot.worker = None
                continue
            log.warning("%s is there again", names)
            self._welcome(group)
            return
        for slot in group.slots:
            slot.is_given_up = True
        log.error("%s is given up after %d starts that did not last", names, failed)
        if not self.is_alive:
            self._on_death()


async def start_together(workers: list[AnyWorker]) -> None:
    """Start workers, and return when all have the model; if one cannot load it, end the others.

    Raises:
        ConfigError: it cannot be loaded; the message is the engine's.
    """
    starts = [asyncio.ensure_future(worker.start()) for worker in workers]
    try:
        done, _ = await asyncio.wait(starts, return_when=asyncio.FIRST_EXCEPTION)
        errors = [error for start in done if (error := start.exception()) is not None]
        if errors:
            raise errors[0]
    except BaseException:
        for worker in workers:
            worker.abandon()
        await asyncio.gather(*starts, return_exceptions=True)
        await asyncio.gather(*(worker.stop() for worker in workers))
        raise
