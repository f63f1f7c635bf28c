"""A model that others serve: asked over HTTP, again where that may help."""

import os
from collections.abc import Callable, Mapping
from threading import Event
from typing import Any, TypeVar

from dsv3.errors import ConfigError, EngineError, MissingExtraError

try:
    import httpx
except ImportError as error:
    raise MissingExtraError(package="httpx", extra="rl", purpose="a model behind an address") from error

FIRST_PAUSE_SECONDS = 1.0
LONGEST_PAUSE_SECONDS = 60.0

Read = TypeVar("Read")


class GivenUpError(Exception):
    """An answer was given up, because another has failed for good."""


class RefusedError(ConfigError):
    """An endpoint has looked at what it was asked, and says no."""

    def __init__(self, message: str, *, status: int) -> None:
        super().__init__(message)
        self.status = status


class Endpoint:
    """An address of the OpenAI API. May be asked by several threads at once."""

    def __init__(
        self, address: str, *, key_variable: str = "", timeout_seconds: float = 600.0, retries: int = 5
    ) -> None:
        key = os.environ.get(key_variable, "") if key_variable else ""
        if key_variable and not key:
            raise ConfigError(f"the environment variable {key_variable} is to hold the key, and is not set")
        self.address = address.rstrip("/")
        self._timeout, self._retries = timeout_seconds, retries
        self._client = httpx.Client(headers={"Authorization": f"Bearer {key}"} if key else {}, timeout=timeout_seconds)

    def close(self) -> None:
        """Let go of the connections."""
        self._client.close()

    def ask(
        self,
        path: str,
        body: Mapping[str, Any],
        *,
        read: Callable[[Any], Read],
        about: str,
        check: str,
        stopped: Event | None = None,
    ) -> Read:
        """Return what `read` makes of an answer's JSON; ask after pauses that double while it is busy, broken or slow.

        An answer of which `read` makes a ValueError, LookupError or TypeError is nonsense, and asked for again.
        `about` says in a message what was asked, `check` what may be wrong with it, `stopped` that nobody waits for it.

        Raises:
            RefusedError: it refuses what is asked.
            EngineError: it could not be reached, or answered nonsense, as often as it was tried.
            GivenUpError: `stopped` was set between two attempts.
        """
        url, found, stopped = f"{self.address}/{path}", "", stopped or Event()
        for attempt in range(self._retries + 1):
            if stopped.is_set():
                raise GivenUpError
            pause = FIRST_PAUSE_SECONDS * 2**attempt
            try:
                response = self._client.post(url, json=body)
            except httpx.TimeoutException:
                found = f"no answer within {self._timeout:g} s"
            except httpx.TransportError as error:
                found = f"{type(error).__name__}: {error}"
            except httpx.InvalidURL as error:
                raise ConfigError(f"{url} is no address ({error}); write it as http://HOST:PORT/v1") from error
            else:
                status = response.status_code
                if status == 200:
                    try:
                        return read(response.json())
                    except (ValueError, LookupError, TypeError) as error:
                        found = f"no answer of that kind ({error!r}): {response.text[:200]}"
                elif status == 429 or status >= 500:
                    found = f"{status}: {response.text[:200]}"
                    pause = _wished_pause(response) or pause
                else:
                    raise RefusedError(
                        f"{url} refuses {about} with {status}: {response.text[:300]}; check {check}", status=status
                    )
            if attempt < self._retries:
                stopped.wait(min(pause, LONGEST_PAUSE_SECONDS))
        raise EngineError(
            f"{url} failed {self._retries + 1} times on {about}, at last with {found}; what was answered is kept, and "
            "the same command goes on"
        )


def _wished_pause(response: httpx.Response) -> float | None:
    """Return the seconds that an endpoint asks to be left alone, where it says so in seconds."""
    wished = response.headers.get("retry-after", "")
    return float(wished) if wished.isdecimal() else None
