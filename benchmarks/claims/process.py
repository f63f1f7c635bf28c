"""The coordinator's side of a worker: a process of its own that is told what to do, a line of JSON each way."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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


class Worker:
    """A process that holds one contender: `python -m MODULE ARGUMENTS`, with its messages in a file."""

    def __init__(
        self, module: str, arguments: Sequence[str], *, scratch: Path, environment: Mapping[str, str] | None = None
    ) -> None:
        name = "_".join(arguments).replace(" ", "_").replace(",", "").replace("/", "-")
        self._messages = scratch / f"{name}.log"
        with self._messages.open("w") as messages:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=messages,
                text=True,
                cwd=BENCHMARKS,
                env=os.environ | _environment(scratch / f"{name}.compiled") | dict(environment or {}),
            )

    def ask(self, order: Mapping[str, object]) -> dict[str, Any]:
        """Give an order and return the answer to it.

        Raises:
            WorkerError: there was none.
        """
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
