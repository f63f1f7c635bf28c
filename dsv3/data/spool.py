"""The first reading of a source: its documents on disk, duplicates gone, held-out ones set apart.

Every later step reads these files, so that a stream is read once, and a tokenizer can be trained before anything
is encoded. They take about the size of the text until the corpus is finished.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from dsv3.config import PretrainConfig, SourceConfig
from dsv3.data.chance import falls_below, hash_text
from dsv3.data.corpus import read_documents
from dsv3.data.curation.plain import PlainRules
from dsv3.data.document import Document, ReadingLog, Remark
from dsv3.data.hub import HUB
from dsv3.errors import DataError
from dsv3.runtime.atomic import whole_file, write_json

STREAM_BYTES_PER_TOKEN = 6
"""A stream is read up to this many bytes for each token the run trains on: more than any tokenizer puts in a token,
so that one pass is enough."""
MIN_HELD_OUT_SHARE = 0.05
"""Of a source too small for the hash to pick a document, this share of the text is held out."""


@dataclass(frozen=True, kw_only=True)
class Cut:
    """A document whose end is held out, since its source had no whole document to spare."""

    text_hash: int
    kept_characters: int


@dataclass(frozen=True, kw_only=True)
class Spool:
    """One source as it was read."""

    documents: int
    bytes: int
    held_out_documents: int
    held_out_bytes: int
    duplicates: int
    skipped: tuple[Remark, ...]
    changed: tuple[Remark, ...]
    cut: Cut | None


@dataclass
class _Reading:
    """Running counts of one source, and the candidate for a cut."""

    log: ReadingLog
    documents: int = 0
    bytes: int = 0
    held_out_documents: int = 0
    held_out_bytes: int = 0
    duplicates: int = 0
    candidate: Document | None = None
    candidate_hash: int = 2**64

    def keep(self, document: Document, *, hashed: int, size: int) -> None:
        self.documents += 1
        self.bytes += size
        if hashed < self.candidate_hash:
            self.candidate, self.candidate_hash = document, hashed

    def hold_out(self, size: int) -> None:
        self.held_out_documents += 1
        self.held_out_bytes += size


def spool_source(
    source: SourceConfig,
    *,
    config: PretrainConfig,
    folder: Path,
    held_out_file: Path,
    seen: set[int],
    rules: PlainRules,
    on_bytes: Callable[[int], None],
) -> Spool:
    """Read a source into `folder`; `seen` collects the hashes of all texts, eight bytes a document.

    `rules` changes or drops a document before anything else is done with it, and keeps account of all.

    A document is held out when the hash of its text falls below `held_out_rate`, whatever source or file it is in,
    so that no copy of a held-out text is ever trained on.

    Raises:
        AbsentSourceError: a built-in source whose package is not installed.
        DataError: the source cannot be read, or has no readable document.
    """
    reading = _Reading(log=ReadingLog())
    limit = config.total_tokens * STREAM_BYTES_PER_TOKEN if source.path.startswith(HUB) else None
    folder.mkdir(parents=True, exist_ok=True)
    rules.begin()
    with whole_file(folder / "documents.jsonl") as kept, whole_file(held_out_file) as held_out:
        for read in read_documents(source, log=reading.log):
            document = rules.apply(read, log=reading.log)
            if document is not None:
                _place(document, config=config, reading=reading, seen=seen, rules=rules, kept=kept, held_out=held_out)
            on_bytes(reading.bytes)
            if limit is not None and reading.bytes >= limit:
                reading.log.skip(source.path, reason=f"rest of the stream: {limit:,} bytes are enough for this run")
                break
        cut = None
        if config.data.held_out_rate and not reading.held_out_documents and reading.candidate is not None:
            cut = _hold_out_an_end(reading, held_out=held_out)
    if not reading.documents:
        raise DataError(f"{source.path} leaves no document to train on{_reasons(reading)}")
    spool = Spool(
        documents=reading.documents,
        bytes=reading.bytes,
        held_out_documents=reading.held_out_documents,
        held_out_bytes=reading.held_out_bytes,
        duplicates=reading.duplicates,
        skipped=reading.log.skipped_remarks(),
        changed=reading.log.changed_remarks(),
        cut=cut,
    )
    rules.save(folder)
    write_json(asdict(spool), path=folder / "spool.json")
    return spool


def spooled_source(folder: Path, *, held_out_file: Path, seen: set[int], rules: PlainRules) -> Spool | None:
    """Return what an earlier, interrupted preparation read of a source; None if it was not done.

    Adds its hashes to `seen`, and has `rules` remember its texts.
    """
    if not (folder / "spool.json").is_file():
        return None
    values: dict[str, Any] = json.loads((folder / "spool.json").read_text(encoding="utf-8"))
    # An end that is held out belongs to a text that is in the first file as a whole.
    for file in (folder / "documents.jsonl", *([] if values["cut"] else [held_out_file])):
        for document in _read(file):
            seen.add(hash_text(document.text))
            rules.remember(document.text)
    remarks = {
        field: tuple(Remark(**{**remark, "examples": tuple(remark["examples"])}) for remark in values[field])
        for field in ("skipped", "changed")
    }
    return Spool(**{**values, **remarks, "cut": Cut(**values["cut"]) if values["cut"] else None})


def training_documents(folder: Path, *, spool: Spool) -> Iterator[Document]:
    """Yield the documents to train on, without what is held out."""
    for document in _read(folder / "documents.jsonl"):
        if spool.cut is not None and hash_text(document.text) == spool.cut.text_hash:
            kept = document.text[: spool.cut.kept_characters]
            if kept.strip():
                yield Document(name=document.name, text=kept)
        else:
            yield document


def _place(
    document: Document,
    *,
    config: PretrainConfig,
    reading: _Reading,
    seen: set[int],
    rules: PlainRules,
    kept: BinaryIO,
    held_out: BinaryIO,
) -> None:
    hashed = hash_text(document.text)
    if hashed in seen:
        reading.duplicates += 1
        rules.note_copy(document)
        return
    if rules.is_near_copy(document, log=reading.log):
        return
    seen.add(hashed)
    size = len(document.text.encode("utf-8", "replace"))
    if not falls_below(hashed, rate=config.data.held_out_rate):
        reading.keep(document, hashed=hashed, size=size)
        _write(document, file=kept)
    elif reading.held_out_documents < config.data.max_held_out_documents:
        reading.hold_out(size)
        _write(document, file=held_out)
    else:
        reading.log.skip(document.name, reason="held out beyond data.max_held_out_documents")


def _hold_out_an_end(reading: _Reading, *, held_out: BinaryIO) -> Cut | None:
    """Hold out the end of the document with the lowest hash: all of it if it is a small share of the source."""
    document = reading.candidate
    assert document is not None
    wanted = max(int(MIN_HELD_OUT_SHARE * reading.bytes), 1)
    size = len(document.text.encode("utf-8", "replace"))
    end = 0
    if size > wanted:
        end = len(document.text) - max(int(len(document.text) * wanted / size), 1)
        line_break = document.text.find("\n", end, end + (len(document.text) - end) // 2)
        end = end if line_break < 0 else line_break + 1
    if not document.text[:end].strip() and reading.documents == 1:
        return None
    tail = Document(name=document.name, text=document.text[end:])
    tail_size = len(tail.text.encode("utf-8", "replace"))
    _write(tail, file=held_out)
    reading.hold_out(tail_size)
    reading.bytes -= tail_size
    reading.documents -= not document.text[:end].strip()
    reading.log.change(document.name, reason="held out at its end, since the hash picked no document of this source")
    return Cut(text_hash=reading.candidate_hash, kept_characters=end)


def _write(document: Document, *, file: BinaryIO) -> None:
    file.write(json.dumps({"name": document.name, "text": document.text}).encode() + b"\n")


def _read(file: Path) -> Iterator[Document]:
    with file.open("rb") as lines:
        for line in lines:
            yield Document(**json.loads(line))


def _reasons(reading: _Reading) -> str:
    reasons = [
        f"{remark.reason}: {remark.count} (such as {remark.examples[0]})" for remark in reading.log.skipped_remarks()
    ]
    if reading.held_out_documents:
        reasons.append(f"held out: {reading.held_out_documents} (lower data.held_out_rate)")
    if reading.duplicates:
        reasons.append(f"copies of texts that came before: {reading.duplicates}")
    return ": " + "; ".join(reasons) if reasons else ": it is empty"
