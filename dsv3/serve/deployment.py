"""Prefill and decoding apart (report 3.4): workers of both kinds, and the router that places requests and keeps count.

A request goes this way: a decoder keeps room for it; a reader gets it, reads the prompt, and sends its pages on while
it reads; the reader draws the first token, which is told; the decoder has all pages and goes on. Room comes first, so
that no reader ever holds pages for a decoder that has none, and what is under way is bounded.

Every token that has been told is known here, and draws depend on seed and place alone. So whatever ends a worker, its
requests are placed again with the tokens they have, and go on as they would have gone on; whoever reads the answer
sees a pause. See docs/decisions/0008-deployment.md.
"""

import asyncio
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import msgspec

from dsv3.config import ServerConfig
from dsv3.errors import EngineError
from dsv3.infer.events import EngineStats, FinishReason, TokenEvent
from dsv3.infer.pages import Key, page_keys
from dsv3.runtime.cores import available_cores
from dsv3.runtime.log import get_logger
from dsv3.serve.engine_client import GONE, STOPPING, Member, Transfers
from dsv3.serve.fleet import WATCH_SECONDS, Fleet, Kind, Slot, ThisMachine
from dsv3.serve.inboxes import Inbox, Inboxes
from dsv3.serve.machines import Machines
from dsv3.serve.messages import (
    Adopted,
    Ask,
    Cancel,
    Check,
    Checked,
    Expect,
    FromEngine,
    HandTo,
    Leave,
    Lost,
    ProcessSettings,
    Progress,
    Ready,
    Refused,
    Room,
)
from dsv3.serve.placing import Decoding, Reading, choose_decoder, choose_reader
from dsv3.serve.worker import NOT_READY, AnyWorker

log = get_logger(__name__)

MOST_ATTEMPTS = 4
"""To answer one request, before its client is told that it failed; some request may be what ends the workers."""
TOKENS_AN_ATTEMPT = 64
"""For so many tokens told there may be one attempt more: a long answer outlives many workers."""


@dataclass(kw_only=True, eq=False)
class Task:
    """A request on its way."""

    ask: Ask
    number: int
    """In order of arrival."""
    keys: list[Key]
    """Of the prompt's full pages."""
    tokens: list[int] = field(default_factory=list)
    """Of the answer, as they have been told."""
    num_cached: int | None = None
    attempt: int = 0
    reader: Slot | None = None
    decoder: Slot | None = None
    first_page: int = 0
    """The first that the decoder lacks."""
    is_adopted: bool = False
    moving_since: float | None = None
    """When its first token of this attempt was told."""
    early: list[TokenEvent] = field(default_factory=list)
    """What the decoder has said before the reader was heard to be done: two lines, and no order between them."""

    @property
    def id(self) -> str:
        """What the workers know it by; every attempt is another one to them."""
        return f"{self.ask.id}#{self.attempt}"

    @property
    def num_tokens(self) -> int:
        """Tokens that there are to be read."""
        return len(self.ask.prompt_ids) + len(self.tokens)


