"""What timed steps gave."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(kw_only=True)
class Timings:
    """Of one worker, on one number of threads."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    idle_bytes: int = 0
    peak_bytes: int = 0

    def add(self, answer: dict[str, Any]) -> None:
        self.wall += answer["wall"]
        self.cpu += answer["cpu"]
        self.idle_bytes = answer["idle_bytes"]
        self.peak_bytes = max(self.peak_bytes, answer["peak_bytes"])
