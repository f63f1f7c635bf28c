"""When a rank did what, as a file that Perfetto and chrome://tracing show."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

COMPUTE, NETWORK = "compute", "network"


@dataclass(frozen=True, kw_only=True, slots=True)
class Event:
    """Something that took time."""

    name: str
    track: str
    start: float
    end: float
    """Seconds of a clock that all ranks of a machine share."""


@dataclass(kw_only=True)
class Trace:
    """What one rank has done; nothing is noted while it is off."""

    is_on: bool = False
    events: list[Event] = field(default_factory=list)

    def note(self, name: str, *, track: str, start: float, end: float) -> None:
        """Note something that is over."""
        if self.is_on:
            self.events.append(Event(name=name, track=track, start=start, end=end))

    @contextmanager
    def span(self, *words: str, track: str = COMPUTE) -> Iterator[list[str]]:
        """Note what the block does; it may add words to the name."""
        start, name = time.perf_counter(), list(words)
        yield name
        self.note(" ".join(name), track=track, start=start, end=time.perf_counter())


def write_trace(events_by_rank: dict[int, list[Event]], *, path: Path) -> None:
    """Write the events of all ranks as trace events (JSON): a process a rank, a thread a track, in microseconds."""
    begin = min((event.start for events in events_by_rank.values() for event in events), default=0.0)
    tracks = {COMPUTE: 0, NETWORK: 1}
    lines: list[dict[str, object]] = []
    for rank, events in events_by_rank.items():
        lines.append({"ph": "M", "name": "process_name", "pid": rank, "args": {"name": f"rank {rank}"}})
        lines += [
            {"ph": "M", "name": "thread_name", "pid": rank, "tid": tid, "args": {"name": name}}
            for name, tid in tracks.items()
        ]
        lines += [
            {
                "ph": "X",
                "name": event.name,
                "pid": rank,
                "tid": tracks[event.track],
                "ts": (event.start - begin) * 1e6,
                "dur": (event.end - event.start) * 1e6,
            }
            for event in events
        ]
    path.write_text(json.dumps({"traceEvents": lines}) + "\n", encoding="utf-8")
