"""What goes wrong in a long run, found while it goes on: losses that jump, ranks that are slow, ranks that hang."""

import faulthandler
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from statistics import fmean, median, pstdev
from typing import IO

from dsv3.config import HealthConfig
from dsv3.parallel.ranks import Alone

MEMORY = 100
"""Steps that a loss is held against."""
LEAST = 20
"""Steps that there must be before it is."""
PATIENCE = 5
"""Steps in a row in which a rank is slow before it is named."""


class SpikeFinder:
    """Finds losses far above those before them."""

    def __init__(self, config: HealthConfig) -> None:
        self._deviations = config.spike_deviations
        self._losses: deque[float] = deque(maxlen=MEMORY)

    def add(self, loss: float) -> float | None:
        """Take in the loss of a step; return what was expected where it is a spike.

        A spike is not remembered, or the next one would look ordinary.
        """
        if self._deviations and len(self._losses) >= LEAST:
            mean, deviation = fmean(self._losses), pstdev(self._losses)
            if loss > mean + self._deviations * max(deviation, 1e-3 * abs(mean)):
                return mean
        self._losses.append(loss)
        return None


class StragglerFinder:
    """Finds ranks that compute longer than the others, step after step."""

    def __init__(self, config: HealthConfig) -> None:
        self._factor = config.straggler_factor
        self._slow_for: dict[int, int] = {}

    def add(self, seconds: Sequence[float]) -> list[int]:
        """Take in how long each rank has computed in a step; return those that have been slow for so long just now."""
        if not self._factor or len(seconds) < 2:
            return []
        limit = self._factor * median(seconds)
        slow = [rank for rank, spent in enumerate(seconds) if spent > limit]
        self._slow_for = {rank: self._slow_for.get(rank, 0) + 1 for rank in slow}
        return [rank for rank in slow if self._slow_for[rank] == PATIENCE]


class HangWatch:
    """Writes down where every thread of this rank stands, if it is not wound up again in time; of several ranks alone.

    It takes no part in what hangs: the interpreter's own watchdog thread writes, whoever holds its lock.
    """

    def __init__(self, config: HealthConfig, *, folder: Path, ranks: Alone) -> None:
        """Get ready to write `folder`/stacks/rank-R.txt."""
        self._seconds = config.hang_seconds
        self._path = folder / "stacks" / f"rank-{ranks.rank}.txt"
        self._file: IO[str] | None = None
        if self._seconds and ranks.size > 1:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("w", encoding="utf-8")

    def wind_up(self) -> None:
        """Begin to wait anew."""
        if self._file is not None:
            faulthandler.dump_traceback_later(self._seconds, repeat=False, file=self._file)

    def close(self) -> None:
        """Stop waiting; a file with nothing in it goes."""
        if self._file is None:
            return
        faulthandler.cancel_dump_traceback_later()
        self._file.close()
        if self._path.exists() and not self._path.stat().st_size:
            self._path.unlink()
            with suppress(OSError):  # others have written there, or are about to leave as well
                self._path.parent.rmdir()
