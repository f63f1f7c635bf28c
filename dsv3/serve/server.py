"""Running the server: engine first, then HTTP, and both to an orderly end."""

import asyncio
import signal
import socket
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from types import FrameType

import uvicorn

from dsv3.config import ServerConfig
from dsv3.data.tokenizer import Tokenizer
from dsv3.errors import ConfigError, EngineError, TokenizerError
from dsv3.infer.model_folder import find_model
from dsv3.runtime.log import get_logger
from dsv3.serve.app import Application, build_app
from dsv3.serve.deployment import Deployment
from dsv3.serve.edge import AbortableProtocol
from dsv3.serve.engine_client import GONE, EngineClient, OneEngine

log = get_logger(__name__)

PARTING_SECONDS = 2.0
"""For clients to read that their answers are broken off."""
BACKLOG = 2048
LOCAL = ("127.0.0.1", "localhost", "::1")


def serve(config: ServerConfig, *, say: Callable[[str], None] = print) -> None:
    """Serve until told to stop by SIGTERM or Ctrl-C; a second one stops at once.

    `say` gets the one line that tells where it listens, once answers can be had.

    Raises:
        ConfigError: the model cannot be loaded, or the port cannot be had.
        EngineError: the engine's process ended by itself.
    """
    named = config.served_name or Path(config.model).resolve().name
    asyncio.run(_serve(replace(config, served_name=named), say=say))


async def _serve(config: ServerConfig, *, say: Callable[[str], None]) -> None:
    tokenizer = _tokenizer(config)
    listening = _listen(config)
    if config.host not in LOCAL and not config.api_keys:
        log.warning("listening on %s without an API key: whoever reaches this address can use the model", config.host)
    engine = Deployment(config) if config.prefill_workers else OneEngine(config)
    try:
        await engine.start()
        shared = Application(
            config, engine=engine, tokenizer=tokenizer, bos_id=tokenizer.bos_id, eos_id=tokenizer.eos_id
        )
        server = _Server(
            uvicorn.Config(
                build_app(shared),
                log_level="warning",
                access_log=False,
                http=AbortableProtocol,
                # Said to be whole seconds; it only goes to asyncio.wait_for.
                timeout_graceful_shutdown=config.drain_timeout_seconds + PARTING_SECONDS,  # type: ignore[arg-type]
                timeout_keep_alive=30,
            ),
            on_ready=lambda: say(_greeting(config, engine=engine, port=listening.getsockname()[1])),
            on_stop=lambda: engine.end_all(after_seconds=config.drain_timeout_seconds),
        )
        engine.on_death = server.end
        await server.serve(sockets=[listening])
        if server.died:
            raise EngineError(GONE)
    finally:
        listening.close()
        await engine.stop()


class _Server(uvicorn.Server):
    """Says when it is ready, and ends with status 0 where it was told to end."""

    def __init__(
        self, config: uvicorn.Config, *, on_ready: Callable[[], None], on_stop: Callable[[], Awaitable[None]]
    ) -> None:
        super().__init__(config)
        self.died = False
        self._on_stop = on_stop
        self._on_ready = on_ready
        self._on_signal = 0

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to accept, and say so."""
        await super().startup(sockets=sockets)
        self._on_ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take nothing new, and let what is under way end in time, or be told that it does not."""
        ending = asyncio.ensure_future(self._on_stop())
        await super().shutdown(sockets=sockets)
        ending.cancel()

    def end(self) -> None:
        """Stop because there is nothing left to serve with."""
        self.died = self.should_exit = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drain at the first signal, stop at the second."""
        del frame
        self._on_signal += 1
        self.should_exit = True
        if self._on_signal > 1 or sig not in (signal.SIGINT, signal.SIGTERM):
            self.force_exit = True


def _tokenizer(config: ServerConfig) -> Tokenizer:
    found = find_model(config.model)
    if found.tokenizer is None:
        raise TokenizerError(f"{found.weights} has no tokenizer.json, and a server speaks in text; copy it there")
    return Tokenizer.from_file(found.tokenizer)


def _listen(config: ServerConfig) -> socket.socket:
    """Take the port before the model is loaded: minutes of loading would be lost on one that is in use."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    listening = socket.socket(family)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((config.host, config.port))
        listening.listen(BACKLOG)  # a port that is bound and not listened at can be had twice
    except OSError as error:
        listening.close()
        raise ConfigError(
            f"cannot listen on {config.host} port {config.port}: {error.strerror}; take another, or 0 for a free one"
        ) from error
    listening.set_inheritable(False)
    return listening


def _greeting(config: ServerConfig, *, engine: EngineClient, port: int) -> str:
    ready = engine.ready
    host = f"[{config.host}]" if ":" in config.host else config.host
    drafts = f"up to {ready.drafts} drafts" if ready.drafts else "no drafts"
    tokens = ready.num_pages * ready.page_tokens
    workers = f"{config.prefill_workers} prefill and {config.decode_workers} decode workers; "
    return (
        f"http://{host}:{port} serves {config.served_name} ({workers if config.prefill_workers else ''}"
        f"weights {ready.weights}; {drafts}; cache of {tokens:,} tokens in {ready.num_pages:,} pages); "
        "the chat page is at /, Ctrl-C stops"
    )
