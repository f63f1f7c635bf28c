"""A pipeline schedule on paper: when each rank does what, how long it idles, how much it holds."""

from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol, runtime_checkable

from dsv3.errors import ConfigError
from dsv3.plan.pipeline import Kind, Schedule, Step


@runtime_checkable
class Costs(Protocol):
    """What a step of a rank takes."""

    @property
    def send(self) -> float:
        """From the end of a chunk to when another rank can use what it made."""
        ...

    def of(self, step: Step) -> float:
        """Return the time of a step, which is that of all steps with its kinds and stages."""
        ...


@dataclass(frozen=True, kw_only=True)
class ChunkCosts:
    """What one chunk takes, in any unit of time; chunks of all stages take equally long."""

    forward: float = 1.0
    """F."""
    backward: float = 2.0
    """B: a whole backward chunk, weights' gradients included."""
    weight: float = 1.0
    """W: the weights' gradients; the rest of B is the inputs' gradients."""
    woven: float | None = None
    """F&B: a forward and a whole backward chunk woven into each other; their sum where it is not given."""
    send: float = 0.0
    """From the end of a chunk to when another rank can use what it made."""

    def __post_init__(self) -> None:
        if not (self.forward >= 0 and self.backward >= self.weight >= 0 and self.send >= 0):
            raise ConfigError(f"{self}: times must not be below 0, and backward holds weight")

    def of(self, step: Step) -> float:
        """Return the time of a step."""
        if len(step) == 2 and self.woven is not None:
            return self.woven
        times = {
            Kind.FORWARD: self.forward,
            Kind.BACKWARD: self.backward,
            Kind.INPUT: self.backward - self.weight,
            Kind.WEIGHT: self.weight,
        }
        return sum(times[action.kind] for action in step)


class Span(NamedTuple):
    """One step of a rank, in time."""

    step: Step
    start: float
    end: float


@dataclass(frozen=True, kw_only=True)
class Timeline:
    """When every rank does what."""

    schedule: Schedule
    spans: tuple[tuple[Span, ...], ...]
    """By rank, in order."""

    @cached_property
    def duration(self) -> float:
        """From the first beginning to the last end."""
        return max(spans[-1].end for spans in self.spans)

    @cached_property
    def busy(self) -> tuple[float, ...]:
        """Time each rank works."""
        return tuple(sum(span.end - span.start for span in spans) for spans in self.spans)

    @property
    def bubble(self) -> float:
        """Time that the rank with least work idles, from the first beginning of all to the last end of all."""
        return self.duration - min(self.busy)

    @property
    def bubble_share(self) -> float:
        """Share of all ranks' time in which they idle."""
        return 1 - sum(self.busy) / (self.duration * len(self.busy))

    @cached_property
    def peak_activations(self) -> tuple[int, ...]:
        """Most chunks' activations that each rank holds at once: from a forward chunk to the end of its backward one.

        Where weights' gradients are put off, what they need is held as long and counted as a whole chunk.
        """
        peaks = []
        for spans in self.spans:
            held = peak = 0
            for span in spans:
                held += sum(action.kind is Kind.FORWARD for action in span.step)
                peak = max(peak, held)
                held -= sum(action.kind in (Kind.BACKWARD, Kind.WEIGHT) for action in span.step)
            peaks.append(peak)
        return tuple(peaks)


def simulate(schedule: Schedule, *, costs: Costs) -> Timeline:
    """Run a schedule: every step begins when its rank is free and what it needs is there.

    Raises:
        ConfigError: ranks wait for each other in a circle; says for what.
    """
    ended: list[list[float]] = [[] for _ in range(schedule.num_ranks)]
    spans: list[list[Span]] = [[] for _ in range(schedule.num_ranks)]
    waiting: dict[tuple[int, int], list[int]] = defaultdict(list)
    steps_of_form, forms = schedule.forms
    seconds = [costs.of(step) for step in steps_of_form]
    send = costs.send
    ready = list(range(schedule.num_ranks))
    while ready:
        rank = ready.pop()
        steps, mine = schedule.steps[rank], ended[rank]
        for place in range(len(mine), len(steps)):
            start = mine[-1] if mine else 0.0
            for other, step, is_sent in schedule.waits[rank][place]:
                if len(ended[other]) <= step:
                    waiting[other, step].append(rank)
                    break
                start = max(start, ended[other][step] + (send if is_sent else 0.0))
            else:
                end = start + seconds[forms[rank][place]]
                spans[rank].append(Span(steps[place], start, end))
                mine.append(end)
                ready += waiting.pop((rank, place), ())
                continue
            break
    stuck = {rank: schedule.steps[other][step] for (other, step), ranks in waiting.items() for rank in ranks}
    if stuck:
        told = ", ".join(f"rank {rank} for {' and '.join(map(str, step))}" for rank, step in sorted(stuck.items()))
        raise ConfigError(f"schedule {schedule.name} never ends: all wait, {told}")
    return Timeline(schedule=schedule, spans=tuple(map(tuple, spans)))
