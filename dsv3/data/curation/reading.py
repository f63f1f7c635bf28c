"""The first step: the documents of a task's files, whatever they are stored as, none longer than a limit."""

import gzip
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from io import BufferedReader
from typing import Literal

from dsv3.config.curation import InputConfig, ReadingConfig
from dsv3.data.curation.files import HUB_FILES, InputFile
from dsv3.data.curation.kinds import PROSE, READABLE, FileKind, kind_of
from dsv3.data.document import Document, ReadingLog
from dsv3.data.hub import HUB, hub_documents
from dsv3.data.record import read_json_lines, read_parquet
from dsv3.data.sources import BUILTIN, AbsentSourceError, builtin_documents
from dsv3.data.text_file import decode_text, read_text_file
from dsv3.data.tokenizer import whole_characters
from dsv3.errors import DataError, MissingExtraError

PAGES = ("text/html", "application/xhtml+xml")


@dataclass(frozen=True, kw_only=True)
class RawDocument:
    """A document as it was read."""

    name: str
    """Unique: input, file, and the line or part behind a '#'."""
    text: str
    source: int
    kind: str
    language: str
    """Of code, the programming language."""
    provenance: str


def read_raw(file: InputFile, *, source: InputConfig, config: ReadingConfig, log: ReadingLog) -> Iterator[RawDocument]:
    """Yield the documents of one file; what cannot be read is counted in `log`, and never raises.

    Raises:
        DataError: a dataset or built-in source cannot be opened.
    """
    kind = kind_of(file.name) if file.path else FileKind(reader="stream", kind=PROSE)
    name = f"{source.name}/{file.path}" if file.path else source.name
    if kind is None:
        log.skip(name, reason=f"kind of file is none of {READABLE}")
        return
    about = kind.kind if source.kind == "auto" else source.kind
    for document in _documents(file, kind=kind, name=name, config=config, log=log):
        if not document.text.strip():
            log.skip(document.name, reason="empty")
            continue
        for part in cut(_encodable(document, log=log), max_bytes=config.max_document_bytes):
            yield RawDocument(
                name=part.name,
                text=part.text,
                source=file.source,
                kind=about,
                language=kind.language,
                provenance=part.provenance or source.provenance,
            )


