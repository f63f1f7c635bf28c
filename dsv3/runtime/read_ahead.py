"""Files that are used memory-mapped, read in their order by a thread that stays ahead of whoever uses them.

Touched page by page, a disk gives a part of its speed, and nothing is computed while it does.
"""

from collections.abc import Iterable
from pathlib import Path
from threading import Condition, Thread
from types import TracebackType

AHEAD_BYTES = 1 << 30
"""How far ahead: far enough to never be waited for, and no more than what the system may keep."""
CHUNK_BYTES = 1 << 23


class ReadAhead:
    """While it is entered, reads files into the system's cache, up to `ahead` bytes beyond what `used` was told of."""

    def __init__(self, files: Iterable[Path], *, ahead: int = AHEAD_BYTES) -> None:
        self._files = list(files)
        self._ahead = ahead
        self._used = self._place = 0
        self._is_over = False
        self._changed = Condition()
        self._thread = Thread(target=self._read, name="reading ahead", daemon=True)

    def used(self, num_bytes: int) -> None:
        """Take note that so many more bytes of the files have been used."""
        with self._changed:
            self._used += num_bytes
            self._changed.notify()

    def __enter__(self) -> "ReadAhead":
        """Begin."""
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop, wherever it is."""
        with self._changed:
            self._is_over = True
            self._changed.notify()
        self._thread.join()

    def _read(self) -> None:
        room = memoryview(bytearray(CHUNK_BYTES))
        for path in self._files:
            try:
                with path.open("rb", buffering=0) as file:
                    while self._may_go_on() and (count := file.readinto(room)):
                        self._place += count
            except OSError:
                return  # Whoever uses the file will meet it too, and say what is wrong.

    def _may_go_on(self) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._is_over or self._place < self._used + self._ahead)
            return not self._is_over
