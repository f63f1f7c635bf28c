"""The HTTP application: an OpenAI-compatible API, health, metrics and the chat page."""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from functools import cached_property
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import HTMLResponse, JSONResponse

from dsv3.config import ServerConfig
from dsv3.data.tokenizer import Tokenizer
from dsv3.errors import ConfigError
from dsv3.serve.asking import (
    Question,
    chat_question,
    completion_questions,
    grammar_parameter,
    refuse_long_prompt,
    refuse_unknown_tokens,
)
from dsv3.serve.edge import CountResponses, NeedKey, TakeBody
from dsv3.serve.engine_client import EngineClient
from dsv3.serve.errors import ApiError, answer_errors
from dsv3.serve.grammar import GrammarFactory, GrammarSpec
from dsv3.serve.metrics import Metrics
from dsv3.serve.page import chat_page, content_security_policy
from dsv3.serve.protocol import ChatBody, CompletionBody, Sampling
from dsv3.serve.replies import ChatReply, CompletionReply, EventStream, Reply
from dsv3.serve.running import Answers

CLIENT_CLOSED_REQUEST = 499
"""What is counted where the client has hung up; nobody reads it."""
RETRY_SECONDS = 2
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"description": text, "content": {"application/json": {}}}
    for status, text in (
        (400, "The request cannot be obeyed; the error names the parameter."),
        (401, "No key, or a wrong one."),
        (404, "No such model."),
        (408, "The body did not come in time."),
        (413, "The body is too large."),
        (429, "Too many answers under way; see Retry-After."),
        (500, "The server failed."),
        (503, "The server stops."),
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
        self.metrics = Metrics(engine)
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
            refuse_unknown_tokens(
                question,
                num_embeddings=self.engine.ready.num_embeddings,
                num_drawn=self.tokenizer.vocab_size,
                param=prompt,
            )
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
        return await _unless_gone(request, self._whole(reply, answers=answers))

    async def _whole(self, reply: Reply, *, answers: Answers) -> Response:
        try:
            await answers.start()
            return JSONResponse(await reply.whole(answers))
        finally:
            answers.close()

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

    @app.post("/v1/chat/completions")
    async def chat(request: Request, body: ChatBody) -> Response:
        """Answer a conversation."""
        return await shared.answer(request, body)

    @app.post("/v1/completions")
    async def complete(request: Request, body: CompletionBody) -> Response:
        """Continue texts."""
        return await shared.answer(request, body)

    @app.post("/v1/embeddings")
    async def embed() -> Response:
        """Refuse: this model makes no embeddings."""
        raise ApiError(400, f"{shared.name} is a language model and makes no embeddings", code="unsupported_endpoint")

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """List the one model."""
        return {"object": "list", "data": [shared.model_card()]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        """Describe the model."""
        if name != shared.name:
            raise ApiError(404, f"there is no model {name!r}; the one served is {shared.name!r}", param="model")
        return shared.model_card()

    @app.get("/health")
    async def health() -> Response:
        """Tell whether answers can be had now: 200, or 503 and why not."""
        fault = "" if shared.engine.is_alive else "the engine has ended"
        if not fault and (absent := shared.engine.absent):
            fault = f"no {' and no '.join(absent)} worker is there; requests wait until one is"
        return JSONResponse({"status": fault or "ok"}, status_code=503 if fault else 200)

    @app.get("/metrics")
    async def metrics() -> Response:
        """Tell all counts, for Prometheus."""
        return Response(shared.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        """Show the chat page."""
        headers = {"Content-Security-Policy": content_security_policy(), "X-Content-Type-Options": "nosniff"}
        return HTMLResponse(chat_page(), headers=headers)

    # The last one added is the first to see a request.
    app.add_middleware(TakeBody, most_bytes=config.body_limit_bytes, seconds=config.body_timeout_seconds)
    if config.api_keys:
        app.add_middleware(NeedKey, prefix="/v1/", keys=config.api_keys)
    app.add_middleware(CountResponses, metrics=shared.metrics)
    if config.cors_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=list(config.cors_origins), allow_methods=["*"], allow_headers=["*"]
        )
    return app


async def _closing(stream: AsyncIterator[bytes], answers: "Answers") -> AsyncGenerator[bytes, None]:
    try:
        async for piece in stream:
            yield piece
    finally:
        answers.close()


async def _unless_gone(request: Request, work: Coroutine[Any, Any, Response]) -> Response:
    """Return what comes of `work`; give it up when the client hangs up, since nobody would read the answer."""
    working, gone = asyncio.ensure_future(work), asyncio.ensure_future(_hung_up(request))
    try:
        await asyncio.wait((working, gone), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    finally:
        for task in (working, gone):
            task.cancel()
        await asyncio.wait((working, gone))


async def _hung_up(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
