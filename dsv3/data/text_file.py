"""Plain text files, whatever wrote them: bytes in, text out, and a remark where that was not straightforward."""

import codecs
from collections.abc import Iterator
from io import BufferedReader, TextIOWrapper
from typing import Literal, Protocol, runtime_checkable

from dsv3.data.document import Document, ReadingLog

PIECE_BYTES = 16 * 2**20
"""A longer file is cut into documents of about this size at line ends, so that it need not fit in memory."""
PROBE_BYTES = 8192
MAX_CONTROL_SHARE = 0.05
"""More control characters than this share of a file's beginning make it binary; escape codes of logs stay below."""

BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # Before UTF-16, whose mark it begins with.
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


@runtime_checkable
class Openable(Protocol):
    """A file that can be opened for reading again and again: a `Path`, or one behind a URL."""

    @property
    def name(self) -> str:
        """The last part of its path."""
        ...

    def open(self, mode: Literal["rb"]) -> BufferedReader:
        """Open it."""
        ...


def read_text_file(path: Openable, *, name: str, log: ReadingLog, piece_bytes: int = PIECE_BYTES) -> Iterator[Document]:
    """Yield the text of a file, in several documents when it is long. Raises OSError when it cannot be read."""
    with path.open("rb") as file:
        beginning = file.read(PROBE_BYTES)
        wide = next((encoding for mark, encoding in BYTE_ORDER_MARKS if beginning.startswith(mark)), "utf-8")
        if wide == "utf-8" and looks_binary(beginning):
            log.skip(name, reason="binary file")
        elif not beginning:
            log.skip(name, reason="empty")
        elif wide == "utf-8":
            file.seek(0)
            yield from _read_bytes(file, name=name, log=log, piece_bytes=piece_bytes)
        else:
            yield from _read_wide(path, name=name, encoding=wide, log=log, piece_bytes=piece_bytes)


def decode_text(data: bytes, *, name: str, log: ReadingLog) -> str:
    """Decode UTF-8, with or without its mark, and anything else as Latin-1, which every byte belongs to."""
    data = data.removeprefix(codecs.BOM_UTF8)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        log.change(name, reason="not UTF-8: read as Latin-1")
        return data.decode("latin-1")


def looks_binary(beginning: bytes) -> bool:
    """Tell whether a file that begins so holds something other than text."""
    control = sum(beginning.count(byte) for byte in (*range(9), *range(14, 32), 127))
    return b"\0" in beginning or control > MAX_CONTROL_SHARE * len(beginning)


def _read_bytes(file: BufferedReader, *, name: str, log: ReadingLog, piece_bytes: int) -> Iterator[Document]:
    part = 0
    while piece := file.read(piece_bytes):
        if len(piece) == piece_bytes:
            piece += file.readline(piece_bytes)
            while (following := file.peek(1)[:1]) and not piece.endswith(b"\n") and 0x80 <= following[0] < 0xC0:
                piece += file.read(1)  # The end of a line never came; a character is not to be cut all the same.
        part_name = f"{name}#{part}" if part or file.peek(1) else name
        yield Document(name=part_name, text=decode_text(piece, name=part_name, log=log))
        part += 1


def _read_wide(path: Openable, *, name: str, encoding: str, log: ReadingLog, piece_bytes: int) -> Iterator[Document]:
    """Read UTF-16 or UTF-32, which no byte-wise rule applies to."""
    try:
        with TextIOWrapper(path.open("rb"), encoding=encoding, newline="") as file:
            part = 0
            while text := file.read(piece_bytes):
                yield Document(name=f"{name}#{part}" if part else name, text=text)
                part += 1
    except UnicodeDecodeError:
        log.skip(name, reason=f"marked as {encoding.upper()} but not valid as such from some place on")
        return
    log.change(name, reason=f"{encoding.upper()}: read by its byte order mark")
