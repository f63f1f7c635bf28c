"""The engine's own process: it loads the model, and then does nothing but steps and messages.

python -m dsv3.serve.engine_process ADDRESS     settings come on standard input
"""

import ctypes
import logging
import os
import signal
import sys

import msgspec
import zmq

from dsv3.config import ServerConfig
from dsv3.errors import Dsv3Error
from dsv3.infer.loaded import load
from dsv3.infer.packed_runner import PackedRunner
from dsv3.infer.request import Request
from dsv3.runtime.device import set_threads
from dsv3.runtime.log import get_logger, show_log
from dsv3.serve.grammar import GrammarFactory
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
    ToEngine,
    decode_to_engine,
    encode,
)

log = get_logger(__name__)

IDLE_MILLISECONDS = 1000
"""How long to wait for a message before looking whether the parent is still there."""
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG


def main() -> None:
    """Serve the engine at the address on the command line until told to stop, or until the parent is gone."""
    parent = os.getppid()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
    # Ctrl-C in a terminal reaches this process too; the parent says when to end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    show_log(level=logging.INFO)
    config = msgspec.json.decode(sys.stdin.buffer.read(), type=ServerConfig)
    with zmq.Context() as context, context.socket(zmq.PAIR) as socket:
        socket.linger = 1000
        socket.connect(sys.argv[1])
        socket.send(encode(Here()))
        try:
            service = EngineService(config)
        except Dsv3Error as error:
            socket.send(encode(Broken(str(error))))
            return
        except OSError as error:
            socket.send(encode(Broken(f"{error.strerror}: {error.filename}" if error.filename else str(error))))
            return
        socket.send(encode(service.ready()))
        run(service, socket=socket, parent=parent)


def run(service: "EngineService", *, socket: "zmq.Socket[bytes]", parent: int) -> None:
    """Take messages between steps, and step while there is work; when that is done, look through the books."""
    is_checked = True
    while os.getppid() == parent:
        wait = 0 if service.engine.has_work else IDLE_MILLISECONDS
        while socket.poll(wait):
            wait = 0
            message = decode_to_engine(socket.recv())
            if isinstance(message, Stop):
                return
            answer = service.take(message)
            if answer is not None:
                socket.send(encode(answer))
        if service.engine.has_work:
            events = service.engine.step()
            socket.send(encode(Progress(events, service.engine.stats())))
            is_checked = False
        elif not is_checked:
            is_checked = True
            if fault := service.fault():
                log.error("the cache's books do not add up: %s; restart the server, and tell us of it", fault)


class EngineService:
    """An engine that is spoken to in messages."""

    def __init__(self, config: ServerConfig) -> None:
        set_threads(config.threads)
        self._loaded = load(config.model, weights=config.weights, device=config.device, drafts=config.engine.max_drafts)
        self.engine = self._loaded.new_engine(config.engine, cache_tokens=config.cache_tokens)
        self._grammars: GrammarFactory | None = None

    def ready(self) -> Ready:
        """Return what there is to say once the model is loaded."""
        engine = self.engine.config
        runner, weights = self._loaded.runner, "the model that trains"
        if isinstance(runner, PackedRunner):
            weights = f"{runner.model.format_name}, {runner.model.num_bytes / 1e9:.2f} GB"
        return Ready(
            context_limit=self.engine.context_limit,
            num_embeddings=runner.config.vocab_size,
            weights=weights,
            drafts=engine.max_drafts,
            num_pages=engine.num_pages,
            page_tokens=engine.page_tokens,
        )

    def take(self, message: ToEngine) -> Refused | Checked | None:
        """Take one message, and return what is to be answered at once, if anything."""
        if isinstance(message, Ask):
            return self._ask(message)
        if isinstance(message, Cancel):
            for request_id in message.ids:
                self.engine.cancel(request_id)
        if isinstance(message, Check):
            return Checked(self.fault())
        return None

    def fault(self) -> str:
        """Return what is wrong with pages, prefixes and requests; empty if nothing is."""
        try:
            self.engine.check()
        except AssertionError as fault:
            return str(fault) or "what is held and what is known differ"
        return ""

    def _ask(self, ask: Ask) -> Refused | None:
        try:
            constraint = None
            if ask.grammar is not None:
                constraint = self._factory().make(ask.grammar)
                if ask.thinks_first:
                    constraint = self._factory().reasoning_first(constraint, starts_inside=True)
            request = Request(
                id=ask.id,
                prompt_ids=ask.prompt_ids,
                params=ask.params,
                constraint=constraint,
                num_logprobs=ask.num_logprobs,
                prompt_logprobs=ask.prompt_logprobs,
            )
            self.engine.add(request)
        except Dsv3Error as error:
            return Refused(ask.id, str(error))
        except Exception as error:  # One request fails; the engine and all others go on.
            log.exception("a request could not be taken in")
            return Refused(ask.id, repr(error), is_fault=True)
        return None

    def _factory(self) -> GrammarFactory:
        if self._grammars is None:
            self._grammars = GrammarFactory(self._loaded.tokenizer, eos_id=self._loaded.config.eos_token_id)
        return self._grammars


if __name__ == "__main__":
    main()
