"""The HTTP application: an OpenAI-compatible API, health, metrics and the chat page."""

import asyncio
import hmac
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from functools import cached_property
from typing import Any

from fastapi import Depends, FastAPI, Request, Response
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import HTMLResponse, JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dsv3.config import ServerConfig
from dsv3.data.tokenizer import Tokenizer
from dsv3.errors import ConfigError
from dsv3.serve.asking import Question, chat_question, completion_questions, grammar_parameter, refuse_long_prompt
from dsv3.serve.engine_client import EngineClient
from dsv3.serve.errors import ApiError, answer_errors, error_body
from dsv3.serve.grammar import GrammarFactory, GrammarSpec
from dsv3.serve.metrics import Metrics
from dsv3.serve.page import chat_page, content_security_policy
from dsv3.serve.protocol import ChatBody, CompletionBody, Sampling
from dsv3.serve.replies import ChatReply, CompletionReply, EventStream, Reply
from dsv3.serve.running import Answers

OPEN_PATHS = ("/", "/health", "/metrics", "/openapi.json")
"""Answered without a key."""
RETRY_SECONDS = 2
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"description": text, "content": {"application/json": {}}}
    for status, text in (
        (400, "The request cannot be obeyed; the error names the parameter."),
        (401, "No key, or a wrong one."),
        (404, "No such model."),
        (413, "The body is too large."),
        (429, "Too many answers under way; see Retry-After."),
        (500, "The server failed."),
        (503, "The engine has ended."),
        (504, "No token came in time."),
    )
}


