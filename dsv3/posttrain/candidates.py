"""The answers of a teacher on disk, as they come: what is there is not asked again.

JSON lines: the first says how they were drawn, each other is a problem, by its place, with all its answers. Lines are
only ever appended; one that a killed process left half written is cut off again.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from dsv3 import __version__
from dsv3.errors import ConfigError, DataError
from dsv3.posttrain.teacher import Candidate


class CandidateFile:
    """Answers by the place of their problem; open while the block runs."""

    def __init__(self, path: Path, *, drawn: dict[str, Any]) -> None:
        """Open or begin a file; `drawn` is all that its answers hang on.

        Raises:
            ConfigError: it was begun otherwise; says what differs.
            DataError: it is no such file.
        """
        self.path = path
        self.version = ""
        """Of dsv3, when the file was begun."""
        self._offsets: dict[int, int] = {}
        self._file = path.open("a+b")
        try:
            if not self._cut_torn_line():
                self._write({"dsv3": __version__, "drawn": drawn})
            self._read_through(drawn)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> "CandidateFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def __contains__(self, place: int) -> bool:
        return place in self._offsets

    def __len__(self) -> int:
        return len(self._offsets)

    def add(self, place: int, *, candidates: Sequence[Candidate]) -> None:
        """Append the answers to a problem; on return they are on the disk."""
        self._offsets[place] = self._write(
            {"problem": place, "candidates": [asdict(candidate) for candidate in candidates]}
        )

    def candidates_of(self, place: int) -> list[Candidate]:
        """Return the answers to a problem."""
        self._file.seek(self._offsets[place])
        return [Candidate(**one) for one in json.loads(self._file.readline())["candidates"]]

    def _write(self, record: dict[str, Any]) -> int:
        offset = self._file.seek(0, os.SEEK_END)
        self._file.write(json.dumps(record, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        return offset

    def _cut_torn_line(self) -> int:
        """Cut the file after its last whole line, and return the bytes that are left."""
        end = self._file.seek(0, os.SEEK_END)
        whole = end
        while whole:
            begin = max(0, whole - 65536)
            self._file.seek(begin)
            last = self._file.read(whole - begin).rfind(b"\n")
            if last >= 0:
                whole = begin + last + 1
                break
            whole = begin
        if whole != end:
            self._file.truncate(whole)
        return whole

    def _read_through(self, drawn: dict[str, Any]) -> None:
        offset = self._file.seek(0)
        for number, line in enumerate(self._file, start=1):
            try:
                record = json.loads(line)
                if number == 1:
                    self.version = record["dsv3"]
                    _compare(record["drawn"], drawn=drawn, path=self.path)
                else:
                    self._offsets[record["problem"]] = offset
            except (ValueError, LookupError, TypeError, AttributeError) as error:
                raise DataError(
                    f"{self.path}, line {number} is no answer of a teacher ({error!r}); remove the file, and all are "
                    "drawn anew"
                ) from error
            offset += len(line)


def _compare(before: dict[str, Any], *, drawn: dict[str, Any], path: Path) -> None:
    changed = [
        f"{name} was {before.get(name)!r} and is now {drawn.get(name)!r}"
        for name in sorted({*before, *drawn})
        if before.get(name) != drawn.get(name)
    ]
    if changed:
        raise ConfigError(
            f"the answers in {path} belong to other settings: {'; '.join(changed)}. Put that back to go on with them, "
            "or write another set with --output FILE"
        )
