"""Token shards: files of ids and the place of each document, read through memory maps, so that they may outgrow memory.

    shard-00000.bin             ids of all its documents end to end, two bytes each, or four for a large vocabulary
    shard-00000.offsets.npy     where each document begins, and at the end the number of ids
    shard-00000.names.jsonl     name of each document, for error messages

The .bin file is written last: a shard that has one is whole.
"""

import json
from collections.abc import Iterator
from functools import cached_property
from itertools import islice
from pathlib import Path

import numpy as np
from jaxtyping import Int, Shaped
from numpy import ndarray

from dsv3.errors import DataError
from dsv3.runtime.atomic import whole_file


def token_dtype(vocab_size: int) -> str:
    """Return the narrowest type that holds every id."""
    return "uint16" if vocab_size <= 2**16 else "uint32"


def save_array(array: Shaped[ndarray, "..."], *, path: Path) -> None:
    """Write a .npy file, whole or not at all."""
    with whole_file(path) as file:
        np.save(file, array, allow_pickle=False)


class ShardWriter:
    """Collects documents and writes a shard whenever there are enough tokens; holds one shard in memory.

    Whole shards that an earlier, interrupted writer left in the folder are kept: `num_documents` says how many
    documents they hold, and writing goes on after them. Several writers may share a folder, each with a `part` of its
    own, which begins the names of its shards and so decides their order.
    """

    def __init__(self, folder: Path, *, vocab_size: int, shard_tokens: int, part: str = "") -> None:
        self.folder = folder
        self.part = part
        whole = [Shard(file, vocab_size=vocab_size) for file in shard_files(folder, part=part)]
        self.num_shards = len(whole)
        self.num_documents = sum(shard.num_documents for shard in whole)
        self._dtype = token_dtype(vocab_size)
        self._shard_tokens = shard_tokens
        self._documents: list[Int[ndarray, " token"]] = []
        self._names: list[str] = []
        self._collected = 0

    def add(self, ids: list[int], *, name: str) -> None:
        """Append one document."""
        self._documents.append(np.asarray(ids, dtype=self._dtype))
        self._names.append(name)
        self._collected += len(ids)
        self.num_documents += 1
        if self._collected >= self._shard_tokens:
            self.flush()

    def flush(self) -> None:
        """Write what has been collected as a shard; nothing when nothing has."""
        if not self._documents:
            return
        stem = f"shard-{self.part}{self.num_shards:05d}"
        offsets = np.cumsum([0] + [len(document) for document in self._documents], dtype=np.int64)
        with whole_file(self.folder / f"{stem}.names.jsonl") as file:
            file.writelines(json.dumps(name).encode() + b"\n" for name in self._names)
        save_array(offsets, path=self.folder / f"{stem}.offsets.npy")
        with whole_file(self.folder / f"{stem}.bin") as file:
            for document in self._documents:
                file.write(document.data)
        self.num_shards += 1
        self._documents, self._names, self._collected = [], [], 0


class Shard:
    """One shard, opened when first read."""

    def __init__(self, file: Path, *, vocab_size: int) -> None:
        self.file = file
        self._dtype = np.dtype(token_dtype(vocab_size))

    @cached_property
    def offsets(self) -> Int[ndarray, " document_plus_one"]:
        """Where each document begins, and at the end the number of tokens."""
        return load_array(self.file.with_suffix(".offsets.npy"))

    @cached_property
    def tokens(self) -> Shaped[ndarray, " token"]:
        """Ids of all documents, mapped, not read.

        Raises:
            DataError: the file is missing, or has another length than its offsets say.
        """
        expected = int(self.offsets[-1]) * self._dtype.itemsize
        found = self.file.stat().st_size if self.file.is_file() else None
        if found != expected:
            state = "is missing" if found is None else f"has {found:,} bytes"
            raise DataError(
                f"token shard {self.file} {state}, where {expected:,} bytes are expected; "
                "remove the corpus folder and prepare it again"
            )
        return np.memmap(self.file, dtype=self._dtype, mode="r")

    @property
    def num_documents(self) -> int:
        """Documents."""
        return len(self.offsets) - 1

    def document_name(self, document: int) -> str:
        """Return the name of a document; reads the list of names up to it.

        Raises:
            DataError: the list is missing or damaged.
        """
        names = self.file.with_suffix(".names.jsonl")
        try:
            with names.open(encoding="utf-8") as lines:
                return json.loads(next(islice(lines, document, None), ""))
        except (OSError, ValueError) as error:
            raise DataError(
                f"cannot read the name of document {document} in {names} ({type(error).__name__}: {error}); "
                "remove the corpus folder and prepare it again"
            ) from error


def shard_files(folder: Path, *, part: str = "") -> Iterator[Path]:
    """Yield the shards of a source in order, or those of one part of it."""
    yield from sorted(folder.glob(f"shard-{part}*.bin"))


def load_array(path: Path) -> Shaped[ndarray, "..."]:
    """Map a .npy file.

    Raises:
        DataError: it is missing or damaged.
    """
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(
            f"cannot read {path} ({type(error).__name__}: {error}); remove the corpus folder and prepare it again"
        ) from error