class Application:
    """What the routes share."""

    def __init__(
        self, config: ServerConfig, *, engine: EngineClient, tokenizer: Tokenizer, bos_id: int, eos_id: int
    ) -> None:
        self.config = config
        self.engine = engine
        self.tokenizer = tokenizer
        self.bos_id = bos_id
        self.metrics = Metrics()
        self.name = config.served_name
        self.created = int(time.time())
        self._eos_id = eos_id
        self._compiling = asyncio.Lock()

    @cached_property
    def grammars(self) -> GrammarFactory:
        """Checks grammars before the engine makes them; half a second to make with the published vocabulary."""
        return GrammarFactory(self.tokenizer, eos_id=self._eos_id)

    def model_card(self) -> dict[str, Any]:
        """Return what /v1/models tells of the model."""
        limit = self.engine.ready.context_limit
        return {"id": self.name, "object": "model", "created": self.created, "owned_by": "dsv3", "max_model_len": limit}

    async def questions(self, body: Sampling) -> list[Question]:
        """Return the prompts of a request, encoded beside the event loop, with everything checked that can be.

        Raises:
            ApiError, ConfigError: something in it cannot be obeyed.
        """
        if body.model and body.model != self.name:
            raise ApiError(404, f"there is no model {body.model!r}; the one served is {self.name!r}", param="model")
        if (body.n or 1) > self.config.max_choices:
            raise ApiError(400, f"n = {body.n}; at most {self.config.max_choices} are made at once", param="n")
        if body.stream_options is not None and not body.stream:
            raise ApiError(400, "stream_options are for stream = true", param="stream_options")
        limit = self.config.max_tokens_default
        if isinstance(body, ChatBody):
            found = [await asyncio.to_thread(chat_question, body, tokenizer=self.tokenizer, max_tokens=limit)]
            prompt = "messages"
        else:
            assert isinstance(body, CompletionBody)
            found = await asyncio.to_thread(
                completion_questions, body, tokenizer=self.tokenizer, bos_id=self.bos_id, max_tokens=limit
            )
            prompt = "prompt"
        if len(found) * (body.n or 1) > self.config.max_choices:
            raise ApiError(
                400,
                f"{len(found)} prompts with n = {body.n or 1} are {len(found) * (body.n or 1)} answers; at most "
                f"{self.config.max_choices} are made at once",
                param=prompt,
            )
        for question in found:
            refuse_long_prompt(question, context_limit=self.engine.ready.context_limit, param=prompt)
            await self._check_grammar(question, body=body)
        return found

    async def _check_grammar(self, question: Question, *, body: Sampling) -> None:
        if question.grammar is None:
            return
        async with self._compiling:  # a factory is used by one thread at a time
            try:
                await asyncio.to_thread(self._try_grammar, question.grammar)
            except ConfigError as error:
                raise ApiError(400, str(error), param=grammar_parameter(body)) from error

    def _try_grammar(self, spec: GrammarSpec) -> None:
        # Some grammars are found too large only when the first token is asked for.
        self.grammars.make(spec).allowed(vocab_size=self.tokenizer.vocab_size)

    async def answer(self, request: Request, body: Sampling) -> Response:
        """Answer a request, at once or as a stream."""
        if not self.engine.is_alive:
            raise ApiError(503, "the engine has ended; the server stops")
        questions = await self.questions(body)
        count = len(questions) * (body.n or 1)
        if self.engine.num_open + count > self.config.queue_limit:
            raise ApiError(
                429,
                f"{self.engine.num_open} answers are under way, and {self.config.queue_limit} is the limit; try again",
                retry_after=RETRY_SECONDS,
            )
        answers = Answers(
            questions,
            n=body.n or 1,
            engine=self.engine,
            tokenizer=self.tokenizer,
            config=self.config,
            metrics=self.metrics,
            splits_reasoning=isinstance(body, ChatBody),
        )
        reply = self._reply(body, questions=questions)
        if body.stream:
            await answers.start()
            stream = reply.stream(answers)
            return EventStream(
                _closing(stream, answers), media_type="text/event-stream", seconds=self.config.slow_reader_seconds
            )
        async with _cancelled_on_disconnect(request, answers):
            await answers.start()
            return JSONResponse(await reply.whole(answers))

    def _reply(self, body: Sampling, *, questions: list[Question]) -> Reply:
        options = body.stream_options
        shared: dict[str, Any] = {
            "model": self.name,
            "tokenizer": self.tokenizer,
            "usage_at_end": options is not None and options.include_usage,
            "usage_always": options is not None and options.continuous_usage_stats,
            "keep_alive_seconds": self.config.keep_alive_seconds,
            "num_logprobs": questions[0].num_logprobs,
        }
        if isinstance(body, ChatBody):
            return ChatReply(**shared)
        assert isinstance(body, CompletionBody)
        return CompletionReply(**shared, echo=[question.prompt_ids for question in questions] if body.echo else None)


