"""A server that says what a test tells it to, in the OpenAI API's words, as fast or slow as it is told."""

import asyncio
import json
import socket
import threading
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse


@dataclass(kw_only=True)
class Script:
    """What happens to one request."""

    deltas: list[dict[str, str]] = field(default_factory=lambda: [{"content": "Hello."}])
    usage: dict[str, Any] | None = None
    """Sent at the end; an answer whose chunks carry usage has it in `chunk_usage`."""
    chunk_usage: list[dict[str, Any]] = field(default_factory=list)
    seconds_to_first: float = 0.0
    seconds_between: float = 0.0
    status: int = 200
    error: dict[str, Any] | None = None
    """The body of a refusal; within a stream, where `status` is 200, sent after the deltas."""
    headers: dict[str, str] = field(default_factory=dict)
    finish_reason: str = "stop"
    is_endless: bool = False
    """Goes on with its last delta until somebody stops it."""
    is_cut: bool = False
    """Ends without finish reason and `[DONE]`."""
    raw: str = ""
    """Sent as it is, instead of everything else."""


class ScriptedServer:
    """Serves on a free port of this machine, in a thread of its own, until it is left."""

    def __init__(self) -> None:
        self.page: tuple[str, str] | None = None
        """The document at `/`, and its Content-Security-Policy."""
        self.reset()
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        config = uvicorn.Config(self._app(), log_level="critical", lifespan="off", timeout_graceful_shutdown=1)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._socket]})

    def reset(self) -> None:
        self.scripts: list[Script] = []
        """Played one a request, in order; the last one stays."""
        self.key = ""
        self.models = ["tiny"]
        self.received: list[dict[str, Any]] = []
        self.times: list[float] = []
        """When each request came, by `time.perf_counter`."""
        self.most_at_once = 0
        self.hung_up = threading.Event()
        """Set once a client has gone in the middle of an answer."""
        self._at_once = 0

    def __enter__(self) -> "ScriptedServer":
        self._thread.start()
        deadline = time.monotonic() + 10
        while not self._server.started:
            assert time.monotonic() < deadline, "the scripted server did not start"
            time.sleep(0.005)
        return self

    def __exit__(self, *_) -> None:
        self._server.should_exit = True
        self._thread.join(timeout=10)
        self._socket.close()

    def _app(self) -> FastAPI:
        app = FastAPI()

        @app.get("/")
        async def page() -> Response:
            assert self.page is not None
            return HTMLResponse(self.page[0], headers={"Content-Security-Policy": self.page[1]})

        @app.get("/health")
        async def health() -> Response:
            return JSONResponse({"status": "ok"})

        @app.get("/v1/models")
        async def models(request: Request) -> Response:
            if refused := self._refusal(request):
                return refused
            return JSONResponse({"object": "list", "data": [{"id": name, "object": "model"} for name in self.models]})

        @app.post("/v1/chat/completions")
        async def chat(request: Request) -> Response:
            return await self._answer(request, is_chat=True)

        @app.post("/v1/completions")
        async def complete(request: Request) -> Response:
            return await self._answer(request, is_chat=False)

        return app

    def _refusal(self, request: Request) -> Response | None:
        if not self.key or request.headers.get("Authorization") == f"Bearer {self.key}":
            return None
        return JSONResponse({"error": {"message": "no such key", "type": "authentication_error"}}, status_code=401)

    async def _answer(self, request: Request, *, is_chat: bool) -> Response:
        self.times.append(time.perf_counter())
        if refused := self._refusal(request):
            return refused
        self.received.append(await request.json())
        script = self.scripts.pop(0) if len(self.scripts) > 1 else self.scripts[0] if self.scripts else Script()
        if script.status != 200:
            return JSONResponse({"error": script.error}, status_code=script.status, headers=script.headers)
        return StreamingResponse(self._stream(script, is_chat=is_chat), media_type="text/event-stream")

    async def _stream(self, script: Script, *, is_chat: bool) -> AsyncIterator[str]:
        self._at_once += 1
        self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            for event in [script.raw] if script.raw else []:
                yield event
            if not script.raw:
                async for event in self._events(script, is_chat=is_chat):
                    yield event
        except asyncio.CancelledError:
            self.hung_up.set()
            raise
        finally:
            self._at_once -= 1

    async def _events(self, script: Script, *, is_chat: bool) -> AsyncIterator[str]:
        yield ": keep-alive\n\n"
        if is_chat:
            yield chunk({"delta": {"role": "assistant", "content": ""}, "finish_reason": None})
        await asyncio.sleep(script.seconds_to_first)
        place = 0
        while place < len(script.deltas) or script.is_endless:
            if place:
                await asyncio.sleep(script.seconds_between or (0.005 if script.is_endless else 0))
            delta = script.deltas[min(place, len(script.deltas) - 1)]
            usage = script.chunk_usage[place] if place < len(script.chunk_usage) else None
            choice = {"delta": delta} if is_chat else {"text": delta["content"]}
            yield chunk({**choice, "finish_reason": None}, usage=usage)
            place += 1
        if script.error is not None:
            yield f"data: {json.dumps({'error': script.error})}\n\n"
        elif not script.is_cut:
            yield chunk({"delta": {}, "text": "", "finish_reason": script.finish_reason})
            if script.usage is not None:
                yield chunk(None, usage=script.usage)
            yield "data: [DONE]\n\n"


def chunk(choice: dict[str, Any] | None, *, usage: dict[str, Any] | None = None) -> str:
    """One event of a stream."""
    body = {"object": "chunk", "choices": [] if choice is None else [{"index": 0, **choice}], "usage": usage}
    return f"data: {json.dumps(body)}\n\n"
