"""Records with named fields, as JSON lines and tables hold them: which field is the text, and how chats read."""

import gzip
import json
import zlib
from collections.abc import Iterator
from io import BufferedReader
from typing import Any, cast

import pyarrow
import pyarrow.parquet

from dsv3.data.chat_template import render_template
from dsv3.data.document import Document, ReadingLog
from dsv3.data.special_tokens import BOS, CHAT_TEMPLATE, EOS
from dsv3.data.text_file import Openable, decode_text
from dsv3.errors import TokenizerError

TEXT_FIELDS = ("text", "content")
FIELDS = (*TEXT_FIELDS, "messages", "prompt", "completion")
"""Fields that are looked at; any others of a record are left alone."""
PROVENANCE = "provenance"
"""Of text that a model made: which model, and how (`dsv3 distill` writes it)."""
BATCH_BYTES, MAX_BATCH_ROWS = 4 * 2**20, 256
"""Of a table, what is in memory at a time."""
MAX_LINE_BYTES = 64 * 2**20
"""A longer line is not read as a whole: it would have to fit in memory several times over."""


def record_text(record: dict[str, Any]) -> str | None:
    """Return the text of a record, or None when it has none of the known fields.

    `text` or `content` as it stands; `messages`, or `prompt` and `completion` as one question and its answer, in the
    chat format, without the BOS and the last EOS, which every document gets anyway.
    """
    for field in TEXT_FIELDS:
        if isinstance(record.get(field), str):
            return cast(str, record[field])
    messages = record.get("messages")
    if messages is None and isinstance(record.get("prompt"), str) and isinstance(record.get("completion"), str):
        messages = [
            {"role": "user", "content": record["prompt"]},
            {"role": "assistant", "content": record["completion"]},
        ]
    if not messages or not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        return None
    try:
        text = render_template(CHAT_TEMPLATE, messages=messages, add_generation_prompt=False)
    except TokenizerError:
        return None
    return text.removeprefix(BOS).removesuffix(EOS)


def read_record(record: Any, *, name: str, log: ReadingLog) -> Iterator[Document]:
    """Yield the document of a record, or say why there is none."""
    if not isinstance(record, dict):
        log.skip(name, reason=f"a JSON {type(record).__name__} where an object was expected")
        return
    text = record_text(record)
    if text is None:
        log.skip(name, reason="no readable field " + ", ".join(f"'{field}'" for field in FIELDS[:-1]) + "+'completion'")
        return
    about = record.get(PROVENANCE)
    yield Document(name=name, text=text, provenance=json.dumps(about, sort_keys=True, default=str) if about else "")


def read_json_lines(
    path: Openable, *, name: str, log: ReadingLog, max_line_bytes: int = MAX_LINE_BYTES
) -> Iterator[Document]:
    """Yield the documents of a .jsonl or .jsonl.gz file. Raises OSError when it cannot be read.

    Lines end at line feeds alone: U+2028 and its like are part of a text.
    """
    with path.open("rb") as stored, open_lines(stored, name=path.name) as file:
        number = 0
        try:
            while line := file.readline(max_line_bytes):
                number += 1
                long = len(line) == max_line_bytes and not line.endswith(b"\n")
                if long:
                    while line and not line.endswith(b"\n"):
                        line = file.readline(max_line_bytes)
                    log.skip(f"{name}#{number}", reason=f"line longer than {max_line_bytes >> 20} MiB")
                else:
                    yield from _read_line(line, name=f"{name}#{number}", log=log)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            log.skip(f"{name}#{number + 1}", reason=f"broken gzip file from here on ({type(error).__name__})")
        if not number:
            log.skip(name, reason="empty")


def open_lines(stored: BufferedReader, *, name: str) -> gzip.GzipFile | BufferedReader:
    """Return a file as it reads, compressed or not."""
    return gzip.GzipFile(fileobj=stored) if name.lower().endswith(".gz") else stored


def _read_line(line: bytes, *, name: str, log: ReadingLog) -> Iterator[Document]:
    if not line.strip():
        return
    try:
        record = json.loads(decode_text(line, name=name, log=log))
    except (ValueError, RecursionError):
        log.skip(name, reason="broken JSON")
        return
    yield from read_record(record, name=name, log=log)


def read_parquet(path: Openable, *, name: str, log: ReadingLog) -> Iterator[Document]:
    """Yield the documents of a Parquet table, a few megabytes of rows at a time. Raises OSError when it cannot be read.

    Pages are read as they are wanted, not whole columns, so that memory does not follow the size of row groups.
    """
    number = 0
    try:
        with (
            path.open("rb") as file,
            pyarrow.parquet.ParquetFile(file, buffer_size=2**20, pre_buffer=False) as table,
        ):
            columns = [field for field in FIELDS if field in table.schema_arrow.names]
            if not columns:
                log.skip(name, reason="no column " + ", ".join(f"'{field}'" for field in FIELDS))
                return
            columns += [PROVENANCE] if PROVENANCE in table.schema_arrow.names else []
            for rows in table.iter_batches(batch_size=_rows_at_a_time(table.metadata), columns=columns):
                for record in rows.to_pylist():
                    number += 1
                    yield from read_record(record, name=f"{name}#{number}", log=log)
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        log.skip(f"{name}#{number + 1}", reason=f"broken Parquet file from here on ({type(error).__name__})")


def _rows_at_a_time(table: pyarrow.parquet.FileMetaData) -> int:
    """Return how many rows of a table are about `BATCH_BYTES`, by their mean size, and at most `MAX_BATCH_ROWS`."""
    size = sum(table.row_group(group).total_byte_size for group in range(table.num_row_groups))
    return max(1, min(MAX_BATCH_ROWS, BATCH_BYTES * table.num_rows // max(size, 1)))
