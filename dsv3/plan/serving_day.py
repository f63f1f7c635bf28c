"""A day of a deployment, request by request: what users wait for, how many nodes it takes, what it costs.

Nodes follow the load hour by hour, in whole units (the nodes that share a set of experts). Of every hour some seconds
are simulated on a slice of the fleet, a whole number of GPUs that prefill with their share of the others and of the
requests. Prompts queue for a GPU that prefills, each taking the time of its tokens that are not in a cache; then they
share the steps of the GPUs that decode, all alike, as many at once as the goal of tokens a second for each user lets
in. The load's shape, lengths and hits are drawn; equal seeds draw equally.
"""

import heapq
import math
import random
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from dsv3.config.check import require_not_negative, require_positive
from dsv3.errors import ConfigError
from dsv3.plan.serving import GPUS_OF_NODE, ServingTimes

HOURS = 24
SLICE_PREFILL_GPUS = 32
"""Of a slice, at the mean load."""
FILLED = 0.9
"""Of the places for requests that decode, those that are taken when an hour begins."""
WARM_SHARE = 0.3
"""Of the simulated seconds of an hour, those that only fill the queues."""


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """What is asked on one day. The defaults are the published production's (fact sheet 4.2)."""

    input_tokens_per_day: float = 608e9
    output_tokens_per_day: float = 168e9
    hit_share: float = 0.563
    """Of the input tokens, those found in a cache."""
    cached_tokens: float = 4989.0
    """Mean length of the cache when a token is drawn; with the ratio of input to output it gives the mean lengths."""
    spread: float = 1.0
    """Of the logarithm of both lengths. Assumption."""
    peak: float = 1.226
    """Load of the busiest hour beside the mean: that of the published nodes, 278 of 226.75. One wave a day: assumed."""

    def __post_init__(self) -> None:
        require_positive(self, "input_tokens_per_day", "output_tokens_per_day", "cached_tokens", "peak")
        require_not_negative(self, "hit_share", "spread")
        if not (self.hit_share < 1 <= self.peak <= 2):
            raise ConfigError(
                f"hit_share = {self.hit_share}, peak = {self.peak}; the one is below 1, and the other from 1 to 2"
            )

    @property
    def output_tokens(self) -> float:
        """Mean of an answer: so that prompt and half of it (weighted by its own length) are `cached_tokens`."""
        return self.cached_tokens / (
            self.input_tokens_per_day / self.output_tokens_per_day + math.exp(self.spread**2) / 2
        )

    @property
    def prompt_tokens(self) -> float:
        """Mean of a prompt."""
        return self.output_tokens * self.input_tokens_per_day / self.output_tokens_per_day

    @property
    def requests_per_second(self) -> float:
        """Mean over the day."""
        return self.output_tokens_per_day / self.output_tokens / 86_400

    def load(self, hour: float) -> float:
        """Return the load of a time of the day beside the mean."""
        return 1 + (self.peak - 1) * math.sin(2 * math.pi * (hour - 9) / HOURS)

    def arrivals(self, *, per_second: float, seconds: float, chance: random.Random) -> "Iterator[Asked]":
        """Draw requests: a Poisson process, lognormal lengths, shares of hits from 0 to 1 with the given mean."""
        shape = self.hit_share / (1 - self.hit_share)
        now, shift = 0.0, self.spread**2 / 2
        while (now := now + chance.expovariate(per_second)) < seconds:
            prompt = max(1.0, chance.lognormvariate(math.log(self.prompt_tokens) - shift, self.spread))
            answer = max(1.0, chance.lognormvariate(math.log(self.output_tokens) - shift, self.spread))
            hit = chance.betavariate(shape, 1) if shape else 0.0
            yield Asked(arrival=now, prompt=prompt, new=prompt * (1 - hit), answer=answer)


@dataclass(frozen=True, slots=True)
class Asked:
    """One request; lengths in tokens."""

    arrival: float
    prompt: float
    new: float
    """Of the prompt, those that are computed."""
    answer: float


@dataclass(frozen=True, kw_only=True)
class Goals:
    """What the fleet is sized for."""

    tokens_per_second: float = 20.0
    """For each user, at least: as many requests share a step as still get this. Assumption: the lower end of the
    published 20 to 22."""
    reserve: float = 0.05
    """Of the capacity at that speed, kept free for what an hour's mean does not show. Assumption."""

    def __post_init__(self) -> None:
        require_positive(self, "tokens_per_second")
        if not 0 <= self.reserve < 1:
            raise ConfigError(f"reserve = {self.reserve}; it is a share, from 0 to below 1")


@dataclass(frozen=True, kw_only=True)
class Hour:
    """One hour of the day."""

    hour: int
    prefill_nodes: int
    decode_nodes: int
    prefill_busy: float
    """Share of its GPUs' time."""
    batch: float
    """Requests that share a step, mean over time."""
    most_requests: int
    first_token: tuple[float, float, float]
    """Seconds, of 50, 90 and 99% of the requests."""
    tokens_per_second: tuple[float, float, float]
    """Of a user: what 50, 90 and 99% of the requests get at least."""
    waited: float
    """Share of the requests that found no place to decode at once."""

    @property
    def nodes(self) -> int:
        """Of both kinds."""
        return self.prefill_nodes + self.decode_nodes


