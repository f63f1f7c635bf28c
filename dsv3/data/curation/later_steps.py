"""The stages after the first, as datatrove runs them: copies, tokenizer, shards, and the end of it all."""

import json
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np
from datatrove.data import Document as TroveDocument
from datatrove.pipeline.base import PipelineStep
from jaxtyping import Shaped
from numpy import ndarray

from dsv3.config.curation import CurationConfig
from dsv3.config.data import DataConfig
from dsv3.data.chance import falls_below, hash_text
from dsv3.data.curation.account import StepAccount, read_account, write_account
from dsv3.data.curation.document_file import KeptDocument, document_file, read_documents
from dsv3.data.curation.duplicates import (
    EXACT,
    NEAR,
    Dropped,
    Grouping,
    bands_of,
    find_pairs,
    group,
)
from dsv3.data.curation.finish import finish
from dsv3.data.curation.groups import group_folder, group_name
from dsv3.data.document import Document
from dsv3.data.encoder import DocumentEncoder
from dsv3.data.sample import SAMPLE_CHARACTERS, sample_texts
from dsv3.data.shards import ShardWriter, load_array, save_array
from dsv3.data.tokenizer import AT_ONCE_CHARACTERS, Tokenizer
from dsv3.runtime.atomic import whole_file, write_json

TOKENIZER = "tokenizer"
HELD_OUT_PARTS = "held_out"


class _Stage(PipelineStep):  # type: ignore[misc]  # datatrove has no types
    """A stage of one step, which reads and writes files by itself."""

    type = "dsv3"

    def __init__(self, config: CurationConfig, *, folder: Path, tasks: int) -> None:
        super().__init__()
        self.config = config
        self.folder = folder
        self.tasks = tasks
        """Of the first stage, whose files are read."""

    def run(
        self,
        data: object = None,  # noqa: ARG002
        rank: int = 0,
        world_size: int = 1,  # noqa: ARG002
    ) -> Iterator[TroveDocument]:
        """Do the task."""
        self.work(rank)
        yield from ()

    def work(self, task: int) -> None:
        """Do one task."""
        raise NotImplementedError


class FindPairs(_Stage):
    """Finds documents with the same signature in a band."""

    name = "pairs"

    def work(self, task: int) -> None:
        """Do one task."""
        (self.folder / "pairs").mkdir(exist_ok=True)
        pairs = find_pairs(self.folder / "signatures", band=task, tasks=self.tasks)
        save_array(pairs, path=self.folder / "pairs" / f"{task:02d}.npy")


class GroupCopies(_Stage):
    """Joins the pairs of all bands, and says which documents are dropped."""

    name = "groups"

    def work(self, task: int) -> None:  # noqa: ARG002
        """Do one task."""
        documents = [
            int(read_account(self.folder / "accounts" / "documents" / f"{part:05d}.json")[1]["documents"])
            for part in range(self.tasks)
        ]
        bands = bands_of(self.config.duplicates)
        pairs = [load_array(self.folder / "pairs" / f"{band:02d}.npy") for band in range(bands)]
        found = group(
            pairs[:-1],
            exact=pairs[-1] if self.config.duplicates.exact else np.empty((0, 2), dtype=np.int64),
            documents=documents,
        )
        for part, dropped in enumerate(found.dropped):
            write_dropped(dropped, folder=self.folder, task=part)
        self._tell(found, documents=documents)

    def _tell(self, found: Grouping, *, documents: list[int]) -> None:
        starts = np.cumsum([0, *documents])
        names = []
        for first, size in found.largest:
            part = int(np.searchsorted(starts, first, side="right")) - 1
            place = first - int(starts[part])
            for number, document in enumerate(read_documents(document_file(self.folder, task=part))):
                if number == place:
                    names.append([document.name, size])
                    break
        about = {"sizes": sorted(found.group_sizes.items()), "largest": names}
        write_json(about, path=self.folder / "accounts" / "groups.json")


def write_dropped(dropped: Dropped, *, folder: Path, task: int) -> None:
    """Keep which documents of a task are dropped."""
    (folder / "dropped").mkdir(exist_ok=True)
    table = np.stack([dropped.index, dropped.first, dropped.is_exact.astype(np.int64)])
    save_array(table, path=folder / "dropped" / f"{task:05d}.npy")


def kept_documents(folder: Path, *, task: int) -> Iterator[tuple[KeptDocument, str]]:
    """Yield the documents of a task, each with why it is dropped; '' for those that stay."""
    table: Shaped[ndarray, "3 dropped"] = load_array(folder / "dropped" / f"{task:05d}.npy")
    reasons = {int(index): EXACT if is_exact else NEAR for index, _, is_exact in table.T}
    for number, document in enumerate(read_documents(document_file(folder, task=task))):
        yield document, reasons.get(number, "")


class MakeTokenizer(_Stage):
    """Copies the tokenizer, or trains one on a sample of what was kept."""

    name = "tokenizer"

    def work(self, task: int) -> None:  # noqa: ARG002
        """Do one task."""
        tokens = self.config.tokens
        if tokens.tokenizer:
            tokenizer = Tokenizer.from_file(Path(tokens.tokenizer).expanduser())
        else:
            sample = sample_texts(self._training(), characters=SAMPLE_CHARACTERS, seed=tokens.seed)
            tokenizer = Tokenizer.train(sample, vocab_size=tokens.vocab_size)
        _ = tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id
        if tokens.fim_rate:
            _ = tokenizer.fim_begin_id, tokenizer.fim_hole_id, tokenizer.fim_end_id
        tokenizer.save(self.folder.parent / TOKENIZER)

    def _training(self) -> Iterator[Document]:
        for part in range(self.tasks):
            for document, reason in kept_documents(self.folder, task=part):
                if not reason and not _is_held_out(document, config=self.config):
                    yield Document(name=document.name, text=document.text)


