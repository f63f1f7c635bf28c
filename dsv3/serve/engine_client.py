"""The engine as the HTTP process sees it: requests go in, events come back, each to whoever waits for it."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from dsv3.config import ServerConfig
from dsv3.errors import EngineError
from dsv3.infer.events import EngineStats
from dsv3.serve.inboxes import Inbox, Inboxes
from dsv3.serve.messages import Ask, Cancel, Check, Checked, FromEngine, ProcessSettings, Progress, Ready, Refused
from dsv3.serve.worker import AnyWorker, Worker

GONE = "the engine has ended; the server stops"
STOPPING = "the server stops, and has no more time for this answer"


@dataclass(frozen=True, kw_only=True)
class Member:
    """One of several workers, for those who watch."""

    name: str
    kind: str
    is_up: bool
    num_restarts: int
    num_requests: int
    stats: EngineStats


@dataclass(kw_only=True)
class Transfers:
    """Counts of what goes from worker to worker."""

    num_retries: int = 0
    """Requests that were placed again."""
    num_handed_over: int = 0
    num_bytes: int = 0
    seconds: float = 0.0
    """From the first token until the decoder has all pages, summed."""


@runtime_checkable
class EngineClient(Protocol):
    """What answers requests: one engine, or several that share the work."""

    on_death: Callable[[], None]
    """Called when nothing can be answered any more."""

    @property
    def ready(self) -> Ready:
        """What there is to say of the model."""
        ...

    @property
    def stats(self) -> EngineStats:
        """Counts, as of the newest step."""
        ...

    @property
    def members(self) -> list[Member]:
        """The workers that share the work; none where there is one engine."""
        ...

    @property
    def transfers(self) -> Transfers:
        """Counts of what goes from worker to worker."""
        ...

    @property
    def is_alive(self) -> bool:
        """Whether requests are answered."""
        ...

    @property
    def absent(self) -> list[str]:
        """The kinds of workers of which none is there just now, so that requests wait until one is."""
        ...

    @property
    def is_stopping(self) -> bool:
        """Whether nothing more is answered, because the server was told to end."""
        ...

    @property
    def num_open(self) -> int:
        """Requests that have not ended."""
        ...

    async def start(self) -> None:
        """Return when the model is loaded.

        Raises:
            ConfigError: it cannot be loaded; the message is the engine's.
        """
        ...

    async def stop(self) -> None:
        """End all processes and free everything."""
        ...

    def ask(self, ask: Ask) -> Inbox:
        """Hand a request over; its events come into the queue that is returned.

        Raises:
            EngineError: the engine has ended, or is ending.
        """
        ...

    def forget(self, ids: list[str]) -> None:
        """Cancel those of these requests that have not ended. Their pages are free within a step."""
        ...

    async def end_all(self, *, after_seconds: float) -> None:
        """After some time, cancel what has not ended and tell everyone who waits that the server stops."""
        ...

    async def check(self) -> str:
        """Let the engines check their books; return the fault, empty if there is none."""
        ...


class OneEngine:
    """An `EngineClient` of one process. The server ends with it."""

    def __init__(self, config: ServerConfig) -> None:
        self.is_stopping = False
        self.on_death: Callable[[], None] = lambda: None
        self.members: list[Member] = []
        self.transfers = Transfers()
        self._inboxes = Inboxes()
        self._checks: list[asyncio.Future[str]] = []
        self._worker = Worker(
            ProcessSettings(config), name="engine", on_message=self._take, on_end=lambda _: self._lose_all()
        )

    @property
    def ready(self) -> Ready:
        """What there is to say of the model."""
        return self._worker.ready

    @property
    def stats(self) -> EngineStats:
        """Counts, as of the newest step."""
        return self._worker.stats

    @property
    def is_alive(self) -> bool:
        """Whether requests are answered."""
        return self._worker.is_alive

    @property
    def absent(self) -> list[str]:
        """None: without its one engine the server ends."""
        return []

    @property
    def num_open(self) -> int:
        """Requests that have not ended."""
        return len(self._inboxes)

    async def start(self) -> None:
        """Return when the model is loaded."""
        await self._worker.start()

    async def stop(self) -> None:
        """End the process and free everything."""
        await self._worker.stop()

    def ask(self, ask: Ask) -> Inbox:
        """Hand a request over; its events come into the queue that is returned."""
        if not self.is_alive or self.is_stopping:
            raise EngineError(GONE if not self.is_alive else STOPPING)
        inbox = self._inboxes.open(ask.id)
        self._worker.send(ask)
        return inbox

    def forget(self, ids: list[str]) -> None:
        """Cancel those of these requests that have not ended."""
        if gone := self._inboxes.close(ids):
            self._worker.send(Cancel(gone))

    async def end_all(self, *, after_seconds: float) -> None:
        """After some time, cancel what has not ended and tell everyone who waits that the server stops."""
        await asyncio.sleep(after_seconds)
        self.is_stopping = True
        ids = self._inboxes.ids
        for request_id in ids:
            self._inboxes.fail(request_id, STOPPING)
        self._worker.send(Cancel(ids))

    async def check(self) -> str:
        """Let the engine check its books; return the fault, empty if there is none."""
        answer: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._checks.append(answer)
        self._worker.send(Check())
        return await answer

    def _take(self, worker: AnyWorker, message: FromEngine) -> None:
        del worker
        if isinstance(message, Progress):
            for event in message.events:
                self._inboxes.deliver(event)
        elif isinstance(message, Refused):
            self._inboxes.deliver(message)
        elif isinstance(message, Checked) and self._checks:
            self._checks.pop(0).set_result(message.fault)

    def _lose_all(self) -> None:
        for request_id in self._inboxes.ids:
            self._inboxes.fail(request_id, GONE)
        self.on_death()
