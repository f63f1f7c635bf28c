"""Answers in the shapes of the API: whole, or as server-sent events."""

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import msgspec
from starlette.responses import StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from dsv3.data.tokenizer import Tokenizer
from dsv3.infer.events import TokenLogprob
from dsv3.serve.answers import Choice, Delta, usage_of
from dsv3.serve.edge import ABORT
from dsv3.serve.errors import ApiError
from dsv3.serve.running import Answers
from dsv3.serve.tool_calls import ToolCallDelta

KEEP_ALIVE = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"


class EventStream(StreamingResponse):
    """A stream whose reader must take what is written within some seconds."""

    def __init__(self, content: AsyncGenerator[bytes, None], *, media_type: str, seconds: float) -> None:
        super().__init__(
            content, media_type=media_type, headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        )
        self._content = content
        self._seconds = seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Write the stream; break the connection off when its reader does not read."""

        async def in_time(message: Message) -> None:
            await asyncio.wait_for(send(message), self._seconds)

        try:
            await super().__call__(scope, receive, in_time)
        except TimeoutError:
            await self._content.aclose()
            if (abort := scope.get("extensions", {}).get(ABORT)) is not None:
                abort()


def event(value: dict[str, Any]) -> bytes:
    """Return one server-sent event."""
    return b"data: " + msgspec.json.encode(value) + b"\n\n"


@dataclass(kw_only=True)
class Reply(ABC):
    """What both kinds of answers share."""

    model: str
    tokenizer: Tokenizer
    usage_at_end: bool
    usage_always: bool
    keep_alive_seconds: float
    num_logprobs: int | None
    created: int = field(default_factory=lambda: int(time.time()))

    kind: ClassVar[str]
    chunk_kind: ClassVar[str]
    prefix: ClassVar[str]

    async def whole(self, answers: Answers) -> dict[str, Any]:
        """Return the answer in one piece."""
        deltas: dict[int, list[Delta]] = {choice.index: [] for choice in answers.choices}
        async for found in answers.deltas():
            if found is not None:
                deltas[found[0].index].append(found[1])
        return {
            **self._head(answers, kind=self.kind),
            "choices": [self._complete(choice, joined(deltas[choice.index])) for choice in answers.choices],
            "usage": usage_of(answers.choices).as_dict(),
        }

    async def stream(self, answers: Answers) -> AsyncIterator[bytes]:
        """Yield the answer as events, ended by [DONE]; an error in the middle is an event too."""
        try:
            for opening in self._openings(answers):
                yield self._chunk(answers, [opening])
            async for found in answers.deltas(wake_seconds=self.keep_alive_seconds):
                if found is None:
                    yield KEEP_ALIVE
                    continue
                choice, delta = found
                for part in self._parts(choice, delta):
                    yield self._chunk(answers, [part])
            if self.usage_at_end:
                usage = usage_of(answers.choices).as_dict()
                yield event({**self._head(answers, kind=self.chunk_kind), "choices": [], "usage": usage})
        except ApiError as error:
            yield event(error.body())
        yield DONE

    def _chunk(self, answers: Answers, choices: list[dict[str, Any]]) -> bytes:
        usage = {"usage": usage_of(answers.choices).as_dict()} if self.usage_always else {}
        return event({**self._head(answers, kind=self.chunk_kind), "choices": choices, **usage})

    def _head(self, answers: Answers, *, kind: str) -> dict[str, Any]:
        return {"id": f"{self.prefix}-{answers.id}", "object": kind, "created": self.created, "model": self.model}

    @abstractmethod
    def _openings(self, answers: Answers) -> list[dict[str, Any]]:
        """Return what stands before the first tokens."""

    @abstractmethod
    def _parts(self, choice: Choice, delta: Delta) -> list[dict[str, Any]]:
        """Return the entries of the chunks that tell a delta."""

    @abstractmethod
    def _complete(self, choice: Choice, delta: Delta) -> dict[str, Any]:
        """Return the entry of a whole answer."""

    def _text(self, token: int) -> str:
        return self.tokenizer.token_bytes(token).decode("utf-8", errors="replace")


@dataclass(kw_only=True)
class ChatReply(Reply):
    """Answers of /v1/chat/completions."""

    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"
    prefix = "chatcmpl"

    def _openings(self, answers: Answers) -> list[dict[str, Any]]:
        opening = {"role": "assistant", "content": ""}
        return [{"index": choice.index, "delta": opening, "finish_reason": None} for choice in answers.choices]

    def _parts(self, choice: Choice, delta: Delta) -> list[dict[str, Any]]:
        """Return the chunk of a delta, and one of its own for the end."""
        changed: dict[str, Any] = {}
        if delta.reasoning:
            changed |= {"reasoning_content": delta.reasoning, "reasoning": delta.reasoning}
        if delta.content:
            changed["content"] = delta.content
        if delta.calls:
            changed["tool_calls"] = [_call_delta(call) for call in delta.calls]
        parts = []
        if changed or delta.logprobs:
            part = {"index": choice.index, "delta": changed, "finish_reason": None}
            parts.append(part | self._logprobs(delta.logprobs))
        if delta.finish_reason is not None:
            parts.append({"index": choice.index, "delta": {}, "finish_reason": delta.finish_reason})
        return parts

    def _complete(self, choice: Choice, delta: Delta) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": delta.content}
        if delta.reasoning:
            message |= {"reasoning_content": delta.reasoning, "reasoning": delta.reasoning}
        if delta.calls:
            message["tool_calls"] = whole_calls(delta.calls)
            message["content"] = delta.content or None
        ended = {"index": choice.index, "message": message, "finish_reason": choice.finish_reason}
        return ended | self._logprobs(delta.logprobs)

    def _logprobs(self, logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
        if self.num_logprobs is None:
            return {"logprobs": None}
        return {"logprobs": {"content": [self._entry(entry) for entry in logprobs], "refusal": None}}

    def _entry(self, entry: TokenLogprob) -> dict[str, Any]:
        top = [self._named(token, logprob) for token, logprob in entry.top]
        return self._named(entry.token, entry.logprob) | {"top_logprobs": top}

    def _named(self, token: int, logprob: float) -> dict[str, Any]:
        return {"token": self._text(token), "logprob": logprob, "bytes": list(self.tokenizer.token_bytes(token))}


@dataclass(kw_only=True)
class CompletionReply(Reply):
    """Answers of /v1/completions."""

    echo: list[list[int]] | None
    """The prompts, where they are to stand before the answers."""

    kind = chunk_kind = "text_completion"
    prefix = "cmpl"

    def _openings(self, answers: Answers) -> list[dict[str, Any]]:
        if self.echo is None or self.num_logprobs is not None:
            return []  # with log-probabilities, the prompt comes with the first tokens
        return [self._choice(choice, text=self._prompt(choice), finish_reason=None) for choice in answers.choices]

    def _parts(self, choice: Choice, delta: Delta) -> list[dict[str, Any]]:
        text, logprobs = delta.content, list[TokenLogprob | None](delta.logprobs)
        if self.num_logprobs is not None and self.echo is not None and choice.usage.completion == len(delta.logprobs):
            text, logprobs = self._prompt(choice) + text, [*self._of_prompt(choice), *logprobs]
        return [self._choice(choice, text=text, logprobs=logprobs, finish_reason=delta.finish_reason)]

    def _complete(self, choice: Choice, delta: Delta) -> dict[str, Any]:
        text, logprobs = delta.content, list[TokenLogprob | None](delta.logprobs)
        if self.echo is not None:
            text, logprobs = self._prompt(choice) + text, [*self._of_prompt(choice), *logprobs]
        return self._choice(choice, text=text, logprobs=logprobs, finish_reason=choice.finish_reason)

    def _prompt(self, choice: Choice) -> str:
        assert self.echo is not None
        ids = self.echo[choice.prompt_index]
        return self.tokenizer.decode(ids, skip_special=True)

    def _of_prompt(self, choice: Choice) -> Sequence[TokenLogprob | None]:
        return choice.prompt_logprobs

    def _choice(
        self,
        choice: Choice,
        *,
        text: str,
        finish_reason: str | None,
        logprobs: Sequence[TokenLogprob | None] = (),
    ) -> dict[str, Any]:
        found = None if self.num_logprobs is None else self._listed(choice, logprobs)
        return {"index": choice.index, "text": text, "logprobs": found, "finish_reason": finish_reason}

    def _listed(self, choice: Choice, logprobs: Sequence[TokenLogprob | None]) -> dict[str, Any]:
        """Return log-probabilities as four lists, as this older part of the API has them."""
        first = self.echo[choice.prompt_index][0] if self.echo is not None else 0
        tokens = [self._text(first if entry is None else entry.token) for entry in logprobs]
        offsets, place = [], 0
        for token in tokens:
            offsets.append(place)
            place += len(token)
        return {
            "tokens": tokens,
            "token_logprobs": [None if entry is None else entry.logprob for entry in logprobs],
            "top_logprobs": [
                None if entry is None else {self._text(token): value for token, value in entry.top}
                for entry in logprobs
            ],
            "text_offset": offsets,
        }


def joined(deltas: Sequence[Delta]) -> Delta:
    """Return what several deltas of one choice come to."""
    return Delta(
        content="".join(delta.content for delta in deltas),
        reasoning="".join(delta.reasoning for delta in deltas),
        calls=[call for delta in deltas for call in delta.calls],
        logprobs=tuple(entry for delta in deltas for entry in delta.logprobs),
    )


def whole_calls(deltas: Sequence[ToolCallDelta]) -> list[dict[str, Any]]:
    """Return tool calls put together from their pieces."""
    calls: dict[int, dict[str, Any]] = {}
    for delta in deltas:
        call = calls.setdefault(
            delta.index, {"id": delta.id, "type": "function", "function": {"name": delta.name, "arguments": ""}}
        )
        call["function"]["arguments"] += delta.arguments
    return list(calls.values())


def _call_delta(call: ToolCallDelta) -> dict[str, Any]:
    function: dict[str, Any] = {"arguments": call.arguments}
    if call.name is None:
        return {"index": call.index, "function": function}
    return {"index": call.index, "id": call.id, "type": "function", "function": {"name": call.name} | function}