def _is_held_out(document: KeptDocument, *, config: CurationConfig) -> bool:
    return falls_below(hash_text(document.text), rate=config.tokens.held_out_rate)


class WriteShards(_Stage):
    """Encodes what is kept of a task, and writes it as shards, a folder for each source and domain."""

    name = "shards"

    def work(self, task: int) -> None:
        """Do one task."""
        output = self.folder.parent
        part = f"{task:05d}-"
        for stale in (output / "sources").glob(f"*/shard-{part}*"):
            stale.unlink()  # Of an attempt that was killed: shards of one group may be whole, and those of others not.
        learned = output / TOKENIZER
        tokenizer = _tokenizer_at(learned, changed=learned.stat().st_mtime_ns)
        writer = _GroupWriter(self.config, tokenizer=tokenizer, output=output, part=part)
        account = StepAccount(name="copies")
        for document, reason in kept_documents(self.folder, task=task):
            size = len(document.text.encode())
            account.documents += 1
            account.bytes += size
            if reason:
                keep = self.config.reading.max_remarks
                account.drop(document.name, text=document.text, size=size, reason=reason, keep=keep)
                account.noted[f"{self.config.inputs[document.source].name}: {reason}"] += 1
                continue
            account.keep(size)
            writer.add(document, size=size)
        writer.close()
        held_out = self.folder / HELD_OUT_PARTS / f"{task:05d}.jsonl"
        held_out.parent.mkdir(exist_ok=True)
        with whole_file(held_out) as file:
            file.writelines(json.dumps(one).encode() + b"\n" for one in writer.held_out)
        write_account(
            [account],
            path=self.folder / "accounts" / "shards" / f"{task:05d}.json",
            groups={name: dict(counts) for name, counts in writer.counts.items()},
        )


@lru_cache(maxsize=1)
def _tokenizer_at(file: Path, *, changed: int) -> Tokenizer:  # noqa: ARG001
    """Return one tokenizer for all tasks of a process: each one that is read leaves some 7 MB of its caches behind."""
    return Tokenizer.from_file(file)


class _GroupWriter:
    """Shards of every group of one task."""

    def __init__(self, config: CurationConfig, *, tokenizer: Tokenizer, output: Path, part: str) -> None:
        self.config, self.output, self.part = config, output, part
        self.tokenizer = tokenizer
        self.counts: dict[str, Counter[str]] = {}
        self.held_out: list[tuple[str, str, str]] = []
        """Group, name and text."""
        self._encoder = DocumentEncoder(
            tokenizer,
            config=DataConfig(fim_rate=config.tokens.fim_rate, boundary_split_rate=config.tokens.boundary_split_rate),
            seed=config.tokens.seed,
        )
        self._writers: dict[str, ShardWriter] = {}
        self._waiting: dict[str, list[Document]] = {}
        self._characters = 0

    def add(self, document: KeptDocument, *, size: int) -> None:
        """Take a document."""
        name = group_name(self.config, source=document.source, domain=document.domain)
        counts = self.counts.setdefault(name, Counter(source=document.source))
        if _is_held_out(document, config=self.config):
            if counts["held_out_documents"] < self.config.tokens.max_held_out_documents:
                counts["held_out_documents"] += 1
                counts["held_out_bytes"] += size
                self.held_out.append((name, document.name, document.text))
            else:
                counts["left_out"] += 1
            return
        counts["documents"] += 1
        counts["bytes"] += size
        self._waiting.setdefault(name, []).append(Document(name=document.name, text=document.text))
        self._characters += len(document.text)
        if self._characters >= AT_ONCE_CHARACTERS:
            self._encode()

    def close(self) -> None:
        """Write what is left."""
        self._encode()
        for writer in self._writers.values():
            writer.flush()

    def _encode(self) -> None:
        for name, documents in self._waiting.items():
            writer = self._writers.get(name)
            if writer is None:
                folder = group_folder(self.output, name=name)
                folder.mkdir(parents=True, exist_ok=True)
                writer = self._writers[name] = ShardWriter(
                    folder,
                    vocab_size=self.tokenizer.vocab_size,
                    shard_tokens=self.config.tokens.shard_tokens,
                    part=self.part,
                )
            counts = self.counts[name]
            rate = self.config.tokens.fim_rate
            for encoded in self._encoder.encode(documents, source=name):
                writer.add(encoded.ids, name=encoded.name)
                counts["tokens"] += len(encoded.ids)
                counts["fim_documents"] += bool(rate) and encoded.ids[1] == self.tokenizer.fim_begin_id
        self._waiting, self._characters = {}, 0


class Finish(_Stage):
    """Adds up all accounts and makes the folder a corpus."""

    name = "finish"

    def work(self, task: int) -> None:  # noqa: ARG002
        """Do one task."""
        finish(self.config, folder=self.folder, tasks=self.tasks)