@dataclass(frozen=True, kw_only=True)
class Day:
    """All hours."""

    traffic: Traffic
    times: ServingTimes
    goals: Goals
    hours: tuple[Hour, ...]

    @property
    def mean_nodes(self) -> float:
        """Over the day."""
        return sum(hour.nodes for hour in self.hours) / len(self.hours)

    @property
    def peak_nodes(self) -> int:
        """Of the busiest hour."""
        return max(hour.nodes for hour in self.hours)

    @property
    def input_per_prefill_node(self) -> float:
        """Tokens a second, those found in a cache included."""
        mean = sum(hour.prefill_nodes for hour in self.hours) / len(self.hours)
        return self.traffic.input_tokens_per_day / 86_400 / mean

    @property
    def output_per_decode_node(self) -> float:
        """Tokens a second."""
        mean = sum(hour.decode_nodes for hour in self.hours) / len(self.hours)
        return self.traffic.output_tokens_per_day / 86_400 / mean

    @property
    def tokens_per_second_of_a_user(self) -> float:
        """Median of the requests, mean of the hours by their load."""
        loads = [self.traffic.load(hour.hour + 0.5) for hour in self.hours]
        speeds = [hour.tokens_per_second[0] for hour in self.hours]
        return sum(load * speed for load, speed in zip(loads, speeds, strict=True)) / sum(loads)

    def dollars(self, *, per_gpu_hour: float) -> float:
        """Return what the day costs."""
        return self.mean_nodes * GPUS_OF_NODE * HOURS * per_gpu_hour


def plan_day(traffic: Traffic, *, times: ServingTimes, goals: Goals, seconds: float = 40.0, seed: int = 0) -> Day:
    """Size the fleet for every hour, and simulate `seconds` of each on a slice of it.

    Raises:
        ConfigError: no request can get what the goals say, or the model does not fit.
    """
    most = most_requests(traffic, times=times, goals=goals)
    rate = most * goals.tokens_per_second * (1 - goals.reserve)
    hours = []
    for hour in range(HOURS):
        load = traffic.load(hour + 0.5)
        new_tokens = load * traffic.input_tokens_per_day / 86_400 * (1 - traffic.hit_share)
        prefill = whole_units(
            new_tokens / (times.prefill_tokens_per_second * (1 - goals.reserve)),
            unit=times.deployment.prefill_unit_nodes,
        )
        decode = whole_units(
            load * traffic.output_tokens_per_day / 86_400 / rate, unit=times.deployment.decode_unit_nodes
        )
        # A slice that all hours have the same part of; at least one GPU of each kind.
        gpus = max(1, round(SLICE_PREFILL_GPUS * load))
        part = gpus / (prefill * GPUS_OF_NODE)
        simulated = _Slice(
            times=times,
            prefill_gpus=gpus,
            decode_gpus=part * decode * GPUS_OF_NODE,
            most=most,
        )
        simulated.run(
            traffic.arrivals(
                per_second=traffic.requests_per_second * load * part,
                seconds=seconds,
                chance=random.Random(f"{seed} {hour}"),
            ),
            traffic=traffic,
            seconds=seconds,
        )
        hours.append(simulated.hour(hour, prefill_nodes=prefill, decode_nodes=decode))
    return Day(traffic=traffic, times=times, goals=goals, hours=tuple(hours))


def most_requests(traffic: Traffic, *, times: ServingTimes, goals: Goals) -> int:
    """Return how many requests share a step of a decoding GPU at most: what memory holds, and speed allows.

    Raises:
        ConfigError: not even one gets the tokens a second that are the goal.
    """
    cached = traffic.cached_tokens
    fits = times.most_requests(cached_tokens=cached)

    def speed(batch: int) -> float:
        return times.tokens_per_step / times.step_time(batch, cached_tokens=cached).total

    if speed(1) < goals.tokens_per_second:
        raise ConfigError(
            f"{goals.tokens_per_second:g} tokens a second for each user are the goal, and one alone gets "
            f"{speed(1):.1f}; lower it, or give faster GPUs or links"
        )
    low, high = 1, fits
    while low < high:  # the largest batch that is fast enough
        middle = (low + high + 1) // 2
        low, high = (middle, high) if speed(middle) >= goals.tokens_per_second else (low, middle - 1)
    return low


def whole_units(gpus: float, *, unit: int) -> int:
    """Return the nodes of as many whole units as have so many GPUs; one at least."""
    return unit * max(1, math.ceil(gpus / (unit * GPUS_OF_NODE) - 1e-9))


