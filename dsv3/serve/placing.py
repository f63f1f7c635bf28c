"""Which worker a request goes to: prompts by tokens to be read, decoding by pages and requests, both by prefix hits.

The report's deployment balances the same things: attention work and input tokens among those that prefill, cache and
number of requests among those that decode (section 3.4; the published balancers of its production). How fast a worker
is counts too, as measured from its own steps: a slow one gets less.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

from dsv3.infer.events import EngineStats
from dsv3.infer.pages import Key

RATE = 0.2
"""Weight of the newest observation of a worker's speed."""


@dataclass(kw_only=True)
class Pace:
    """How fast a worker is, by what it says after its steps."""

    seconds_per_token: float | None = None
    """None until it has been seen to work."""
    seconds_per_step: float | None = None
    _tokens: int = 0
    _steps: int = 0
    _seconds: float = 0.0

    def take(self, stats: EngineStats) -> None:
        """Take in what a worker has counted by now."""
        tokens, steps = stats.num_read_tokens - self._tokens, stats.num_steps - self._steps
        seconds = stats.step_seconds - self._seconds
        self._tokens, self._steps, self._seconds = stats.num_read_tokens, stats.num_steps, stats.step_seconds
        if tokens > 0 and steps > 0:
            self.seconds_per_token = _blend(self.seconds_per_token, seconds / tokens)
            self.seconds_per_step = _blend(self.seconds_per_step, seconds / steps)


def _blend(known: float | None, seen: float) -> float:
    return seen if known is None else known + RATE * (seen - known)


@dataclass(kw_only=True)
class KnownPrefixes:
    """Which pages a worker is likely to have in its prefix cache: those of the newest prompts that it was given."""

    most: int
    """As many pages as it has."""
    _keys: OrderedDict[Key, None] = field(default_factory=OrderedDict)

    def add(self, keys: Sequence[Key]) -> None:
        """Take note of a prompt that the worker is given."""
        for key in reversed(keys):  # the first page is the last to be forgotten
            self._keys[key] = None
            self._keys.move_to_end(key)
        while len(self._keys) > self.most:
            self._keys.popitem(last=False)

    def find(self, keys: Sequence[Key]) -> int:
        """Return how many pages of a prompt, from its beginning on, it is likely to have."""
        return next((place for place, key in enumerate(keys) if key not in self._keys), len(keys))


@dataclass(frozen=True, kw_only=True)
class Reading:
    """A worker that prefills, when a prompt is to be placed."""

    pending_tokens: int
    """Of the prompts that it has been given and not read yet."""
    new_tokens: int
    """Of the prompt to be placed, without what is in its prefix cache."""
    seconds_per_token: float | None


def choose_reader(workers: Sequence[Reading]) -> int:
    """Return the place of the worker that will have read the prompt first.

    One that has not worked yet is taken to be as fast as the fastest.
    """
    fastest = min((worker.seconds_per_token for worker in workers if worker.seconds_per_token is not None), default=1.0)

    def seconds(place: int) -> float:
        worker = workers[place]
        pace = fastest if worker.seconds_per_token is None else worker.seconds_per_token
        return (worker.pending_tokens + worker.new_tokens) * pace

    return min(range(len(workers)), key=seconds)


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """A worker that decodes, when a request is to be placed."""

    num_requests: int
    """That it has, or is about to get."""
    most_requests: int
    pages: int
    """That these hold, or will when they come."""
    most_pages: int
    new_pages: int
    """That the request will hold, without those in its prefix cache."""
    seconds_per_step: float | None


def choose_decoder(workers: Sequence[Decoding]) -> int:
    """Return the place of the worker that is least loaded with the request on it.

    The load is the share of pages or of requests that are taken, whichever is more, times how much slower its steps are
    than the fastest worker's. One without room comes after all that have some.
    """
    fastest = min((worker.seconds_per_step for worker in workers if worker.seconds_per_step), default=1.0)

    def load(place: int) -> tuple[bool, float]:
        worker = workers[place]
        pages = (worker.pages + worker.new_pages) / worker.most_pages
        requests = (worker.num_requests + 1) / worker.most_requests
        share = max(pages, requests)
        return share > 1, share * (worker.seconds_per_step or fastest) / fastest

    return min(range(len(workers)), key=load)
