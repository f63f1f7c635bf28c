"""An engine's process as its parent sees it: started, spoken with, watched, ended."""

import asyncio
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import msgspec
import zmq
import zmq.asyncio

from dsv3.errors import ConfigError
from dsv3.infer.events import EngineStats
from dsv3.runtime.log import get_logger
from dsv3.serve.messages import (
    Broken,
    FromEngine,
    Here,
    ProcessSettings,
    Progress,
    Ready,
    Stop,
    ToEngine,
    decode_from_engine,
    encode,
)

log = get_logger(__name__)

STOP_SECONDS = 5.0
"""Given to an engine to end, before it is killed."""
NOT_READY = Ready(context_limit=0, num_embeddings=0, weights="", drafts=0, num_pages=0, page_tokens=0)


class AnyWorker(Protocol):
    """One process, of this machine (`Worker`) or of another one (`machines.RemoteWorker`)."""

    name: str
    ready: Ready
    stats: EngineStats
    is_alive: bool
    heard: float
    """When it last said anything, by the monotonic clock."""

    async def start(self) -> None:
        """Start the process, and return when the model is loaded.

        Raises:
            ConfigError: it cannot be loaded; the message is the engine's.
        """
        ...

    async def stop(self) -> None:
        """End the process and free everything."""
        ...

    def kill(self) -> None:
        """End it at once; it is then seen to have ended."""
        ...

    def abandon(self) -> None:
        """End it at once; nothing more is heard of it."""
        ...

    def send(self, message: ToEngine) -> None:
        """Say something, which is lost if the process has ended."""
        ...


class Worker:
    """One process. `on_message` gets what it says once it is ready, `on_end` is called if it ends by itself."""

    def __init__(
        self,
        settings: ProcessSettings,
        *,
        name: str,
        on_message: Callable[[AnyWorker, FromEngine], None],
        on_end: Callable[[AnyWorker], None],
    ) -> None:
        self.name = name
        self.ready = NOT_READY
        self.stats = EngineStats()
        """As of the newest step."""
        self.is_alive = False
        self.heard = 0.0
        """When it last said anything, by the monotonic clock."""
        self._settings = settings
        self._on_message = on_message
        self._on_end = on_end
        self._folder = tempfile.TemporaryDirectory(prefix="dsv3-serve-")  # for this user alone
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.PAIR)
        self._process: subprocess.Popen[bytes] | None = None
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Start the process, and return when the model is loaded.

        Raises:
            ConfigError: it cannot be loaded; the message is the engine's.
        """
        address = f"ipc://{Path(self._folder.name) / 'engine'}"
        self._socket.bind(address)
        command = [sys.executable, "-m", "dsv3.serve.engine_process", address, str(os.getpid())]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE)
        assert self._process.stdin is not None
        with suppress(BrokenPipeError), self._process.stdin as stdin:
            stdin.write(msgspec.json.encode(self._settings))
        message = await self._next_before_ready()
        if isinstance(message, Here):
            # Connected, so that its name is of no more use: nothing is left behind whatever ends this process.
            self._folder.cleanup()
            message = await self._next_before_ready()
        if isinstance(message, Broken):
            await self.stop()
            raise ConfigError(message.reason)
        assert isinstance(message, Ready)
        self.ready, self.is_alive, self.heard = message, True, time.monotonic()
        self._tasks = [asyncio.create_task(self._receive()), asyncio.create_task(self._watch())]

    async def stop(self) -> None:
        """End the process and free everything."""
        was_alive, self.is_alive = self.is_alive, False
        for task in self._tasks:
            task.cancel()
        if self._process is not None:
            if was_alive:
                with suppress(zmq.ZMQError):
                    await self._socket.send(encode(Stop()), zmq.NOBLOCK)
            try:
                await asyncio.to_thread(self._process.wait, STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._socket.close(linger=0)
        self._context.term()
        self._folder.cleanup()

    def kill(self) -> None:
        """End it at once; it is then seen to have ended."""
        if self._process is not None:
            self._process.kill()

    def abandon(self) -> None:
        """End it at once; nothing more is heard of it."""
        self.is_alive = False
        self.kill()

    def send(self, message: ToEngine) -> None:
        """Say something, which is lost if the process has ended."""
        if self.is_alive:
            # Not awaited, so that it happens even where a task is being cancelled; the socket keeps their order.
            task = asyncio.ensure_future(self._socket.send(encode(message)))
            task.add_done_callback(lambda done: done.cancelled() or done.exception())

    async def _next_before_ready(self) -> Here | Ready | Broken:
        assert self._process is not None
        while not await self._socket.poll(200):
            if self._process.poll() is not None:
                return Broken(f"the engine ended with status {self._process.returncode} before it was ready")
        message = decode_from_engine(await self._socket.recv())
        assert isinstance(message, Here | Ready | Broken)
        return message

    async def _receive(self) -> None:
        while True:
            message = decode_from_engine(await self._socket.recv())
            self.heard = time.monotonic()
            if isinstance(message, Progress):
                self.stats = message.stats
            self._on_message(self, message)

    async def _watch(self) -> None:
        """Notice when the process ends by itself."""
        assert self._process is not None
        while self._process.poll() is None:
            await asyncio.sleep(0.1)
        if self.is_alive:
            self.is_alive = False
            log.error("%s: the engine's process ended with status %s", self.name, self._process.returncode)
            self._on_end(self)
