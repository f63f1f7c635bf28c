"""Files that appear whole or not at all, whatever moment the process is killed at."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Open `path` for writing; it takes its name only when the block ends well, with the bytes on the disk.

    Raises:
        OSError: the file cannot be written; nothing is left behind under its name.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_json(values: Any, *, path: Path) -> None:
    """Write `values` as indented JSON, whole or not at all."""
    with whole_file(path) as file:
        file.write(json.dumps(values, ensure_ascii=False, indent=2).encode() + b"\n")


def force_to_disk(path: Path) -> None:
    """Return when a file's bytes, or a folder's names, are on the disk: a rename may then be relied on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