def build_app(shared: Application) -> FastAPI:
    """Make the application."""
    config = shared.config
    app = FastAPI(
        title="dsv3",
        description="DeepSeek-V3, served: the OpenAI API.",
        docs_url=None,
        redoc_url=None,
        responses=ERRORS,
    )
    app.state.shared = shared
    answer_errors(app)
    keyed = [Depends(_needs_key(config.api_keys))]

    @app.post("/v1/chat/completions", dependencies=keyed)
    async def chat(request: Request, body: ChatBody) -> Response:
        """Answer a conversation."""
        return await shared.answer(request, body)

    @app.post("/v1/completions", dependencies=keyed)
    async def complete(request: Request, body: CompletionBody) -> Response:
        """Continue texts."""
        return await shared.answer(request, body)

    @app.post("/v1/embeddings", dependencies=keyed)
    async def embed() -> Response:
        """Refuse: this model makes no embeddings."""
        raise ApiError(400, f"{shared.name} is a language model and makes no embeddings", code="unsupported_endpoint")

    @app.get("/v1/models", dependencies=keyed)
    async def models() -> dict[str, Any]:
        """List the one model."""
        return {"object": "list", "data": [shared.model_card()]}

    @app.get("/v1/models/{name:path}", dependencies=keyed)
    async def model(name: str) -> dict[str, Any]:
        """Describe the model."""
        if name != shared.name:
            raise ApiError(404, f"there is no model {name!r}; the one served is {shared.name!r}", param="model")
        return shared.model_card()

    @app.get("/health")
    async def health() -> Response:
        """Tell whether answers can be had: 200, or 503."""
        alive = shared.engine.is_alive
        return JSONResponse({"status": "ok" if alive else "the engine has ended"}, status_code=200 if alive else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        """Tell all counts, for Prometheus."""
        shared.metrics.stats = shared.engine.stats
        return Response(shared.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        """Show the chat page."""
        headers = {"Content-Security-Policy": content_security_policy(), "X-Content-Type-Options": "nosniff"}
        return HTMLResponse(chat_page(), headers=headers)

    app.add_middleware(_LimitBody, most=config.body_limit_bytes)
    app.add_middleware(_CountResponses, metrics=shared.metrics)
    if config.cors_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=list(config.cors_origins), allow_methods=["*"], allow_headers=["*"]
        )
    return app


def _needs_key(keys: tuple[str, ...]) -> Callable[[Request], Awaitable[None]]:
    async def check(request: Request) -> None:
        if not keys:
            return
        given = request.headers.get("authorization", "").removeprefix("Bearer ").strip().encode()
        # All are compared, each in constant time, so that the time tells nothing.
        if not sum(hmac.compare_digest(given, key.encode()) for key in keys):
            raise ApiError(401, "give an API key of this server as 'Authorization: Bearer KEY'", code="invalid_api_key")

    return check


async def _closing(stream: AsyncIterator[bytes], answers: "Answers") -> AsyncIterator[bytes]:
    try:
        async for piece in stream:
            yield piece
    finally:
        answers.close()


@asynccontextmanager
async def _cancelled_on_disconnect(request: Request, answers: "Answers") -> AsyncIterator[None]:
    """Cancel the block when the client hangs up: nobody would read the answer."""
    task = asyncio.current_task()
    assert task is not None

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        task.cancel()

    watcher = asyncio.create_task(watch())
    try:
        yield
    finally:
        watcher.cancel()
        with suppress(asyncio.CancelledError):
            await watcher
        answers.close()


class _LimitBody:
    """Refuses bodies that are too large: by what they say of themselves, or as soon as they are."""

    def __init__(self, app: ASGIApp, *, most: int) -> None:
        self._app = app
        self._most = most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        said = dict(scope["headers"]).get(b"content-length", b"0")
        if said.isdigit() and int(said) > self._most:
            return await self._refuse(scope, receive, send)
        taken = 0
        is_too_large = False
        has_begun = False

        async def counted() -> Message:
            nonlocal taken, is_too_large
            message = await receive()
            if message["type"] == "http.request":
                taken += len(message.get("body", b""))
                if taken > self._most:
                    is_too_large = True
                    return {"type": "http.disconnect"}
            return message

        async def noted(message: Message) -> None:
            nonlocal has_begun
            if is_too_large and not has_begun:
                return
            has_begun = True
            await send(message)

        try:
            await self._app(scope, counted, noted)
        except Exception:
            if not is_too_large or has_begun:
                raise
        if is_too_large and not has_begun:
            await self._refuse(scope, receive, send)
        return None

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = error_body(413, f"the body is larger than {self._most:,} bytes, which is the limit")
        await JSONResponse(body, status_code=413, headers={"Connection": "close"})(scope, receive, send)


class _CountResponses:
    """Counts answers by path and status."""

    def __init__(self, app: ASGIApp, *, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def noted(message: Message) -> None:
            if message["type"] == "http.response.start":
                route = scope.get("route")
                path = getattr(route, "path", "other")  # not the path itself, of which there are endlessly many
                self._metrics.responses.labels(path=path, status=str(message["status"])).inc()
            await send(message)

        await self._app(scope, receive, noted if scope["type"] == "http" else send)
