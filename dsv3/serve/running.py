"""The answers of one request while they are made: asked for, waited for in time, and given up when nobody reads."""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import replace

from dsv3.config import ServerConfig
from dsv3.data.tokenizer import Tokenizer
from dsv3.infer.events import FinishReason, TokenEvent
from dsv3.serve.answers import Choice, Delta
from dsv3.serve.asking import Question
from dsv3.serve.engine_client import EngineClient
from dsv3.serve.errors import ApiError
from dsv3.serve.messages import Ask, Refused
from dsv3.serve.metrics import Metrics

MOST_UNREAD = 16_384
"""Events of one answer that may lie unread before its reader is given up."""


class Answers:
    """All choices of all prompts of one request."""

    def __init__(
        self,
        questions: list[Question],
        *,
        n: int,
        engine: EngineClient,
        tokenizer: Tokenizer,
        config: ServerConfig,
        metrics: Metrics,
        splits_reasoning: bool,
    ) -> None:
        self.id = uuid.uuid4().hex
        self.choices: list[Choice] = []
        self._asks: list[Ask] = []
        self._engine = engine
        self._config = config
        self._metrics = metrics
        self._events: asyncio.Queue[tuple[Choice, TokenEvent | Refused]] = asyncio.Queue()
        self._readers: list[asyncio.Task[None]] = []
        self._began = time.perf_counter()
        self._first: dict[int, float] = {}
        for prompt_index, question in enumerate(questions):
            for number in range(n):
                choice = Choice(
                    index=len(self.choices),
                    prompt_index=prompt_index,
                    request_id=f"{self.id}-{len(self.choices)}",
                    tokenizer=tokenizer,
                    stop=question.stop,
                    splits_reasoning=splits_reasoning,
                    thinks=question.thinks,
                    reads_tools=question.reads_tools,
                )
                self.choices.append(choice)
                self._asks.append(_ask(question, request_id=choice.request_id, number=number))

    async def start(self) -> None:
        """Hand all of it to the engine.

        Raises:
            EngineError: the engine has ended.
        """
        for choice, ask in zip(self.choices, self._asks, strict=True):
            inbox = self._engine.ask(ask)
            self._readers.append(asyncio.create_task(self._read(choice, inbox)))

    def close(self) -> None:
        """Give up what has not ended; its pages are free within a step of the engine."""
        for reader in self._readers:
            reader.cancel()
        self._engine.forget([choice.request_id for choice in self.choices])

    async def deltas(self, *, wake_seconds: float | None = None) -> AsyncIterator[tuple[Choice, Delta] | None]:
        """Yield what is added to which choice until all have ended; None after so long without anything.

        Raises:
            ApiError: a prompt is refused by the engine, an answer fails, or a time-out is met.
        """
        ended: set[int] = set()
        while len(ended) < len(self.choices):
            try:
                limit = self._time_left()
                wait = limit if wake_seconds is None else min(limit, wake_seconds)
                choice, event = await asyncio.wait_for(self._events.get(), wait)
            except TimeoutError:
                self._time_left()
                yield None
                continue
            if choice.index in ended:
                continue  # what came after a stop string
            delta = self._taken(choice, event)
            if delta.finish_reason is not None:
                ended.add(choice.index)
                self._engine.forget([choice.request_id])
                self._observe(choice)
            if not delta.is_empty:
                yield choice, delta

    async def _read(self, choice: Choice, inbox: "asyncio.Queue[TokenEvent | Refused]") -> None:
        while True:
            event = await inbox.get()
            if self._events.qsize() > MOST_UNREAD * len(self.choices):
                event = TokenEvent(id=choice.request_id, finish_reason=FinishReason.FAILED, error="nobody reads this")
                self._engine.forget([choice.request_id])
            self._events.put_nowait((choice, event))
            if isinstance(event, Refused) or event.finish_reason is not None:
                return

    def _taken(self, choice: Choice, event: TokenEvent | Refused) -> Delta:
        if isinstance(event, Refused):
            raise ApiError(500 if event.is_fault else 400, event.reason)
        if event.finish_reason is FinishReason.FAILED:
            has_ended = self._engine.is_stopping or not self._engine.is_alive
            raise ApiError(503 if has_ended else 500, event.error or "the answer failed")
        if event.tokens and choice.index not in self._first:
            self._first[choice.index] = time.perf_counter()
            self._metrics.first_token.observe(self._first[choice.index] - self._began)
        return choice.take(event)

    def _time_left(self) -> float:
        """Return how long the next event may take.

        Raises:
            ApiError: the time is up.
        """
        now = time.perf_counter() - self._began
        left = self._config.request_timeout_seconds - now
        if not self._first:
            left = min(left, self._config.queue_timeout_seconds - now)
        if left <= 0:
            what = "no token came" if not self._first else "the answer was not complete"
            raise ApiError(504, f"{what} within {now:.0f} seconds; ask for less, or try again later")
        return left

    def _observe(self, choice: Choice) -> None:
        now = time.perf_counter()
        self._metrics.end_to_end.observe(now - self._began)
        tokens = choice.usage.completion
        if tokens > 1 and choice.index in self._first:
            self._metrics.per_token.observe((now - self._first[choice.index]) / (tokens - 1))


def _ask(question: Question, *, request_id: str, number: int) -> Ask:
    params = question.params
    if params.seed is not None:
        params = replace(params, seed=(params.seed + number) % 2**63)
    return Ask(
        id=request_id,
        prompt_ids=question.prompt_ids,
        params=params,
        num_logprobs=question.num_logprobs,
        prompt_logprobs=question.prompt_logprobs,
        grammar=question.grammar,
        thinks_first=question.thinks,
    )
