"""Answers read token by token, several at once if need be, over one engine in this process."""

import time
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from itertools import count

from dsv3.errors import EngineError
from dsv3.infer.engine import Engine
from dsv3.infer.events import FinishReason, TokenEvent
from dsv3.infer.params import SamplingParams
from dsv3.infer.request import Request


class TokenStreams:
    """Hands out streams over an engine. Whoever reads one moves the engine, and with it all others, along."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._numbers = count()
        self._arrived: dict[str, deque[TokenEvent]] = {}

    def start(self, prompt_ids: Sequence[int], *, params: SamplingParams) -> "TokenStream":
        """Return the tokens that follow a prompt; nothing is computed before the first one is asked for.

        Raises:
            ConfigError: the prompt is empty, holds ids outside the vocabulary, or leaves no room in the context.
        """
        request = Request(id=str(next(self._numbers)), prompt_ids=prompt_ids, params=params)
        self.engine.add(request)
        self._arrived[request.id] = deque()
        return TokenStream(self, request_id=request.id)

    def next_event(self, request_id: str) -> TokenEvent:
        """Return the next event of a request, running the engine for as long as there is none."""
        while not self._arrived[request_id]:
            for event in self.engine.step():
                if event.id in self._arrived:
                    self._arrived[event.id].append(event)
        return self._arrived[request_id].popleft()

    def forget(self, request_id: str) -> None:
        """End a request that nobody reads any more; one that has ended is only forgotten."""
        self._arrived.pop(request_id, None)
        self.engine.cancel(request_id)


class TokenStream:
    """Iterator over generated token ids; the end token is not among them.

    `finish_reason` is None until the stream has ended. A stream can be dropped at any token, which frees its pages.
    """

    def __init__(self, streams: TokenStreams, *, request_id: str) -> None:
        self.finish_reason: FinishReason | None = None
        self.num_generated = 0
        self.prompt_seconds = 0.0
        """Spent on the prompt and the first token."""
        self.decode_seconds = 0.0
        """Spent on the tokens after the first."""
        self.num_drafted = 0
        self.num_accepted = 0
        self.num_cached_tokens = 0
        """Tokens of the prompt that were in the cache already."""
        self._streams = streams
        self._id = request_id
        self._unread: deque[int] = deque()
        self._close = weakref.finalize(self, streams.forget, request_id)

    def __iter__(self) -> Iterator[int]:
        return self

    def __next__(self) -> int:
        while not self._unread:
            if self.finish_reason is not None:
                raise StopIteration
            self._read()
        self.num_generated += 1
        return self._unread.popleft()

    def close(self) -> None:
        """End the request now, if it has not ended."""
        self._close()

    def _read(self) -> None:
        began, is_first = time.perf_counter(), self.num_generated == 0
        event = self._streams.next_event(self._id)
        seconds = time.perf_counter() - began
        if event.finish_reason is FinishReason.FAILED:
            self.close()
            self.finish_reason = FinishReason.FAILED
            raise EngineError(event.error)
        if is_first:
            self.prompt_seconds += seconds
            self.num_cached_tokens = event.num_cached_tokens
        elif event.tokens:
            self.decode_seconds += seconds
        self.num_drafted += event.num_drafted
        self.num_accepted += event.num_accepted
        self._unread.extend(event.tokens)
        # Told only when the last token has been read: see __next__.
        if event.finish_reason is not None:
            self.finish_reason = event.finish_reason
            self.close()
