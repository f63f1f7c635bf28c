"""Documents between two stages: JSON lines in one Zstandard file for each task, written whole or not at all."""

import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import pyarrow

from dsv3.runtime.atomic import whole_file

SUFFIX = ".jsonl.zst"


@dataclass(frozen=True, kw_only=True)
class KeptDocument:
    """A document that the rules have let pass."""

    name: str
    text: str
    source: int
    """Number of its input."""
    domain: str
    provenance: str


class DocumentWriter:
    """Writes documents one after the other."""

    def __init__(self, stream: pyarrow.CompressedOutputStream) -> None:
        self._stream = stream
        self.num_documents = 0

    def write(self, document: KeptDocument) -> None:
        """Append one."""
        values = [document.name, document.text, document.source, document.domain, document.provenance]
        self._stream.write(json.dumps(values, ensure_ascii=False).encode() + b"\n")
        self.num_documents += 1


def document_file(folder: Path, *, task: int) -> Path:
    """Return the place of a task's documents."""
    return folder / "documents" / f"{task:05d}{SUFFIX}"


@contextmanager
def write_documents(path: Path) -> Iterator[DocumentWriter]:
    """Open a file for a task's documents."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as file, pyarrow.CompressedOutputStream(_LeftOpen(file), "zstd") as stream:
        yield DocumentWriter(stream)


def read_documents(path: Path) -> Iterator[KeptDocument]:
    """Yield the documents of a task, in order."""
    with path.open("rb") as file, pyarrow.CompressedInputStream(file, "zstd") as stream:
        for line in io.BufferedReader(_Raw(stream), 2**20):
            name, text, source, domain, provenance = json.loads(line)
            yield KeptDocument(name=name, text=text, source=source, domain=domain, provenance=provenance)


class _LeftOpen:
    """A file that Arrow writes to and does not close."""

    closed = False

    def __init__(self, file: BinaryIO) -> None:
        self.write, self.flush = file.write, file.flush

    def close(self) -> None:
        """Leave it to whoever opened it."""


class _Raw(io.RawIOBase):
    """Arrow's stream as Python's: Arrow has no lines."""

    def __init__(self, stream: pyarrow.CompressedInputStream) -> None:
        self._stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        found = self._stream.read(len(buffer))
        buffer[: len(found)] = found
        return len(found)
