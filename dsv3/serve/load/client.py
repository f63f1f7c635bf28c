"""One request to a server, its answer read as it comes and timed."""

import json
import time
from asyncio import timeout
from collections.abc import AsyncIterator, Callable
from typing import Any

from dsv3.errors import ConfigError, MissingExtraError
from dsv3.serve.load.measure import Outcome

try:
    import httpx
except ImportError as error:
    raise MissingExtraError(package="httpx", extra="serve", purpose="load on a server") from error

Client = httpx.AsyncClient

Clock = Callable[[], float]
"""Seconds since the load began."""


class StreamError(Exception):
    """An answer that broke off, or that the server itself ended with an error. `kind` is what it is counted under."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(detail)
        self.kind = kind


def start_clock() -> Clock:
    """Return a clock that begins at 0 now."""
    began = time.perf_counter()
    return lambda: time.perf_counter() - began


def open_client(url: str, *, api_key: str) -> Client:
    """Return a client that speaks to this server alone: no proxies of the environment, no redirects elsewhere."""
    return Client(
        base_url=url,
        headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
        timeout=None,  # One limit for the whole answer stands in `send`.
        trust_env=False,
        follow_redirects=False,
    )


async def first_model(client: Client) -> str:
    """Return the name of the first model that the server lists.

    Raises:
        ConfigError: it cannot be reached, or lists none.
    """
    try:
        response = await client.get("/v1/models", timeout=30.0)
    except httpx.HTTPError as error:
        raise ConfigError(f"no server answers at {client.base_url}: {error or type(error).__name__}") from error
    try:
        return str(response.raise_for_status().json()["data"][0]["id"])
    except (httpx.HTTPStatusError, ValueError, LookupError, TypeError) as error:
        said = f"{response.status_code}: {response.text[:200]}"
        raise ConfigError(f"{client.base_url}/v1/models does not list a model; it answers {said}") from error


async def send(
    client: Client,
    *,
    path: str,
    body: dict[str, Any],
    scheduled: float,
    clock: Clock,
    timeout_seconds: float,
) -> Outcome:
    """Send a request that asks for a stream, read it to its end and return what came of it; errors are outcomes."""
    outcome = Outcome(scheduled=scheduled, sent=clock())
    try:
        async with timeout(timeout_seconds), client.stream("POST", path, json=body) as response:
            if response.status_code != 200:
                detail = (await response.aread()).decode(errors="replace")[:500]
                raise StreamError(f"http {response.status_code}", detail)
            await _read_answer(response, outcome=outcome, clock=clock)
    except TimeoutError:
        outcome.error, outcome.detail = "timeout", f"not whole after {timeout_seconds:g} s"
    except StreamError as error:
        outcome.error, outcome.detail = error.kind, str(error)
    except httpx.ConnectError as error:
        outcome.error, outcome.detail = "no connection", str(error)
    except httpx.HTTPError as error:
        outcome.error, outcome.detail = "broken off", f"{type(error).__name__}: {error}"
    outcome.end = clock()
    return outcome


async def _read_answer(response: httpx.Response, *, outcome: Outcome, clock: Clock) -> None:
    """Fill in an outcome from the chunks of an answer."""
    is_whole = False
    num_pieces = 0
    async for data in _event_data(response):
        if data == b"[DONE]":
            is_whole = True
            break
        chunk = _parse(data)
        for choice in chunk.get("choices") or []:
            outcome.finish_reason = choice.get("finish_reason") or outcome.finish_reason
            if not _has_text(choice):
                continue
            now = clock()
            num_pieces += 1
            if outcome.last is None:
                outcome.first = now
            else:
                outcome.gaps.append(now - outcome.last)
            outcome.last = now
        _count_tokens(outcome, usage=chunk.get("usage"))
    if not is_whole:
        raise StreamError("broken off", "the stream ended without [DONE]")
    if not outcome.is_counted:
        outcome.completion_tokens = num_pieces


async def _event_data(response: httpx.Response) -> AsyncIterator[bytes]:
    """Yield the data of each server-sent event.

    Lines are split here and not by httpx, which also splits at the line separators of Unicode, and so within JSON.
    """
    rest = b""
    async for received in response.aiter_bytes():
        *lines, rest = (rest + received).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line[5:].strip()


def _parse(data: bytes) -> dict[str, Any]:
    try:
        chunk = json.loads(data)
    except ValueError as error:
        raise StreamError("not JSON", repr(data[:200])) from error
    if not isinstance(chunk, dict):
        raise StreamError("not JSON", repr(data[:200]))
    if chunk.get("error"):
        raise StreamError("error in the stream", json.dumps(chunk["error"])[:500])
    return chunk


def _has_text(choice: dict[str, Any]) -> bool:
    delta = choice.get("delta") or {}
    names = ("content", "reasoning_content", "reasoning", "tool_calls")
    return bool(choice.get("text")) or any(delta.get(name) for name in names)


def _count_tokens(outcome: Outcome, *, usage: dict[str, Any] | None) -> None:
    """Take over what the server counted; the last count is that of the whole answer."""
    if not usage:
        return
    prompt = usage.get("prompt_tokens_details") or {}
    completion = usage.get("completion_tokens_details") or {}
    outcome.is_counted = True
    outcome.prompt_tokens = usage.get("prompt_tokens") or 0
    outcome.completion_tokens = usage.get("completion_tokens") or 0
    outcome.cached_tokens = prompt.get("cached_tokens") or usage.get("prompt_cache_hit_tokens") or 0
    outcome.accepted_drafts = completion.get("accepted_prediction_tokens") or 0
    outcome.rejected_drafts = completion.get("rejected_prediction_tokens") or 0
