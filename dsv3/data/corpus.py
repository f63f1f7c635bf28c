"""The documents of a source, one after the other and never all in memory, whatever kind of source it is."""

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from dsv3.config import DataConfig, SourceConfig
from dsv3.data.document import Document, ReadingLog
from dsv3.data.hub import HUB, hub_documents
from dsv3.data.record import read_json_lines, read_parquet
from dsv3.data.sources import BUILTIN, DEFAULT_SOURCES, builtin_documents
from dsv3.data.text_file import read_text_file
from dsv3.data.tokenizer import whole_characters
from dsv3.errors import DataError

FileReader = Callable[..., Iterator[Document]]

READERS: dict[str, FileReader] = {
    ".txt": read_text_file,
    ".md": read_text_file,
    ".py": read_text_file,
    ".jsonl": read_json_lines,
    ".jsonl.gz": read_json_lines,
    ".parquet": read_parquet,
}
KINDS = " ".join(READERS)


def named_sources(config: DataConfig) -> tuple[SourceConfig, ...]:
    """Return the sources of a run, the built-in ones when none are given, each with a name of its own.

    An empty name becomes the last part of the path; a second source of the same name gets a number.
    """
    taken: set[str] = set()
    sources = []
    for source in config.sources or DEFAULT_SOURCES:
        wanted = source.name or source.path.split("?")[0].rstrip("/").rsplit("/", 1)[-1] or "root"
        name, number = wanted, 2
        while name in taken:
            name, number = f"{wanted}-{number}", number + 1
        taken.add(name)
        sources.append(SourceConfig(path=source.path, name=name, weight=source.weight))
    return tuple(sources)


def read_documents(source: SourceConfig, *, log: ReadingLog) -> Iterator[Document]:
    """Yield the documents of one source in a fixed order, without the empty ones, which `log` counts.

    Raises:
        AbsentSourceError: a built-in source whose package is not installed.
        DataError: there is nothing at the path, or its kind is unknown.
        MissingExtraError: a hub dataset without the library for it.
    """
    for document in _all_documents(source, log=log):
        if document.text.strip():
            yield _encodable(document, log=log)
        else:
            log.skip(document.name, reason="empty")


def _encodable(document: Document, *, log: ReadingLog) -> Document:
    try:
        document.text.encode()
    except UnicodeEncodeError:
        log.change(document.name, reason="half a surrogate pair, which UTF-8 cannot hold: replaced by U+FFFD")
        return replace(document, text=whole_characters(document.text))
    return document


def _all_documents(source: SourceConfig, *, log: ReadingLog) -> Iterator[Document]:
    if source.path.startswith(BUILTIN):
        return builtin_documents(source.path.removeprefix(BUILTIN), log=log)
    if source.path.startswith(HUB):
        return hub_documents(source.path, log=log)
    if "://" in source.path:
        raise DataError(f"cannot read {source.path}; a source is a path, {HUB}NAME or {BUILTIN}NAME")
    path = Path(source.path).expanduser()
    if path.is_dir():
        return _folder_documents(path, log=log)
    if not path.exists():
        raise DataError(f"there is nothing at {path}; give a file ({KINDS}) or a folder of such files")
    if _reader_of(path) is None:
        raise DataError(f"cannot read {path}: its kind is none of {KINDS}")
    return _file_documents(path, name=path.name, log=log)


def _folder_documents(folder: Path, *, log: ReadingLog) -> Iterator[Document]:
    for place, folders, files in os.walk(folder, onerror=lambda error: _skip_unreadable(error, folder=folder, log=log)):
        for name in sorted(folders):
            path = Path(place) / name
            if name.startswith(".") or path.is_symlink():
                reason = "hidden folder" if name.startswith(".") else "link to a folder"
                log.skip(path.relative_to(folder).as_posix(), reason=reason)
                folders.remove(name)
        folders.sort()
        for file in sorted(files):
            path = Path(place) / file
            yield from _file_documents(path, name=path.relative_to(folder).as_posix(), log=log)


def _file_documents(path: Path, *, name: str, log: ReadingLog) -> Iterator[Document]:
    reader = _reader_of(path)
    if reader is None:
        log.skip(name, reason=f"kind of file is none of {KINDS}")
        return
    if not path.is_file():
        log.skip(name, reason="not a regular file, or a link to nowhere")
        return
    try:
        yield from reader(path, name=name, log=log)
    except OSError as error:
        log.skip(name, reason=f"cannot be read ({error.strerror or type(error).__name__})")


def _reader_of(path: Path) -> FileReader | None:
    lowered = path.name.lower()
    return next((reader for kind, reader in READERS.items() if lowered.endswith(kind)), None)


def _skip_unreadable(error: OSError, *, folder: Path, log: ReadingLog) -> None:
    log.skip(os.path.relpath(error.filename, folder), reason=f"folder cannot be read ({error.strerror})")
