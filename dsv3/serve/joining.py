"""A machine that brings workers to a server on another one: `dsv3 serve MODEL --join HOST:PORT`.

It starts and ends processes as the server says, and passes on what the two tell each other. What the workers hand each
other does not come by here. When the line to the server ends, so does everything here: whoever has started it, such as
systemd, may start it again, and it joins again.
"""

import asyncio
import signal
import socket
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import replace

import msgspec

from dsv3 import __version__
from dsv3.config import JoinConfig
from dsv3.errors import ConfigError, EngineError
from dsv3.infer.model_folder import find_model
from dsv3.runtime.cores import available_cores
from dsv3.runtime.log import get_logger
from dsv3.serve.line import Line, LineEndedError, call
from dsv3.serve.machines import BEAT_SECONDS
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
    Join,
    ProcessSettings,
    ToMachine,
    ToWorker,
    Welcome,
    decode_to_machine,
    encode,
)
from dsv3.serve.model_digest import digest_of
from dsv3.serve.worker import Worker

log = get_logger(__name__)

TRY_AGAIN_SECONDS = 1.0
"""Between two calls while the server cannot be reached yet."""
CALL_SECONDS = 10.0


def join(config: JoinConfig, *, say: Callable[[str], None] = print) -> None:
    """Bring workers until the server stops, or this is told to by SIGTERM or Ctrl-C.

    `say` gets the one line that tells that they are taken.

    Raises:
        ConfigError: the server cannot be reached, has another secret, or does not take them.
        EngineError: it is gone.
    """
    asyncio.run(_join(config, say=say))


async def _join(config: JoinConfig, *, say: Callable[[str], None]) -> None:
    machine = Machine(config, say=say)
    work = asyncio.ensure_future(machine.run())
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, work.cancel)
    with suppress(asyncio.CancelledError):
        await work


class Machine:
    """This one. `run` ends when it is not needed any more, and leaves no process."""

    def __init__(self, config: JoinConfig, *, say: Callable[[str], None] = print) -> None:
        workers = config.prefill_workers + config.decode_workers
        self.workers: dict[int, Worker] = {}
        """By the number that the server gives them."""
        self._config = config
        self._threads = config.threads or max(1, available_cores() // workers)
        self._say = say
        self._line: Line
        self._host = config.host
        self._silent_seconds = CALL_SECONDS
        self._heard = 0.0
        self._beside: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Join, and do what the server says, until it stops.

        Raises:
            ConfigError: it cannot be reached, has another secret, or does not take the workers.
            EngineError: it is gone.
        """
        model = digest_of(find_model(self._config.model))
        self._line = await self._call()
        self._host = self._host or self._line.own_host
        try:
            self._tell(
                Join(
                    version=__version__,
                    name=socket.gethostname(),
                    host=self._host,
                    model=model,
                    prefill=self._config.prefill_workers,
                    decode=self._config.decode_workers,
                )
            )
            await self._obey()
        finally:
            for task in self._beside:
                task.cancel()
            for worker in self.workers.values():
                worker.abandon()
            if self._beside:
                await asyncio.wait(self._beside)
            await asyncio.gather(*(worker.stop() for worker in self.workers.values()))
            await self._line.closed(seconds=1.0)

    async def _call(self) -> Line:
        """Call until the server answers, which may begin later than this machine."""
        deadline = time.monotonic() + self._config.join_timeout_seconds
        while True:
            try:
                return await call(self._config.server, secret=self._config.secret, seconds=CALL_SECONDS)
            except ConfigError as error:
                if not isinstance(error.__cause__, OSError) or time.monotonic() > deadline:
                    raise
                log.info("%s; trying again", error)
                await asyncio.sleep(TRY_AGAIN_SECONDS)

    async def _obey(self) -> None:
        self._heard = time.monotonic()
        self._go_beside(self._beat())
        try:
            while True:
                message = decode_to_machine(await self._line.receive())
                self._heard = time.monotonic()
                if isinstance(message, Farewell):
                    if message.is_refusal:
                        raise ConfigError(f"{self._config.server} turns this machine away: {message.reason}")
                    log.info("%s", message.reason)
                    return
                self._take(message)
        except (LineEndedError, msgspec.MsgspecError) as error:
            raise EngineError(
                f"{error}; the workers of this machine end with it, and may join again: the same command"
            ) from error

    async def _beat(self) -> None:
        """Say that this machine is there, and end the line to a server that has ceased to say so."""
        now = began = time.monotonic()
        # Where the pause was a long one, it was this process that stood still: what was said has not been heard yet.
        while now - self._heard < self._silent_seconds or now - began > 2 * BEAT_SECONDS:
            self._tell(Beat())
            began = time.monotonic()
            await asyncio.sleep(BEAT_SECONDS)
            now = time.monotonic()
        log.error("the server at %s says nothing any more", self._config.server)
        self._line.abort()

    def _take(self, message: ToMachine) -> None:
        if isinstance(message, Welcome):
            self._silent_seconds = message.silent_seconds
            config = self._config
            self._say(
                f"{config.server} takes {config.prefill_workers} prefill and {config.decode_workers} decode workers "
                f"of this machine, who hand each other pages at {self._host}; Ctrl-C stops"
            )
        elif isinstance(message, Begin):
            self._begin(message)
        elif isinstance(message, ToWorker) and (worker := self.workers.get(message.number)):
            worker.send(message.message)
        elif isinstance(message, End) and (worker := self.workers.get(message.number)):
            if message.at_once:
                worker.abandon()
            self._go_beside(self._end(message.number))

    def _begin(self, begin: Begin) -> None:
        number = begin.number
        try:
            self.workers[number] = Worker(
                self._settings(begin.settings),
                name=begin.name,
                on_message=lambda _, message: self._pass_on(number, message),
                on_end=lambda _: self._go_beside(self._end(number)),
            )
        except ConfigError as error:  # what the server asks for and this machine's device do not go together
            self._pass_on(number, Broken(str(error)))
            self._tell(Ended(number))
        else:
            self._go_beside(self._start(number))

    async def _start(self, number: int) -> None:
        if (worker := self.workers.get(number)) is None:
            return  # it was to end before it had begun
        try:
            await worker.start()
        except ConfigError as error:
            self._pass_on(number, Broken(str(error)))
            await self._end(number)
        else:
            self._pass_on(number, worker.ready)

    async def _end(self, number: int) -> None:
        if worker := self.workers.pop(number, None):
            await worker.stop()
        self._tell(Ended(number))

    def _settings(self, settings: ProcessSettings) -> ProcessSettings:
        """Return the server's settings with what is this machine's own."""
        place = settings.place
        if place is not None:
            place = msgspec.structs.replace(place, meeting=f"tcp://{self._config.server.host}:{place.meeting}")
        return msgspec.structs.replace(
            settings,
            config=replace(
                settings.config, model=self._config.model, device=self._config.device, threads=self._threads
            ),
            host=self._host,
            place=place,
        )

    def _pass_on(self, number: int, message: FromEngine) -> None:
        self._tell(FromWorker(number, message))

    def _tell(self, message: FromMachine) -> None:
        self._line.send(encode(message))

    def _go_beside(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.ensure_future(work)
        self._beside.add(task)
        task.add_done_callback(self._beside.discard)
