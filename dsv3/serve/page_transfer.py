"""How pages of the latent cache travel from one engine's process to another's (report 3.4.1, prefill to decoding).

A transfer is begun by `Transport.start` and goes on beside the engine's steps; `poll` returns what has come; `abort`
gives up whatever is still on its way to somebody. No call waits. How long a transfer may take is for the router to say,
which alone knows both ends (`serve/deployment.py`). Room at the receiver is kept before anything is sent, so that what
is under way is never more than what its cache holds.
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import msgspec
import numpy as np
import torch
import zmq
from torch import Tensor

from dsv3.errors import EngineError
from dsv3.infer.handover import Handover, MtpHandover


class Pages(msgspec.Struct, tag=True, frozen=True):
    """Some pages of one request."""

    id: str
    first_page: int


class Rest(msgspec.Struct, tag=True, frozen=True):
    """All that is left to know of a request; the tensor is the unread states of the MTP modules, one after another."""

    id: str
    token: int
    num_computed: int
    mtp: list[tuple[int, int]]
    """By module: positions done, and rows of unread states."""


class _Envelope(msgspec.Struct, frozen=True):
    secret: str
    note: Pages | Rest
    dtype: str
    shape: list[int]


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(_Envelope).decode
_TYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.float64, torch.bfloat16)}


@dataclass(frozen=True, kw_only=True)
class Parcel:
    """One message of a transfer."""

    note: Pages | Rest
    tensor: Tensor


@runtime_checkable
class Transport(Protocol):
    """Moves parcels between processes. Those to one receiver arrive in order, or, if the line breaks, not at all."""

    address: str
    """Where this end takes parcels."""

    def start(self, parcel: Parcel, *, to: str) -> None:
        """Begin to send a parcel, whose tensor does not change any more."""
        ...

    def poll(self) -> list[Parcel]:
        """Return what has come since the last call."""
        ...

    def abort(self, to: str) -> None:
        """Give up everything that is under way to an address, for whoever was there has gone."""
        ...


class SocketTransport:
    """Over TCP, by ZeroMQ, whose own thread does the work.

    Parcels without the deployment's secret are dropped: any process of the machine could connect. What travels is not
    encrypted, so between machines it needs a network that is trusted, as NCCL's does.
    """

    def __init__(self, context: "zmq.Context[zmq.Socket[bytes]]", *, secret: str, host: str = "127.0.0.1") -> None:
        self._context = context
        self._secret = secret
        self._outward: dict[str, zmq.Socket[bytes]] = {}
        self.inward = context.socket(zmq.PULL)
        self.inward.rcvhwm = 0
        self.inward.linger = 0
        port = self.inward.bind_to_random_port(f"tcp://{host}")
        self.address = f"tcp://{host}:{port}"

    def start(self, parcel: Parcel, *, to: str) -> None:
        """Begin to send a parcel."""
        tensor = parcel.tensor.contiguous()
        dtype = str(tensor.dtype).removeprefix("torch.")
        envelope = _Envelope(secret=self._secret, note=parcel.note, dtype=dtype, shape=list(tensor.shape))
        octets: memoryview = tensor.flatten().view(torch.uint8).numpy().data
        self._socket(to).send_multipart([_encode(envelope), octets], copy=False)

    def poll(self) -> list[Parcel]:
        """Return what has come; what is not of this deployment is dropped."""
        parcels = []
        while self.inward.poll(0):
            frames = self.inward.recv_multipart(copy=False)
            try:
                envelope = _decode(frames[0].buffer)
                if envelope.secret != self._secret or len(frames) != 2:
                    continue
                tensor = torch.empty(envelope.shape, dtype=_TYPES[envelope.dtype])
                if tensor.nbytes != len(frames[1]):
                    continue
                if tensor.nbytes:
                    octets = tensor.view(-1).view(torch.uint8).numpy()
                    octets[:] = np.frombuffer(frames[1].buffer, dtype=np.uint8)
            except (msgspec.MsgspecError, KeyError, RuntimeError):
                continue
            parcels.append(Parcel(note=envelope.note, tensor=tensor))
        return parcels

    def abort(self, to: str) -> None:
        """Give up what is under way to an address."""
        if socket := self._outward.pop(to, None):
            socket.close(linger=0)

    def close(self) -> None:
        """Give up everything."""
        for to in list(self._outward):
            self.abort(to)
        self.inward.close(linger=0)

    def _socket(self, to: str) -> "zmq.Socket[bytes]":
        if to not in self._outward:
            socket = self._context.socket(zmq.PUSH)
            socket.sndhwm = 0  # Room was kept for all of it at the other end.
            socket.linger = 0
            socket.connect(to)
            self._outward[to] = socket
        return self._outward[to]


class Way:
    """A `PageSink`: the way of one request to another process."""

    def __init__(self, transport: Transport, *, to: str, request_id: str, first_page: int) -> None:
        self.first_page = first_page
        self._transport = transport
        self._to = to
        self._id = request_id

    def send(self, entries: Tensor, *, first_page: int) -> None:
        """Send pages on their way."""
        self._transport.start(Parcel(note=Pages(self._id, first_page), tensor=entries), to=self._to)

    def finish(self, handover: Handover) -> None:
        """Send what remains."""
        states = [past.unread for past in handover.mtp if past.unread is not None]
        note = Rest(
            id=self._id,
            token=handover.token,
            num_computed=handover.num_computed,
            mtp=[(past.done, 0 if past.unread is None else len(past.unread)) for past in handover.mtp],
        )
        self._transport.start(Parcel(note=note, tensor=torch.cat(states) if states else torch.empty(0)), to=self._to)


def handover_of(rest: Rest, states: Tensor) -> Handover:
    """Return the handover that `Way.finish` has sent."""
    pieces = states.split([rows for _, rows in rest.mtp]) if len(states) else [None] * len(rest.mtp)
    return Handover(
        token=rest.token,
        num_computed=rest.num_computed,
        mtp=tuple(
            MtpHandover(done=done, unread=piece if rows else None)
            for (done, rows), piece in zip(rest.mtp, pieces, strict=True)
        ),
    )


class Incoming:
    """Pages of one expected request, as they come: all of them, each once, in order, or the request is lost."""

    def __init__(self, *, first_page: int, page_tokens: int) -> None:
        self.num_bytes = 0
        self._next = first_page
        self._page_tokens = page_tokens

    def take(self, note: Pages, *, entries: Tensor) -> None:
        """Take note of pages that have come.

        Raises:
            EngineError: those before them have not.
        """
        if note.first_page != self._next:
            raise EngineError(f"page {self._next} was to come, and page {note.first_page} came; the line had broken")
        self._next += entries.shape[1]
        self.num_bytes += entries.numel() * entries.element_size()

    def end(self, rest: Rest) -> None:
        """See that nothing is lacking.

        Raises:
            EngineError: pages are.
        """
        wanted = -(-rest.num_computed // self._page_tokens)
        if self._next != wanted:
            raise EngineError(f"{wanted} pages were to come, and {self._next} have; the line had broken")
