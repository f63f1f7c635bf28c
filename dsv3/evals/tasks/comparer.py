"""Mathematics compared by math-verify, within a time that is kept."""

import atexit
import contextlib
import json
import select
import subprocess
import sys
import threading
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from dsv3.errors import ConfigError, MissingExtraError

INSIDE = Path(__file__).with_name("math_inside.py")


class Comparer:
    """Asks math-verify in a process that is killed when it takes too long: an answer such as 9^{9^{9^9}} never ends."""

    def __init__(self, *, seconds: float = 10.0) -> None:
        if find_spec("math_verify") is None:
            raise MissingExtraError(package="math-verify", extra="eval", purpose="comparing mathematics")
        self.seconds = seconds
        self._process: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()
        atexit.register(self.close)

    def same(self, found: str, wanted: str) -> bool:
        """Tell whether two answers are the same mathematics; what is not told in time is not."""
        with self._lock:
            if self._process is not None and self._process.poll() is not None:
                self.close()
            if self._process is None:
                self._process = _start()
            assert self._process.stdin is not None
            assert self._process.stdout is not None
            try:
                self._process.stdin.write(json.dumps([wanted, found]) + "\n")
                self._process.stdin.flush()
                ready, _, _ = select.select([self._process.stdout], [], [], self.seconds)
                said = self._process.stdout.readline() if ready else ""
            except BrokenPipeError:
                said = ""
            if not said:
                self.close()
            return said.strip() == "true"

    def close(self) -> None:
        """End the process; the next question starts another."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


@cache
def comparer() -> Comparer:
    """Return the one process of this one."""
    return Comparer()


def _start() -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, str(INSIDE)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write('["1", "1"]\n')  # Its imports take seconds, which are not the first answer's.
        process.stdin.flush()
    if process.stdout.readline().strip() != "true":
        _, errors = process.communicate()
        raise ConfigError(f"math-verify cannot be used here: {errors.strip().splitlines()[-1:]}")
    return process
