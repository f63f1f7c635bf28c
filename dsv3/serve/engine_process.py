"""The engine's own process: it loads the model, and then does nothing but steps and messages.

python -m dsv3.serve.engine_process ADDRESS PARENT     settings come on standard input
"""

import ctypes
import logging
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, closing
from dataclasses import replace
from functools import partial
from typing import NoReturn, TypeVar

import msgspec
import zmq
from torch.distributed import ProcessGroup

from dsv3.config import ServerConfig
from dsv3.errors import Dsv3Error, RankLostError
from dsv3.infer.engine import Engine
from dsv3.infer.events import EngineStats, TokenEvent
from dsv3.infer.loaded import load
from dsv3.infer.packed_runner import PackedRunner
from dsv3.infer.ranks_runner import RanksRunner, step_together
from dsv3.infer.request import Request
from dsv3.parallel.launch import open_group
from dsv3.runtime.device import set_threads
from dsv3.runtime.log import get_logger, show_log
from dsv3.serve.grammar import GrammarFactory
from dsv3.serve.messages import (
    Adopted,
    Alive,
    Ask,
    Broken,
    Cancel,
    Check,
    Checked,
    Expect,
    FromEngine,
    Here,
    Leave,
    Lost,
    ProcessSettings,
    Progress,
    Ready,
    Refused,
    Room,
    Stop,
    ToEngine,
    Wake,
    decode_to_engine,
    encode,
)
from dsv3.serve.page_transfer import Incoming, Pages, Parcel, SocketTransport, Way, handover_of

log = get_logger(__name__)

IDLE_MILLISECONDS = 1000
"""How long to wait for a message before looking whether the parent is still there."""
BEGIN_SECONDS = 600.0
"""For the ranks of a group to load the model, the fastest to the slowest; the parent ends them if one cannot."""
PARTING_MILLISECONDS = 1000
"""Between the ranks of a group hearing that they are to end."""
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG
T = TypeVar("T")


def main() -> int:
    """Serve the engine at the address on the command line until told to stop, or until the parent is gone.

    Returns the status to end with.
    """
    parent = int(sys.argv[2])  # os.getppid() is another one already if it has ended while this process began
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
    # Ctrl-C in a terminal reaches this process too; the parent says when to end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    show_log(level=logging.INFO)
    settings = msgspec.json.decode(sys.stdin.buffer.read(), type=ProcessSettings)
    with zmq.Context() as context, context.socket(zmq.PAIR) as socket, ExitStack() as at_the_end:
        socket.linger = 1000
        socket.connect(sys.argv[1])
        socket.send(encode(Here()))

        def tell(message: FromEngine) -> None:
            socket.send(encode(message))

        transport = None
        if settings.secret:
            made = SocketTransport(context, secret=settings.secret, host=settings.host)
            transport = at_the_end.enter_context(closing(made))
        try:
            service = EngineService(settings.config, tell=tell, transport=transport)
            if settings.place is not None:
                service.share_experts(at_the_end.enter_context(joined(settings)), decodes=settings.place.decodes)
            service.begin()
        except Dsv3Error as error:
            tell(Broken(str(error)))
            return 0
        except OSError as error:
            tell(Broken(f"{error.strerror}: {error.filename}" if error.filename else str(error)))
            return 0
        tell(service.ready())
        try:
            run(service, socket=socket, parent=parent)
        except RankLostError as error:
            if not is_told_to_stop(socket):
                log.error("%s; this process ends with it, and all that share experts are to be started again", error)
                return 1
    return 0


def joined(settings: ProcessSettings) -> AbstractContextManager[ProcessGroup]:
    """Return the group of ranks that this process belongs to, once all have loaded the model."""
    place = settings.place
    assert place is not None
    return open_group(
        place.meeting,
        rank=place.rank,
        size=place.size,
        begin_seconds=BEGIN_SECONDS,
        timeout_seconds=settings.config.worker_timeout_seconds / 2,  # before the parent finds all of them silent
    )


def is_told_to_stop(socket: "zmq.Socket[bytes]") -> bool:
    """Whether the others have gone because all are to end."""
    while socket.poll(PARTING_MILLISECONDS):
        if isinstance(decode_to_engine(socket.recv()), Stop):
            return True
    return False