def cut(document: Document, *, max_bytes: int) -> Iterator[Document]:
    """Yield a document in parts of about so many bytes at most, at line ends where there are any."""
    text = document.text
    size = len(text) if text.isascii() else len(text.encode())
    if size <= max_bytes:
        yield document
        return
    characters = max(max_bytes * len(text) // size, 1)
    start = part = 0
    while start < len(text):
        end = start + characters
        if end < len(text):
            line_end = text.rfind("\n", start + characters // 2, end)
            end = end if line_end < 0 else line_end + 1
        if piece := text[start:end].strip():
            yield replace(document, name=f"{document.name}#part{part}", text=piece)
            part += 1
        start = end


def _encodable(document: Document, *, log: ReadingLog) -> Document:
    try:
        document.text.encode()
    except UnicodeEncodeError:
        log.change(document.name, reason="half a surrogate pair, which UTF-8 cannot hold: replaced by U+FFFD")
        return replace(document, text=whole_characters(document.text))
    return document


def _documents(
    file: InputFile, *, kind: FileKind, name: str, config: ReadingConfig, log: ReadingLog
) -> Iterator[Document]:
    if kind.reader == "stream":
        yield from _stream(file.url, name=name, log=log)
        return
    try:
        yield from _READERS[kind.reader](_Unpacked(file), name=name, config=config, log=log)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        log.skip(name, reason=f"broken gzip file from some place on ({type(error).__name__})")
    except OSError as error:
        log.skip(name, reason=f"cannot be read ({error.strerror or type(error).__name__})")


def _stream(url: str, *, name: str, log: ReadingLog) -> Iterator[Document]:
    try:
        documents = (
            hub_documents(url, log=log)
            if url.startswith(HUB) and not url.startswith(HUB_FILES)
            else builtin_documents(url.removeprefix(BUILTIN), log=log)
        )
        for document in documents:
            yield replace(document, name=f"{name}/{document.name}")
    except AbsentSourceError as error:
        raise DataError(f"cannot read {url}: {error}") from error


class _Unpacked:
    """A file that opens as what was compressed in it. JSON lines and tables unpack themselves."""

    def __init__(self, file: InputFile) -> None:
        self.file = file
        self.name = file.name

    def open(self, mode: Literal["rb"]) -> BufferedReader:
        opened = self.file.open(mode)
        lowered = self.name.lower()
        unpacks_itself = lowered.endswith((".jsonl.gz", ".ndjson.gz", ".warc.gz", ".wet.gz"))
        return opened if unpacks_itself or not lowered.endswith(".gz") else BufferedReader(_Gzip(opened))


class _Gzip(gzip.GzipFile):
    """What is in a compressed file, which is closed with it."""

    def __init__(self, stored: BufferedReader) -> None:
        super().__init__(fileobj=stored)
        self._stored = stored

    def close(self) -> None:
        super().close()
        self._stored.close()


def _read_text(file: _Unpacked, *, name: str, config: ReadingConfig, log: ReadingLog) -> Iterator[Document]:
    return read_text_file(file, name=name, log=log, piece_bytes=config.max_document_bytes)


def _read_lines(file: _Unpacked, *, name: str, config: ReadingConfig, log: ReadingLog) -> Iterator[Document]:
    return read_json_lines(file, name=name, log=log, max_line_bytes=config.max_line_bytes)


def _read_table(file: _Unpacked, *, name: str, config: ReadingConfig, log: ReadingLog) -> Iterator[Document]:  # noqa: ARG001
    return read_parquet(file, name=name, log=log)


def _read_page(file: _Unpacked, *, name: str, config: ReadingConfig, log: ReadingLog) -> Iterator[Document]:
    with file.open("rb") as opened:
        page = opened.read(config.max_page_bytes + 1)
    yield from page_text(page, name=name, config=config, log=log)


def _read_archive(file: _Unpacked, *, name: str, config: ReadingConfig, log: ReadingLog) -> Iterator[Document]:
    """Yield the pages of a WARC file, and the texts of a WET file."""
    try:
        from warcio.archiveiterator import ArchiveIterator
        from warcio.exceptions import ArchiveLoadFailed
    except ImportError as error:
        raise MissingExtraError(package="warcio", extra="data", purpose=f"reading {name}") from error
    with file.open("rb") as opened:
        try:
            for number, record in enumerate(ArchiveIterator(opened)):
                label = f"{name}#{number}"
                if record.rec_type not in ("response", "conversion"):
                    continue
                body = record.content_stream().read(config.max_page_bytes + 1)
                if record.rec_type == "conversion":
                    if len(body) > config.max_page_bytes:
                        log.skip(label, reason=f"text of a page larger than {config.max_page_bytes >> 20} MiB")
                    else:
                        yield Document(name=label, text=decode_text(body, name=label, log=log))
                elif _is_page(record):
                    yield from page_text(body, name=label, config=config, log=log)
        except ArchiveLoadFailed as error:
            log.skip(name, reason=f"broken WARC file from some place on ({type(error).__name__})")


def _is_page(record: object) -> bool:
    headers = getattr(record, "http_headers", None)
    kind = (headers.get_header("Content-Type") or "") if headers is not None else ""
    return kind.split(";")[0].strip().lower() in PAGES


def page_text(page: bytes, *, name: str, config: ReadingConfig, log: ReadingLog) -> Iterator[Document]:
    """Yield the main text of a web page, without what surrounds it; of one too large for its tree, none.

    Raises:
        MissingExtraError: trafilatura is not installed.
    """
    if len(page) > config.max_page_bytes:
        log.skip(name, reason=f"page larger than {config.max_page_bytes >> 20} MiB")
        return
    if page.count(b"<") > config.max_page_tags:
        log.skip(name, reason=f"page with more than {config.max_page_tags:,} tags")
        return
    try:
        import trafilatura
    except ImportError as error:
        raise MissingExtraError(package="trafilatura", extra="data", purpose=f"reading the page {name}") from error
    try:
        text = trafilatura.extract(page, include_comments=False, include_tables=True, deduplicate=False)
    except Exception as error:  # A parser of broken pages meets everything; no page may end a task.
        log.skip(name, reason=f"page cannot be parsed ({type(error).__name__})")
        return
    if not text:
        log.skip(name, reason="page without a main text")
        return
    yield Document(name=name, text=text)


_READERS: dict[str, Callable[..., Iterator[Document]]] = {
    "text": _read_text,
    "lines": _read_lines,
    "table": _read_table,
    "page": _read_page,
    "archive": _read_archive,
}