class Deployment:
    """An `EngineClient` of several processes."""

    def __init__(self, config: ServerConfig) -> None:
        self.is_stopping = False
        self.on_death: Callable[[], None] = lambda: None
        self.transfers = Transfers()
        self._config = config
        workers = config.prefill_workers + config.decode_workers
        threads = config.threads or max(1, available_cores() // workers)
        numbers = {Kind.PREFILL: config.prefill_workers, Kind.DECODE: config.decode_workers}
        self._machines = Machines(config) if config.workers_at else None
        # What only the server is to know stays here: the settings may go to other machines.
        told = replace(config, threads=threads, api_keys=(), workers_at="", secret="")
        self._fleet = Fleet(
            ProcessSettings(told, secret=secrets.token_hex(16)),
            workplace=self._machines or ThisMachine(),
            numbers=numbers,
            on_message=self._take,
            on_loss=self._lose,
            on_ready=lambda _: self._place_parked(),
            on_death=self._die,
        )
        self._at: dict[Slot, set[Task]] = {slot: set() for slot in self._fleet.slots}
        """What each worker has, or is about to get."""
        self._inboxes = Inboxes()
        self._tasks: dict[str, Task] = {}
        """By the id that workers know."""
        self._asked: dict[str, Task] = {}
        """By the id that was asked with."""
        self._num_asked = 0
        self._parked: list[Task] = []
        """For which there is no worker just now."""
        self._checks: dict[AnyWorker, list[asyncio.Future[str]]] = {}
        self._ready = NOT_READY

    # ---- what a server needs ----

    @property
    def ready(self) -> Ready:
        """What there is to say of the model; pages are those of all decoders."""
        return self._ready

    @property
    def is_alive(self) -> bool:
        """Whether requests are answered, if perhaps later."""
        return self._fleet.is_alive

    @property
    def absent(self) -> list[str]:
        """The kinds of which no worker is there just now, so that requests wait."""
        return self._fleet.absent

    @property
    def num_open(self) -> int:
        """Requests that have not ended."""
        return len(self._inboxes)

    @property
    def members(self) -> list[Member]:
        """All workers, those that are being started again among them."""
        return [
            Member(
                name=slot.name,
                kind=slot.kind,
                is_up=slot.is_up,
                num_restarts=slot.num_restarts,
                num_requests=len(self._at[slot]),
                stats=slot.worker.stats if slot.worker is not None else EngineStats(),
            )
            for slot in self._fleet.slots
        ]

    @property
    def stats(self) -> EngineStats:
        """The sum over all workers, since the start; requests are counted where they end."""
        total = self._fleet.stats
        return replace(total, finished={k: v for k, v in total.finished.items() if k != FinishReason.HANDED_OVER})

    async def start(self) -> None:
        """Start all workers, and return when they have the model.

        Raises:
            ConfigError: it cannot be loaded, with the engine's message; or no machines bring the workers in time.
        """
        if self._machines is not None:
            await self._machines.open()
        await self._fleet.start()
        if self._machines is not None:
            self._machines.wait_for_ever()
        decoders = [slot.worker.ready for slot in self._fleet.of(Kind.DECODE) if slot.worker is not None]
        limit = min(worker.ready.context_limit for worker in self._fleet.workers)
        pages = sum(ready.num_pages for ready in decoders)
        self._ready = msgspec.structs.replace(decoders[0], context_limit=limit, num_pages=pages)
        self._fleet.go_beside(self._watch())

    async def stop(self) -> None:
        """End all processes and free everything."""
        self.is_stopping = True
        await self._fleet.stop()
        if self._machines is not None:
            await self._machines.close()

    def ask(self, ask: Ask) -> Inbox:
        """Hand a request over; its events come into the queue that is returned.

        Raises:
            EngineError: nothing can be answered any more.
        """
        if not self.is_alive or self.is_stopping:
            raise EngineError(STOPPING if self.is_stopping else GONE)
        inbox = self._inboxes.open(ask.id)
        if ask.params.seed is None:  # It must go on elsewhere as it would have here.
            ask = msgspec.structs.replace(ask, params=replace(ask.params, seed=secrets.randbits(62)))
        keys = page_keys(ask.prompt_ids, page_tokens=self._ready.page_tokens)
        self._num_asked += 1
        task = Task(ask=ask, number=self._num_asked, keys=keys if self._config.engine.prefix_caching else [])
        self._asked[ask.id] = task
        self._place(task)
        return inbox

    def forget(self, ids: list[str]) -> None:
        """Cancel those of these requests that have not ended."""
        self._inboxes.close(ids)
        for request_id in ids:
            if task := self._asked.get(request_id):
                self._end(task)

    async def end_all(self, *, after_seconds: float) -> None:
        """After some time, cancel what has not ended and tell everyone who waits that the server stops."""
        await asyncio.sleep(after_seconds)
        self.is_stopping = True
        ids = self._inboxes.ids
        for request_id in ids:
            self._inboxes.fail(request_id, STOPPING)
        self.forget(ids)

    async def check(self) -> str:
        """Let all workers check their books; return the faults, empty if there are none."""
        faults = [(worker.name, await self._check(worker)) for worker in self._fleet.workers if worker.is_alive]
        return "; ".join(f"{name}: {fault}" for name, fault in faults if fault)

    async def _check(self, worker: AnyWorker) -> str:
        answer: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._checks.setdefault(worker, []).append(answer)
        worker.send(Check())
        return await answer

    # ---- a request's way ----

    def _place(self, task: Task) -> None:
        """Let a decoder keep room for a request."""
        slots = [slot for slot in self._fleet.of(Kind.DECODE) if slot.is_up]
        if not slots:
            self._parked.append(task)
            return
        task.decoder = slots[choose_decoder([self._decoding(slot, task) for slot in slots])]
        self._at[task.decoder].add(task)
        task.decoder.prefixes.add(task.keys)
        self._tasks[task.id] = task
        task.decoder.send(Expect(self._ask(task)))

    def _let_read(self, task: Task) -> None:
        """Let a reader have a request for which there is room."""
        assert task.decoder is not None
        slots = [slot for slot in self._fleet.of(Kind.PREFILL) if slot.is_up]
        if not slots:
            self._parked.append(task)
            return
        task.reader = slots[choose_reader([self._reading(slot, task) for slot in slots])]
        self._at[task.reader].add(task)
        task.reader.prefixes.add(task.keys)
        assert task.decoder.worker is not None
        address = task.decoder.worker.ready.address
        task.reader.send(self._ask(task, hand_to=HandTo(address, task.first_page)))
        task.reader.group.wake()

    def _has_read(self, task: Task, event: TokenEvent) -> None:
        """Tell the first token of an attempt, and what the decoder has said by then."""
        assert task.reader is not None
        self._at[task.reader].discard(task)
        task.reader = None
        if task.num_cached is None:
            task.num_cached = event.num_cached_tokens
        if event.finish_reason is not FinishReason.HANDED_OVER:
            self._tell(task, event)
            return
        task.moving_since = time.monotonic()
        self._tell(task, replace(event, finish_reason=None))
        early, task.early = task.early, []
        for one in early:
            self._tell(task, one)

    def _tell(self, task: Task, event: TokenEvent) -> None:
        task.tokens += event.tokens
        cached = task.num_cached or 0
        self._inboxes.deliver(replace(event, id=task.ask.id, num_cached_tokens=cached))
        if event.finish_reason is not None:
            self._end(task)

    def _place_again(self, task: Task, why: str) -> None:
        """Give up an attempt and begin another one with the tokens there are."""
        self._withdraw(task)
        task.attempt += 1
        task.early, task.is_adopted, task.moving_since = [], False, None
        if task.attempt >= MOST_ATTEMPTS + len(task.tokens) // TOKENS_AN_ATTEMPT:
            self._inboxes.fail(task.ask.id, f"given up after {task.attempt} attempts; the last one ended because {why}")
            self._end(task)
            return
        log.warning("request %s is placed again with %d tokens told, because %s", task.ask.id, len(task.tokens), why)
        self.transfers.num_retries += 1
        self._place(task)

    def _end(self, task: Task) -> None:
        """Forget a request, here and wherever it is."""
        self._withdraw(task)
        self._asked.pop(task.ask.id, None)

    def _withdraw(self, task: Task) -> None:
        self._tasks.pop(task.id, None)
        if task in self._parked:
            self._parked.remove(task)
        for slot in (task.reader, task.decoder):
            if slot is not None:
                self._at[slot].discard(task)
                slot.send(Cancel([task.id]))
        task.reader = task.decoder = None

    def _ask(self, task: Task, *, hand_to: HandTo | None = None) -> Ask:
        return msgspec.structs.replace(task.ask, id=task.id, answer_ids=list(task.tokens), hand_to=hand_to)

    # ---- what workers say ----

    def _take(self, slot: Slot, message: FromEngine) -> None:
        if isinstance(message, Progress):
            if slot.group.is_one_alone:  # others go in step, and are as fast as each other
                slot.pace.take(message.stats)
            for event in message.events:
                self._take_event(slot, event)
            return
        if isinstance(message, Adopted):
            slot.group.wake()  # whoever has asked may have left, but the worker has work
        if isinstance(message, Checked):
            assert slot.worker is not None
            self._checks[slot.worker].pop(0).set_result(message.fault)
        elif isinstance(message, Refused | Room | Adopted | Lost) and (task := self._tasks.get(message.id)):
            if isinstance(message, Refused):
                self._inboxes.deliver(msgspec.structs.replace(message, id=task.ask.id))
                self._end(task)
            elif isinstance(message, Room):
                task.first_page = message.first_page
                self._let_read(task)
            elif isinstance(message, Lost):
                self._place_again(task, f"its pages did not reach {slot.name}: {message.reason}")
            else:
                self._has_moved(task, message)

    def _take_event(self, slot: Slot, event: TokenEvent) -> None:
        task = self._tasks.get(event.id)
        if task is None or event.finish_reason is FinishReason.CANCELLED:
            return
        if slot is task.reader:
            self._has_read(task, event)
        elif task.reader is not None:
            task.early.append(event)
        else:
            self._tell(task, event)

    def _has_moved(self, task: Task, adopted: Adopted) -> None:
        task.is_adopted = True
        self.transfers.num_handed_over += 1
        self.transfers.num_bytes += adopted.num_bytes
        if task.moving_since is not None:
            self.transfers.seconds += time.monotonic() - task.moving_since

    # ---- workers come and go ----

    def _place_parked(self) -> None:
        parked, self._parked = self._parked, []
        for task in parked:
            if task.decoder is None:
                self._place(task)
            else:
                self._let_read(task)

    def _lose(self, slot: Slot, worker: AnyWorker) -> None:
        """Place the requests of a worker that has ended again."""
        for answer in self._checks.pop(worker, []):
            answer.set_result("")
        if slot.kind is Kind.DECODE:
            for other in self._fleet.of(Kind.PREFILL):
                other.send(Leave(worker.ready.address))
        for task in sorted(self._at[slot], key=lambda task: task.number):
            self._place_again(task, f"{slot.name} ended")

    def _die(self) -> None:
        for request_id in self._inboxes.ids:
            self._inboxes.fail(request_id, GONE)
        self.on_death()

    async def _watch(self) -> None:
        """Find workers that have ceased to speak, and transfers that do not end."""
        while True:
            began = time.monotonic()
            await asyncio.sleep(WATCH_SECONDS)
            now = time.monotonic()
            if now - began > 5 * WATCH_SECONDS:
                continue  # It was this process that stood still, or the machine: what was said has not been heard yet.
            self._fleet.end_silent(after_seconds=self._config.worker_timeout_seconds)
            for task in list(self._tasks.values()):
                since = task.moving_since
                if since is not None and not task.is_adopted and now - since > self._config.transfer_timeout_seconds:
                    self._place_again(task, f"its pages were under way for {now - since:.1f} seconds")

    # ---- small things ----

    def _reading(self, slot: Slot, task: Task) -> Reading:
        size = self._ready.page_tokens
        return Reading(
            pending_tokens=sum(one.num_tokens for one in self._at[slot]),
            new_tokens=max(1, task.num_tokens - slot.prefixes.find(task.keys) * size),
            seconds_per_token=slot.pace.seconds_per_token,
        )

    def _decoding(self, slot: Slot, task: Task) -> Decoding:
        assert slot.worker is not None
        return Decoding(
            num_requests=len(self._at[slot]),
            most_requests=self._config.engine.max_sequences,
            pages=sum(self._pages_of(one) for one in self._at[slot]),
            most_pages=slot.worker.ready.num_pages,
            new_pages=self._pages_of(task) - slot.prefixes.find(task.keys),
            seconds_per_step=slot.pace.seconds_per_step,
        )

    def _pages_of(self, task: Task) -> int:
        return -(-(task.num_tokens + 1) // self._ready.page_tokens)
