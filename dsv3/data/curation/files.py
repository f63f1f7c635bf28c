"""The files of an input, on a disk or behind a URL, and how they are divided into tasks."""

import io
import json
import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, Literal

import fsspec
from fsspec.core import url_to_fs

from dsv3.config.curation import CurationConfig, InputConfig
from dsv3.data.document import ReadingLog
from dsv3.data.hub import HUB
from dsv3.data.sources import BUILTIN
from dsv3.errors import DataError
from dsv3.runtime.atomic import write_json

HUB_FILES = ("hf://datasets/", "hf://buckets/", "hf://spaces/", "hf://models/")
"""Addresses of files on the hub, as fsspec has them; any other `hf://NAME` is a dataset read by rows."""
PLAN = "plan"


@dataclass(frozen=True, kw_only=True)
class InputFile:
    """A file of an input, or all of one that is no file."""

    source: int
    """Which input, by number."""
    url: str
    path: str
    """Its name within the input."""
    size: int
    """Bytes, as stored; 0 where nobody knows."""

    @property
    def name(self) -> str:
        """The last part of its path."""
        return self.path.rsplit("/", 1)[-1]

    def open(self, mode: Literal["rb"] = "rb") -> BufferedReader:
        """Open it for reading. Raises OSError."""
        if "://" not in self.url:
            return Path(self.url).open(mode)
        # Files of fsspec have neither `peek` nor lines of bounded length.
        return io.BufferedReader(fsspec.open(self.url, mode).open(), 2**20)


def list_files(source: InputConfig, *, number: int, log: ReadingLog) -> list[InputFile]:
    """Return the files of an input in a fixed order.

    Raises:
        DataError: there is nothing at its path, or it cannot be looked at.
    """
    path = source.path
    if path.startswith(BUILTIN) or (path.startswith(HUB) and not path.startswith(HUB_FILES)):
        return [InputFile(source=number, url=path, path="", size=0)]
    if "://" in path:
        files = _remote(path, number=number)
    else:
        files = [_local(Path(name), root=root, number=number) for name, root in _names(path, log=log)]
    if not files:
        raise DataError(f"there is no file at {path}; give a file, a folder, or a pattern such as 'texts/*.jsonl.gz'")
    return files


def _names(path: str, *, log: ReadingLog) -> Iterator[tuple[str, Path]]:
    """Yield the files of a path on this machine, each with the folder that its name counts from."""
    place = Path(path).expanduser()
    if place.is_dir():
        for name in _walk(place, log=log):
            yield name, place
    elif place.exists():
        yield str(place), place.parent
    else:
        fixed = Path(re.split(r"[*?\[]", str(place))[0] + "x").parent
        for found in sorted(fixed.glob(str(place.relative_to(fixed)))):
            if found.is_file():
                yield str(found), fixed


def _walk(folder: Path, *, log: ReadingLog) -> Iterator[str]:
    for place, folders, names in os.walk(folder, onerror=lambda error: _unreadable(error, log=log)):
        kept = sorted(name for name in folders if not name.startswith(".") and not (Path(place) / name).is_symlink())
        for name in sorted(set(folders) - set(kept)):
            log.skip(str(Path(place) / name), reason="hidden folder, or link to one")
        folders[:] = kept
        yield from (os.path.join(place, name) for name in sorted(names))  # noqa: PTH118 - names may be no UTF-8


def _unreadable(error: OSError, *, log: ReadingLog) -> None:
    log.skip(str(error.filename), reason=f"folder cannot be read ({error.strerror})")


def _local(path: Path, *, root: Path, number: int) -> InputFile:
    try:
        size = path.stat().st_size if path.is_file() else 0
    except OSError:
        size = 0
    return InputFile(source=number, url=str(path), path=_printable(path.relative_to(root).as_posix()), size=size)


def _printable(name: str) -> str:
    """Return a name that can be written as UTF-8; file systems hold others."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _remote(path: str, *, number: int) -> list[InputFile]:
    try:
        filesystem, place = url_to_fs(path)
        listed: dict[str, Any] = (
            filesystem.glob(place, detail=True) if re.search(r"[*?\[]", place) else filesystem.find(place, detail=True)
        )
    except ImportError as error:
        raise DataError(f"cannot read {path}: {error}") from error
    except Exception as error:  # Every store has classes of its own.
        raise DataError(
            f"cannot list {path} ({type(error).__name__}: {error}); check the name and your keys"
        ) from error
    fixed = re.split(r"[*?\[]", place)[0]
    root = fixed if fixed in listed or fixed == place else fixed.rsplit("/", 1)[0]
    if root in listed:
        root = root.rsplit("/", 1)[0]
    return [
        InputFile(
            source=number,
            url=filesystem.unstrip_protocol(name),
            path=name.removeprefix(root).lstrip("/"),
            size=int(about.get("size") or 0),
        )
        for name, about in sorted(listed.items())
        if about.get("type") != "directory"
    ]


def make_plan(config: CurationConfig, *, folder: Path) -> int:
    """Divide all files into tasks, write what each has to read, and return how many there are.

    Tasks are stretches of the list of all files, so that what comes out does not depend on their number. Made once:
    a preparation that goes on keeps its plan.

    Raises:
        DataError: an input has no files.
    """
    if (folder / PLAN / "plan.json").is_file():
        return int(json.loads((folder / PLAN / "plan.json").read_text(encoding="utf-8"))["tasks"])
    log = ReadingLog()
    files = [file for number, source in enumerate(config.inputs) for file in list_files(source, number=number, log=log)]
    parts = divide(files, tasks=config.tasks, task_bytes=config.task_bytes)
    (folder / PLAN).mkdir(parents=True, exist_ok=True)
    for task, part in enumerate(parts):
        write_json([asdict(file) for file in part], path=folder / PLAN / f"{task:05d}.json")
    skipped = [asdict(remark) for remark in log.skipped_remarks()]
    about = {"tasks": len(parts), "files": len(files), "bytes": sum(file.size for file in files), "skipped": skipped}
    write_json(about, path=folder / PLAN / "plan.json")
    return len(parts)


def planned_files(folder: Path, *, task: int) -> list[InputFile]:
    """Return what a task has to read."""
    listed = json.loads((folder / PLAN / f"{task:05d}.json").read_text(encoding="utf-8"))
    return [InputFile(**values) for values in listed]


def divide(files: list[InputFile], *, tasks: int, task_bytes: int) -> list[list[InputFile]]:
    """Cut a list of files into stretches of about as many bytes each; every stretch has a file."""
    # A file costs more than its bytes to open; counted so, a million empty ones are still divided.
    total = sum(file.size + 4096 for file in files)
    wanted = min(tasks or -(-total // task_bytes), len(files))
    parts: list[list[InputFile]] = [[] for _ in range(wanted)]
    before = 0
    for file in files:
        parts[min(before * wanted // total, wanted - 1)].append(file)
        before += file.size + 4096
    return [part for part in parts if part]