def run(service: "EngineService", *, socket: "zmq.Socket[bytes]", parent: int) -> None:
    """Take messages between steps, and step while there is work; when that is done, look through the books."""
    poller = zmq.Poller()
    poller.register(socket, zmq.POLLIN)
    if service.transport is not None:
        poller.register(service.transport.inward, zmq.POLLIN)
    is_checked, heard = True, time.monotonic()
    while os.getppid() == parent:
        poller.poll(0 if service.is_busy else IDLE_MILLISECONDS)
        while socket.poll(0):
            message = decode_to_engine(socket.recv())
            if isinstance(message, Stop):
                return
            service.take(message)
        service.take_pages()
        if service.engine.has_work:
            events = service.step()
            service.tell(Progress(events, service.stats()))
            is_checked, heard = False, time.monotonic()
        elif service.is_busy:
            service.step()
        elif not is_checked:
            is_checked = True
            if fault := service.fault():
                log.error("the cache's books do not add up: %s; restart the server, and tell us of it", fault)
        if time.monotonic() - heard > IDLE_MILLISECONDS / 1000:
            service.tell(Alive() if service.runs_alone else Progress([], service.stats()))
            heard = time.monotonic()


class EngineService:
    """An engine that is spoken to in messages, and that may hand requests to others like it and take theirs."""

    def __init__(
        self, config: ServerConfig, *, tell: Callable[[FromEngine], None], transport: SocketTransport | None = None
    ) -> None:
        set_threads(config.threads)
        self._config = config
        self._loaded = load(
            config.model,
            weights=config.weights,
            device="cpu" if config.expert_parallel else config.device,
            plain=config.expert_parallel,
            drafts=config.engine.max_drafts,
        )
        self._ranks: RanksRunner | None = None
        self.engine: Engine
        self.tell = tell
        self.transport = transport
        self._grammars: GrammarFactory | None = None
        self._without_room: deque[Request] = deque()
        """Requests that others read, in order, for which there are no pages yet."""
        self._incoming: dict[str, Incoming] = {}

    def share_experts(self, group: ProcessGroup, *, decodes: bool) -> None:
        """Keep a part of the experts, and go in step with the ranks that have the others.

        Raises:
            ConfigError: experts do not divide over the ranks.
        """
        engine, ranks = self._config.engine, self._config.expert_ranks
        fixed = engine.max_sequences * (1 + engine.max_drafts) if decodes else 0
        self._ranks = RanksRunner(self._loaded.model, group=group, config=replace(ranks, fixed_step_tokens=fixed))
        self._loaded.runner = self._ranks

    def begin(self) -> None:
        """Make the engine."""
        self.engine = self._loaded.new_engine(self._config.engine, cache_tokens=self._config.cache_tokens)

    @property
    def runs_alone(self) -> bool:
        """Whether all experts are here."""
        return self._ranks is None

    @property
    def is_busy(self) -> bool:
        """Whether there is anything to compute, be it for others."""
        return self.engine.has_work or (self._ranks is not None and self._ranks.is_awake)

    def step(self) -> list[TokenEvent]:
        """Make a step, or take part in one of others."""
        return self.engine.step() if self._ranks is None else step_together(self.engine, runner=self._ranks)

    def stats(self) -> EngineStats:
        """Return what has been counted."""
        return replace(self.engine.stats(), experts=None if self._ranks is None else self._ranks.stats())

    def ready(self) -> Ready:
        """Return what there is to say once the model is loaded."""
        engine = self.engine.config
        runner, weights = self._loaded.runner, "the model that trains"
        if isinstance(runner, PackedRunner):
            weights = f"{runner.model.format_name}, {runner.model.num_bytes / 1e9:.2f} GB"
        if self._ranks is not None:
            weights += f", experts over {self._ranks.num_ranks} ranks"
        return Ready(
            context_limit=self.engine.context_limit,
            num_embeddings=runner.config.vocab_size,
            weights=weights,
            drafts=engine.max_drafts,
            num_pages=engine.num_pages,
            page_tokens=engine.page_tokens,
            address="" if self.transport is None else self.transport.address,
        )

    def take(self, message: ToEngine) -> None:
        """Take one message."""
        if isinstance(message, Ask):
            if (request := self._request(message)) is not None:
                self._try(message.id, partial(self.engine.add, request))
        elif isinstance(message, Expect):
            if (request := self._request(message.ask)) is not None:
                self._without_room.append(request)
        elif isinstance(message, Cancel):
            for request_id in message.ids:
                self._incoming.pop(request_id, None)
                self.engine.cancel(request_id)
            gone = set(message.ids)
            self._without_room = deque(request for request in self._without_room if request.id not in gone)
        elif isinstance(message, Leave):
            assert self.transport is not None
            self.transport.abort(message.address)
        elif isinstance(message, Wake):
            assert self._ranks is not None
            self._ranks.wake(message.number)
        elif isinstance(message, Check):
            self.tell(Checked(self.fault()))

    def take_pages(self) -> None:
        """Take what other engines have sent, then make room for more of it, in order of arrival."""
        if self.transport is None:
            return
        for parcel in self.transport.poll():
            incoming = self._incoming.get(parcel.note.id)
            if incoming is not None:  # otherwise it has been cancelled since
                self._take_parcel(parcel, incoming=incoming)
        while self._without_room and self._make_room(self._without_room[0]):
            self._without_room.popleft()

    def _take_parcel(self, parcel: Parcel, *, incoming: Incoming) -> None:
        note = parcel.note
        try:
            if isinstance(note, Pages):
                incoming.take(note, entries=parcel.tensor)
                self.engine.write(note.id, entries=parcel.tensor, first_page=note.first_page)
                return
            incoming.end(note)
            self.engine.adopt(note.id, handover_of(note, parcel.tensor))
        except Dsv3Error as error:
            self.engine.cancel(note.id)
            self.tell(Lost(note.id, str(error)))
        else:
            self.tell(Adopted(note.id, incoming.num_bytes))
        del self._incoming[note.id]

    def _make_room(self, request: Request) -> bool:
        """Keep room for a request, and say so; False if there is none now."""
        first_page = self._try(request.id, partial(self.engine.expect, request), otherwise=-1)
        if first_page is None:
            return False
        if first_page >= 0:
            self._incoming[request.id] = Incoming(first_page=first_page, page_tokens=self.engine.config.page_tokens)
            self.tell(Room(request.id, first_page))
        return True

    def fault(self) -> str:
        """Return what is wrong with pages, prefixes and requests; empty if nothing is."""
        try:
            self.engine.check()
        except AssertionError as fault:
            return str(fault) or "what is held and what is known differ"
        return ""

    def _request(self, ask: Ask) -> Request | None:
        """Return what is asked; None if it cannot be, which has been told."""
        return self._try(ask.id, partial(self._make_request, ask), otherwise=None)

    def _make_request(self, ask: Ask) -> Request:
        constraint = None
        if ask.grammar is not None:
            constraint = self._factory().make(ask.grammar)
            if ask.thinks_first:
                constraint = self._factory().reasoning_first(constraint, starts_inside=True)
        way = None
        if ask.hand_to is not None:
            assert self.transport is not None
            to, first_page = ask.hand_to.address, ask.hand_to.first_page
            way = Way(self.transport, to=to, request_id=ask.id, first_page=first_page)
        return Request(
            id=ask.id,
            prompt_ids=ask.prompt_ids,
            params=ask.params,
            answer_ids=ask.answer_ids,
            hand_to=way,
            constraint=constraint,
            num_logprobs=ask.num_logprobs,
            prompt_logprobs=ask.prompt_logprobs,
        )

    def _try(self, request_id: str, do: Callable[[], T | None], *, otherwise: T | None = None) -> T | None:
        """Return what `do` returns, or tell why it could not."""
        try:
            return do()
        except Dsv3Error as error:
            self.tell(Refused(request_id, str(error)))
        except Exception as error:  # One request fails; the engine and all others go on.
            log.exception("a request could not be taken in")
            self.tell(Refused(request_id, repr(error), is_fault=True))
        return otherwise

    def _factory(self) -> GrammarFactory:
        if self._grammars is None:
            self._grammars = GrammarFactory(self._loaded.tokenizer, eos_id=self._loaded.config.eos_token_id)
        return self._grammars


def leave(status: int) -> NoReturn:
    """End this process at once. Python would take torch down piece by piece first: seconds, where others compute."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    leave(main())