@dataclass(kw_only=True)
class _Slice:
    """Some GPUs of each kind, and what has happened on them."""

    times: ServingTimes
    prefill_gpus: int
    decode_gpus: float
    most: int
    first_tokens: list[float] = field(default_factory=list)
    speeds: list[float] = field(default_factory=list)
    _busy: float = 0.0
    _batch_seconds: float = 0.0
    _counted_from: float = 0.0
    _end: float = 0.0
    _waited: int = 0
    _now: float = 0.0
    _progress: float = 0.0
    """Tokens that a request would have drawn that decodes since the beginning."""
    _ends: list[tuple[float, float, float, float]] = field(default_factory=list)
    """Of requests that decode, a heap: progress at the end, and what they are remembered by."""
    _queue: deque[tuple[float, Asked]] = field(default_factory=deque)
    _cached: float = 0.0
    """Sum over those that decode of prompt, less the progress at which they began."""

    def run(self, arrivals: Iterator[Asked], *, traffic: Traffic, seconds: float) -> None:
        """Simulate: first the prompts, in order of arrival, then the steps that they share.

        It begins with as many requests as will be there in the long run, each somewhere in its answer.
        """
        self._end, self._counted_from = seconds, WARM_SHARE * seconds
        self._fill(traffic)
        free = [0.0] * self.prefill_gpus
        ready: list[tuple[float, int, Asked]] = []
        for number, asked in enumerate(arrivals):
            start = max(asked.arrival, heapq.heappop(free))
            done = start + asked.new / self.times.prefill_tokens_per_second
            heapq.heappush(free, done)
            self._busy += max(0.0, min(done, seconds) - max(start, self._counted_from))
            if asked.arrival >= self._counted_from:
                self.first_tokens.append(done - asked.arrival)
            moved = asked.prompt * self.times.cache_bytes_per_token / (self.times.gpu.network_gb_s * 1e9)
            heapq.heappush(ready, (done + moved, number, asked))
        while ready:
            at, _, asked = heapq.heappop(ready)
            if at >= seconds:
                break
            self._advance(at)
            self._admit(at, asked)
        self._advance(seconds)

    def hour(self, hour: int, *, prefill_nodes: int, decode_nodes: int) -> Hour:
        """Return what came of it."""
        span = self._end - self._counted_from
        slow = sorted(self.speeds, reverse=True)
        return Hour(
            hour=hour,
            prefill_nodes=prefill_nodes,
            decode_nodes=decode_nodes,
            prefill_busy=self._busy / (span * self.prefill_gpus),
            batch=self._batch_seconds / span,
            most_requests=self.most,
            first_token=_shares(sorted(self.first_tokens)),
            tokens_per_second=_shares(slow),
            waited=self._waited / max(1, len(self.first_tokens)),
        )

    def _fill(self, traffic: Traffic) -> None:
        chance = random.Random(0)
        wanted = self.most * FILLED * self.decode_gpus
        shift = traffic.spread**2 / 2
        while len(self._ends) < wanted:
            # A request that is met at a random moment is long in proportion to its length.
            answer = chance.lognormvariate(math.log(traffic.output_tokens) + shift, traffic.spread)
            prompt = chance.lognormvariate(math.log(traffic.prompt_tokens) - shift, traffic.spread)
            done = chance.random() * answer
            self._begin(Asked(arrival=-1.0, prompt=prompt + done, new=0.0, answer=answer - done), at=0.0, counts=False)

    def _admit(self, at: float, asked: Asked) -> None:
        if len(self._ends) < self.most * self.decode_gpus:
            self._begin(asked, at=at, counts=at >= self._counted_from)
        else:
            self._waited += at >= self._counted_from
            self._queue.append((at, asked))

    def _begin(self, asked: Asked, *, at: float, counts: bool) -> None:
        self._cached += asked.prompt - self._progress
        kept = asked.prompt - self._progress
        heapq.heappush(self._ends, (self._progress + asked.answer, kept, at if counts else -1.0, asked.answer))

    def _advance(self, to: float) -> None:
        """Let steps go on until a time; requests that end make room for those that wait."""
        while self._now < to:
            if not self._ends:
                self._now = to
                return
            batch = len(self._ends) / self.decode_gpus
            cached = self._cached / len(self._ends) + self._progress
            pace = self.times.tokens_per_step / self.times.step_time(batch, cached_tokens=max(1.0, cached)).total
            until = min(to, self._now + max(0.0, self._ends[0][0] - self._progress) / pace)
            self._batch_seconds += batch * max(0.0, until - max(self._now, self._counted_from))
            self._progress += (until - self._now) * pace
            self._now = until
            while self._ends and self._ends[0][0] <= self._progress + 1e-9:
                _, kept, began, answer = heapq.heappop(self._ends)
                self._cached -= kept
                if began >= 0 and until > began:
                    self.speeds.append(answer / (until - began))
                if self._queue:
                    arrived, asked = self._queue.popleft()
                    self._begin(asked, at=arrived, counts=arrived >= self._counted_from)


def _shares(ordered: Sequence[float]) -> tuple[float, float, float]:
    """Return the values that 50, 90 and 99% do not exceed in the order given; not numbers if there are none."""
    if not ordered:
        return (math.nan, math.nan, math.nan)
    last = len(ordered) - 1
    return (ordered[round(0.5 * last)], ordered[round(0.9 * last)], ordered[round(0.99 * last)])
