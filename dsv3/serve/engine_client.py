"""The engine as the HTTP process sees it: requests go in, events come back, each to whoever waits for it."""

import asyncio
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import msgspec
import zmq
import zmq.asyncio

from dsv3.config import ServerConfig
from dsv3.errors import ConfigError, EngineError
from dsv3.infer.request import EngineStats, FinishReason, TokenEvent
from dsv3.runtime.log import get_logger
from dsv3.serve.messages import (
    Ask,
    Broken,
    Cancel,
    Check,
    Checked,
    Here,
    Progress,
    Ready,
    Refused,
    Stop,
    decode_from_engine,
    encode,
)

log = get_logger(__name__)

STOP_SECONDS = 5.0
"""Given to the engine to end, before it is killed."""
GONE = "the engine has ended; the server stops"
STOPPING = "the server stops, and has no more time for this answer"


class RefusedError(Exception):
    """The engine says that a request can never be run."""


class EngineClient:
    """Starts the engine's process and speaks with it."""

    def __init__(self, config: ServerConfig) -> None:
        self.ready = Ready(context_limit=0, num_embeddings=0, weights="", drafts=0, num_pages=0, page_tokens=0)
        self.stats = EngineStats()
        """As of the newest step."""
        self.is_alive = False
        self.is_stopping = False
        """Nothing more is answered."""
        self.on_death: Callable[[], None] = lambda: None
        self._config = config
        self._inboxes: dict[str, asyncio.Queue[TokenEvent | Refused]] = {}
        self._checks: list[asyncio.Future[str]] = []
        self._folder = tempfile.TemporaryDirectory(prefix="dsv3-serve-")  # for this user alone
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.PAIR)
        self._process: subprocess.Popen[bytes] | None = None
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def num_open(self) -> int:
        """Requests that have not ended."""
        return len(self._inboxes)

    async def start(self) -> None:
        """Start the process, and return when the model is loaded.

        Raises:
            ConfigError: it cannot be loaded; the message is the engine's.
        """
        address = f"ipc://{Path(self._folder.name) / 'engine'}"
        self._socket.bind(address)
        command = [sys.executable, "-m", "dsv3.serve.engine_process", address]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE)
        assert self._process.stdin is not None
        with suppress(BrokenPipeError), self._process.stdin as stdin:
            stdin.write(msgspec.json.encode(self._config))
        message = await self._next_before_ready()
        if isinstance(message, Here):
            # Connected, so that its name is of no more use: nothing is left behind whatever ends this process.
            self._folder.cleanup()
            message = await self._next_before_ready()
        if isinstance(message, Broken):
            await self.stop()
            raise ConfigError(message.reason)
        assert isinstance(message, Ready)
        self.ready, self.is_alive = message, True
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

    async def ask(self, ask: Ask) -> "asyncio.Queue[TokenEvent | Refused]":
        """Hand a request over; its events come into the queue that is returned.

        Raises:
            EngineError: the engine has ended, or is ending.
        """
        if not self.is_alive or self.is_stopping:
            raise EngineError(GONE if not self.is_alive else STOPPING)
        inbox: asyncio.Queue[TokenEvent | Refused] = asyncio.Queue()
        self._inboxes[ask.id] = inbox
        await self._socket.send(encode(ask))
        return inbox

    def forget(self, ids: list[str]) -> None:
        """Cancel those of these requests that have not ended. Their pages are free within a step."""
        gone = [request_id for request_id in ids if self._inboxes.pop(request_id, None) is not None]
        if gone and self.is_alive:
            # Not awaited, so that it happens even where a task is being cancelled.
            task = asyncio.ensure_future(self._socket.send(encode(Cancel(gone))))
            task.add_done_callback(lambda done: done.cancelled() or done.exception())

    async def end_all(self, *, after_seconds: float) -> None:
        """After some time, cancel what has not ended and tell everyone who waits that the server stops."""
        await asyncio.sleep(after_seconds)
        self.is_stopping = True
        ids = list(self._inboxes)
        for request_id in ids:
            self._inboxes[request_id].put_nowait(_failed(request_id, STOPPING))
        self.forget(ids)

    async def check(self) -> str:
        """Let the engine check its books; return the fault, empty if there is none."""
        answer: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._checks.append(answer)
        await self._socket.send(encode(Check()))
        return await answer

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
            if isinstance(message, Progress):
                self.stats = message.stats
                for event in message.events:
                    self._deliver(event.id, event, is_last=event.finish_reason is not None)
            elif isinstance(message, Refused):
                self._deliver(message.id, message, is_last=True)
            elif isinstance(message, Checked) and self._checks:
                self._checks.pop(0).set_result(message.fault)

    def _deliver(self, request_id: str, event: TokenEvent | Refused, *, is_last: bool) -> None:
        inbox = self._inboxes.pop(request_id, None) if is_last else self._inboxes.get(request_id)
        if inbox is not None:
            inbox.put_nowait(event)

    async def _watch(self) -> None:
        """Notice when the engine's process ends by itself, and tell everyone who waits for it."""
        assert self._process is not None
        while self._process.poll() is None:
            await asyncio.sleep(0.1)
        if not self.is_alive:
            return
        self.is_alive = False
        log.error("the engine's process ended with status %s", self._process.returncode)
        for request_id, inbox in self._inboxes.items():
            inbox.put_nowait(_failed(request_id, GONE))
        self._inboxes.clear()
        self.on_death()


def _failed(request_id: str, error: str) -> TokenEvent:
    return TokenEvent(id=request_id, finish_reason=FinishReason.FAILED, error=error)
