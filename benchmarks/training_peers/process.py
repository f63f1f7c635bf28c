"""The coordinator's side of a worker: start it, let it get warm, ask it for timed steps, end it."""

import json
import os
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).parents[1]
ANSWER_WITHIN_SECONDS = 600
"""A worker silent for longer is ended and counts as failed."""


@dataclass(frozen=True)
class Contender:
    """What is timed: a system in one of its modes."""

    system: str
    mode: str

    def __str__(self) -> str:
        return f"{self.system}, {self.mode}"


class WorkerError(Exception):
    """The worker has ended without an answer; the message is the last line of what it said."""


@dataclass(kw_only=True)
class Timings:
    """What the timed steps of one worker gave, on one number of threads."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    idle_bytes: int = 0
    peak_bytes: int = 0

    def add(self, answer: dict[str, Any]) -> None:
        self.wall += answer["wall"]
        self.cpu += answer["cpu"]
        self.idle_bytes = answer["idle_bytes"]
        self.peak_bytes = max(self.peak_bytes, answer["peak_bytes"])


class Worker:
    """A process that holds one contender at one size."""

    def __init__(self, contender: Contender, *, size: str, scratch: Path) -> None:
        self.contender = contender
        name = f"{contender}, {size}".replace(" ", "_").replace(",", "")
        self._messages = scratch / f"{name}.log"
        with self._messages.open("w") as messages:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "training_peers.worker", contender.system, contender.mode, size],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=messages,
                text=True,
                cwd=BENCHMARKS,
                env=os.environ | _environment(scratch / f"{name}.compiled"),
            )

    def warm_up(self, *, threads: int) -> dict[str, Any]:
        """Set the number of threads and take untimed steps; return the trained parameters and the first loss."""
        return self._ask({"threads": threads})

    def measure(self, *, steps: int) -> dict[str, Any]:
        """Take timed steps."""
        return self._ask({"steps": steps})

    def _ask(self, order: dict[str, int]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        watchdog = threading.Timer(ANSWER_WITHIN_SECONDS, self._process.kill)
        watchdog.start()
        try:
            print(json.dumps(order), file=self._process.stdin, flush=True)
            answer = self._process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        finally:
            watchdog.cancel()
        if not answer:
            said = self._messages.read_text().strip().splitlines()
            raise WorkerError(said[-1] if said else "no answer")
        return json.loads(answer)

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()


def _environment(compiled: Path) -> dict[str, str]:
    """Return the variables of a worker's environment, equal for all.

    Threads that wait sleep, so that an idle worker leaves the processor to the one that is timed. Compiled code goes
    into a folder that ends with the run, so that no run profits from an earlier one.
    """
    return {"OMP_WAIT_POLICY": "passive", "TORCHINDUCTOR_CACHE_DIR": str(compiled)}
