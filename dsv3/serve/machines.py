"""Workers on other machines, as the server has them: machines that join, and a worker of theirs for each seat.

A machine offers as many workers as it was told to bring; the server says which of them to start, and speaks with them
over the machine's one line. A machine whose line ends is gone with all its workers; it may join again at any time, as
may others in its place, and what it offers beyond what is needed is kept for when some other machine goes.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from logging import ERROR, INFO

import msgspec

from dsv3 import __version__
from dsv3.config import ServerConfig
from dsv3.config.address import read_address
from dsv3.errors import ConfigError
from dsv3.infer.events import EngineStats
from dsv3.infer.model_folder import find_model
from dsv3.runtime.log import get_logger
from dsv3.serve.fleet import Kind, NewWorker
from dsv3.serve.line import Line, LineEndedError, answer
from dsv3.serve.messages import (
    Beat,
    Begin,
    Broken,
    End,
    Ended,
    Farewell,
    FromEngine,
    FromMachine,
    FromWorker,
    Here,
    Join,
    ProcessSettings,
    Progress,
    Ready,
    ToEngine,
    ToMachine,
    ToWorker,
    Welcome,
    decode_from_machine,
    encode,
)
from dsv3.serve.model_digest import differences, digest_of
from dsv3.serve.worker import NOT_READY, STOP_SECONDS, AnyWorker

log = get_logger(__name__)

BEAT_SECONDS = 1.0
HELLO_SECONDS = 10.0
"""For a caller to show that it knows the secret."""
PARTING_SECONDS = 2.0
"""For machines to read that the server stops."""


class Machines:
    """All that have joined: a `Workplace`."""

    def __init__(self, config: ServerConfig) -> None:
        self._address = read_address(config.workers_at, option="--workers-at")
        self._secret = config.secret
        self._silent_seconds = config.worker_timeout_seconds
        self._seconds: float | None = config.join_timeout_seconds
        """For workers to be there; no limit once all were."""
        self._needed = {Kind.PREFILL: config.prefill_workers, Kind.DECODE: config.decode_workers}
        self._model = digest_of(find_model(config.model))
        self._joined: list[Joined] = []
        self._news = asyncio.Condition()
        self._server: asyncio.Server | None = None
        self._beside: set[asyncio.Task[None]] = set()
        self._num_workers = 0

    @property
    def port(self) -> int:
        """Where machines join."""
        assert self._server is not None
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    async def open(self) -> None:
        """Let machines join.

        Raises:
            ConfigError: the address cannot be had.
        """
        host, port = self._address.host, self._address.port
        try:
            self._server = await asyncio.start_server(self._meet, host, port)
        except OSError as error:
            raise ConfigError(f"cannot take workers at {host}:{port}: {error.strerror or error}") from error
        self._go_beside(self._beat())
        log.info("waiting at %s:%d for %s", host, self.port, _words(self._needed))

    async def close(self) -> None:
        """Send all home."""
        if self._server is not None:
            self._server.close()
        lines = [machine.line for machine in self._joined]
        for machine in list(self._joined):
            machine.say(Farewell("the server stops"))
        for task in list(self._beside):
            task.cancel()
        await asyncio.gather(*(line.closed(seconds=PARTING_SECONDS) for line in lines))
        if self._beside:
            await asyncio.wait(self._beside)

    # ---- a workplace ----

    async def seats(self, kind: Kind, *, count: int) -> Sequence[NewWorker]:
        """Return places for so many workers, once machines bring as many that have nothing to do.

        Raises:
            ConfigError: they do not, in the time that there is before the server has begun.
        """
        try:
            async with asyncio.timeout(self._seconds), self._news:
                await self._news.wait_for(lambda: self._num_free(kind) >= count)
                return [self._take_seat(kind) for _ in range(count)]
        except TimeoutError:
            free = {kind: self._num_free(kind) for kind in Kind}
            raise ConfigError(
                f"{_words(self._needed)} were to join at {self._address.host}:{self.port} within {self._seconds:g} "
                f"seconds, and {len(self._joined)} machines have; {count} for {kind} are needed at once, and "
                f"{free[kind]} are free; run on other machines: dsv3 serve MODEL --join HOST:{self.port} --{kind} "
                f"{count} --secret-file FILE"
            ) from None

    @contextmanager
    def meeting(self) -> Iterator[str]:
        """Keep a store of this machine, of which the others are told the port; they know the host."""
        # Here, since it takes torch, which the server has no other use for.
        from dsv3.parallel.launch import open_meeting

        with open_meeting() as port:
            yield f"{port}"

    def wait_for_ever(self) -> None:
        """From now on wait for workers as long as it takes: the server has begun, and whoever was there may return."""
        self._seconds = None

    def _num_free(self, kind: Kind) -> int:
        return sum(machine.free[kind] for machine in self._joined)

    def _take_seat(self, kind: Kind) -> NewWorker:
        machine = max(self._joined, key=lambda machine: machine.free[kind])
        machine.free[kind] -= 1
        self._num_workers += 1
        return partial(RemoteWorker, number=self._num_workers, kind=kind, machine=machine)

    # ---- machines come and go ----

    async def _meet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._beside.add(task)
        task.add_done_callback(self._beside.discard)
        caller = writer.get_extra_info("peername")[0]
        with suppress(asyncio.CancelledError):
            try:
                line = await answer(reader, writer, secret=self._secret, seconds=HELLO_SECONDS)
                machine = self._welcome(line, message=decode_from_machine(await line.receive()))
            except (LineEndedError, msgspec.MsgspecError) as error:
                log.warning("%s wanted to join, but: %s", caller, error)
                writer.close()
                return
            if machine is None:
                await line.closed(seconds=PARTING_SECONDS)
            else:
                await self._listen(machine)

    def _welcome(self, line: Line, *, message: FromMachine) -> "Joined | None":
        """Take a machine's workers, or tell it why not."""
        if not isinstance(message, Join):
            raise LineEndedError("it does not say what it brings")
        if fault := self._fault(message):
            log.warning("%s (%s) was turned away: %s", message.name, line.peer, fault)
            line.send(encode(Farewell(fault, is_refusal=True)))
            return None
        brought = {Kind.PREFILL: message.prefill, Kind.DECODE: message.decode}
        machine = Joined(line, name=message.name, brings=brought, on_room=self._tell_news)
        self._joined.append(machine)
        machine.say(Welcome(self._silent_seconds))
        log.info("%s (%s) has joined with %s", message.name, line.peer, _words(brought))
        return machine

    def _fault(self, join: Join) -> str:
        if join.version != __version__:
            return f"it runs dsv3 {join.version}, and the server {__version__}; install the same on both"
        if unlike := differences(join.model, self._model):
            return f"its MODEL is not the server's: {unlike}; copy the server's folder there"
        return ""

    async def _listen(self, machine: "Joined") -> None:
        self._tell_news()
        why = "the server stops"
        try:
            while True:
                machine.take(decode_from_machine(await machine.line.receive()))
        except LineEndedError as error:
            why = str(error)
        except msgspec.MsgspecError as error:
            why = f"it cannot be understood: {error}"
        finally:
            self._joined.remove(machine)
            await machine.line.closed(seconds=0)
            num_lost = machine.lose()
            log.log(ERROR if num_lost else INFO, "%s has left, and %d workers with it: %s", machine.name, num_lost, why)

    async def _beat(self) -> None:
        """Say that the server is there, and find machines that have ceased to say so."""
        while True:
            began = time.monotonic()
            await asyncio.sleep(BEAT_SECONDS)
            now = time.monotonic()
            for machine in list(self._joined):
                machine.say(Beat())
                silent = now - machine.heard
                if silent > self._silent_seconds and now - began < 2 * BEAT_SECONDS:  # else it was this process
                    log.error("%s has said nothing for %.1f seconds", machine.name, silent)
                    machine.line.abort()

    def _tell_news(self) -> None:
        async def tell() -> None:
            async with self._news:
                self._news.notify_all()

        self._go_beside(tell())

    def _go_beside(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.ensure_future(work)
        self._beside.add(task)
        task.add_done_callback(self._beside.discard)


class Joined:
    """A machine while its line holds."""

    def __init__(self, line: Line, *, name: str, brings: dict[Kind, int], on_room: Callable[[], None]) -> None:
        self.line = line
        self.name = name
        self.heard = time.monotonic()
        self.free = Counter(brings)
        """Workers that may be started."""
        self.is_gone = False
        self._on_room = on_room
        self._workers: dict[int, RemoteWorker] = {}

    def begin(self, worker: "RemoteWorker", *, settings: ProcessSettings) -> None:
        """Start a worker."""
        self._workers[worker.number] = worker
        self.say(Begin(worker.number, worker.name, settings))

    def say(self, message: ToMachine) -> None:
        """Tell the machine something."""
        self.line.send(encode(message))

    def take(self, message: FromMachine) -> None:
        """Take what it says."""
        self.heard = time.monotonic()
        if isinstance(message, FromWorker) and (worker := self._workers.get(message.number)):
            worker.take(message.message)
        elif isinstance(message, Ended) and (worker := self._workers.pop(message.number, None)):
            self.free[worker.kind] += 1
            self._on_room()
            worker.lose(was_alive=worker.is_alive)

    def lose(self) -> int:
        """Take note that it is gone; return how many workers with it."""
        self.is_gone = True
        workers = list(self._workers.values())
        alive = [worker for worker in workers if worker.is_alive]
        for worker in workers:  # all of them before anything is placed elsewhere, which must not be here again
            worker.is_alive = False
        for worker in workers:
            worker.lose(was_alive=worker in alive)
        return len(workers)


class RemoteWorker:
    """A worker of another machine: an `AnyWorker`."""

    def __init__(
        self,
        settings: ProcessSettings,
        *,
        name: str,
        on_message: Callable[[AnyWorker, FromEngine], None],
        on_end: Callable[[AnyWorker], None],
        number: int,
        kind: Kind,
        machine: Joined,
    ) -> None:
        self.name = name
        self.number = number
        self.kind = kind
        self.ready = NOT_READY
        self.stats = EngineStats()
        self.is_alive = False
        self.heard = 0.0
        self.machine = machine
        self._settings = settings
        self._on_message = on_message
        self._on_end = on_end
        self._first: asyncio.Future[Ready | Broken] = asyncio.get_running_loop().create_future()
        self._ended = asyncio.Event()

    async def start(self) -> None:
        """Let the machine start it, and return when the model is loaded.

        Raises:
            ConfigError: it cannot be loaded, or the machine has gone.
        """
        if self.machine.is_gone:
            self.lose(was_alive=False)
        else:
            self.machine.begin(self, settings=self._settings)
        message = await self._first
        if isinstance(message, Broken):
            raise ConfigError(f"{message.reason} (on {self.machine.name})")
        self.ready, self.is_alive, self.heard = message, True, time.monotonic()
        log.info("%s runs on %s (%s)", self.name, self.machine.name, self.machine.line.peer)

    async def stop(self) -> None:
        """End it, and wait until its machine says so, or has had the time to."""
        self._end(at_once=False)
        with suppress(TimeoutError):
            await asyncio.wait_for(self._ended.wait(), 2 * STOP_SECONDS)

    def kill(self) -> None:
        """End it at once; it is then seen to have ended, whether or not its machine still answers."""
        self.machine.say(End(self.number, at_once=True))
        was_alive, self.is_alive = self.is_alive, False
        if was_alive:
            asyncio.get_running_loop().call_soon(self._is_over)

    def abandon(self) -> None:
        """End it at once; nothing more is heard of it."""
        self._end(at_once=True)

    def send(self, message: ToEngine) -> None:
        """Say something, which is lost if it has ended."""
        if self.is_alive:
            self.machine.say(ToWorker(self.number, message))

    def take(self, message: FromEngine) -> None:
        """Take what it says."""
        if isinstance(message, Here):
            return
        if isinstance(message, Ready | Broken):
            if not self._first.done():
                self._first.set_result(message)
        elif self.is_alive:
            self.heard = time.monotonic()
            if isinstance(message, Progress):
                self.stats = message.stats
            self._on_message(self, message)

    def lose(self, *, was_alive: bool) -> None:
        """Take note that it has ended, or that its machine has gone."""
        self._ended.set()
        if not self._first.done():
            self._first.set_result(Broken(f"{self.name} ended before it was ready"))
        if was_alive:
            self._is_over()

    def _end(self, *, at_once: bool) -> None:
        self.is_alive = False
        if not self._ended.is_set():
            self.machine.say(End(self.number, at_once=at_once))

    def _is_over(self) -> None:
        self.is_alive = False
        log.error("%s on %s has ended", self.name, self.machine.name)
        self._on_end(self)


def _words(brought: dict[Kind, int]) -> str:
    return f"{brought[Kind.PREFILL]} prefill and {brought[Kind.DECODE]} decode workers"
