"""Between the socket and the application: keys, bodies, counts, and connections that are broken off."""

import asyncio
import hmac
import socket
import struct
from functools import partial

from starlette.requests import HTTPConnection
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from dsv3.serve.errors import error_body
from dsv3.serve.metrics import Metrics

LINGER_SECONDS = 2.0
"""How long a body that is refused is still read and dropped: a client that is cut off while it writes sees a broken
connection instead of the answer."""
ABORT = "dsv3.abort"
"""Extension of a connection's scope: call it, and the connection is gone, whatever was still to be written."""


class AbortableProtocol(AutoHTTPProtocol):  # type: ignore[misc, valid-type]
    """HTTP as uvicorn speaks it, to an application that can break a connection off.

    Closing one the usual way first waits for the client to read what is written, which may be never.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Tell the application of this connection how to break it off."""
        super().connection_made(transport)
        self.app = partial(_call_with_abort, self.app, transport)  # type: ignore[has-type]


async def _call_with_abort(
    app: ASGIApp, transport: asyncio.Transport, scope: Scope, receive: Receive, send: Send
) -> None:
    def abort() -> None:
        # Without lingering, or the system would go on offering what lies in its own buffers.
        connection = transport.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        transport.abort()

    scope.setdefault("extensions", {})[ABORT] = abort
    await app(scope, receive, send)


class NeedKey:
    """Refuses what is under a path and comes without one of the keys, before its body is read."""

    def __init__(self, app: ASGIApp, *, prefix: str, keys: tuple[str, ...]) -> None:
        self._app = app
        self._prefix = prefix
        self._keys = [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or refuse it."""
        if scope["type"] != "http" or not scope["path"].startswith(self._prefix) or self._is_known(scope):
            return await self._app(scope, receive, send)
        message = "give an API key of this server as 'Authorization: Bearer KEY'"
        refusal = JSONResponse(
            error_body(401, message, code="invalid_api_key"),
            status_code=401,
            headers={"WWW-Authenticate": "Bearer", "Connection": "close"},
        )
        return await _refuse(refusal, receive, send)

    def _is_known(self, scope: Scope) -> bool:
        scheme, _, given = HTTPConnection(scope).headers.get("authorization", "").partition(" ")
        # All are compared, each in constant time, so that the time tells nothing.
        found = sum(hmac.compare_digest(given.strip().encode("latin-1"), key) for key in self._keys)
        return scheme.lower() == "bearer" and found > 0


class TakeBody:
    """Reads a body whole before the application sees it; refuses one that is too large, or does not come in time."""

    def __init__(self, app: ASGIApp, *, most_bytes: int, seconds: float) -> None:
        self._app = app
        self._most = most_bytes
        self._seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or refuse it."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        said = HTTPConnection(scope).headers.get("content-length", "0")
        if said.isdigit() and int(said) > self._most:
            return await self._refuse_size(receive, send)
        body = bytearray()
        message: Message = {"more_body": True}
        try:
            async with asyncio.timeout(self._seconds):
                while message.get("more_body", False):
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    body += message.get("body", b"")
                    if len(body) > self._most:
                        return await self._refuse_size(receive, send)
        except TimeoutError:
            late = error_body(408, f"the body was not complete within {self._seconds:g} seconds")
            return await _refuse(_closing(late, status=408), receive, send)
        messages = iter([{"type": "http.request", "body": bytes(body), "more_body": False}])

        async def taken() -> Message:
            return next(messages, None) or await receive()

        return await self._app(scope, taken, send)

    async def _refuse_size(self, receive: Receive, send: Send) -> None:
        body = error_body(413, f"the body is larger than {self._most:,} bytes, which is the limit")
        await _refuse(_closing(body, status=413), receive, send)


class CountResponses:
    """Counts answers by path and status."""

    def __init__(self, app: ASGIApp, *, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass everything on, and look at what comes back."""
        has_begun = False

        def count(status: int) -> None:
            path = getattr(scope.get("route"), "path", "other")  # not the path itself: there are endlessly many
            self._metrics.responses.labels(path=path, status=str(status)).inc()

        async def noted(message: Message) -> None:
            nonlocal has_begun
            if message["type"] == "http.response.start":
                has_begun = True
                count(message["status"])
            await send(message)

        try:
            await self._app(scope, receive, noted if scope["type"] == "http" else send)
        except Exception:
            if not has_begun:
                count(500)  # which is written further out
            raise


def _closing(body: dict[str, object], *, status: int) -> JSONResponse:
    return JSONResponse(body, status_code=status, headers={"Connection": "close"})


async def _refuse(answer: JSONResponse, receive: Receive, send: Send) -> None:
    """Answer at once, and read on for a while before the connection is closed."""
    await send({"type": "http.response.start", "status": answer.status_code, "headers": answer.raw_headers})
    await send({"type": "http.response.body", "body": answer.body, "more_body": True})
    try:
        async with asyncio.timeout(LINGER_SECONDS):
            message: Message = {"more_body": True}
            while message.get("more_body", False):
                message = await receive()
    except TimeoutError:
        pass
    await send({"type": "http.response.body", "body": b"", "more_body": False})
