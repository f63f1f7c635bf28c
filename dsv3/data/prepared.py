"""A prepared corpus on disk, and what it says of itself.

    corpus.json                 written last: without it the folder is unfinished and does not load
    tokenizer/                  tokenizer.json, tokenizer_config.json
    sources/00-NAME/            token shards, packed rows, held_out.jsonl

Nothing in it is pickled.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dsv3.data.document import Remark
from dsv3.data.tokenizer import Tokenizer
from dsv3.errors import DataError
from dsv3.runtime.atomic import write_json

MARKER = "corpus.json"
HELD_OUT = "held_out.jsonl"
FORMAT = 1
"""Raised when the files change their meaning; an older corpus is then refused, not misread."""


@dataclass(frozen=True, kw_only=True)
class PreparedSource:
    """One source as it was read, and where its files are."""

    name: str
    path: str
    """As configured: a path, hf://NAME or builtin://NAME."""
    folder: str
    """Its folder below the corpus folder, or, of a corpus that lies elsewhere, where that is."""
    documents: int
    """Documents trained on."""
    bytes: int
    """Bytes of their text as UTF-8."""
    tokens: int
    """Tokens of their sequences, BOS, EOS and FIM tokens included."""
    fim_documents: int
    """Documents rearranged for fill-in-the-middle."""
    held_out_documents: int
    held_out_bytes: int
    duplicates: int
    """Documents dropped because the same text had come before, in this source or an earlier one."""
    skipped: tuple[Remark, ...]
    """Files, lines and documents that are not in the corpus, by reason."""
    changed: tuple[Remark, ...]
    """Those that are, but not byte for byte, by reason."""
    domain: str = ""
    """Of a corpus of `dsv3 data prepare`, by which `data.mixture` weighs it."""


@dataclass(frozen=True, kw_only=True)
class AbsentSource:
    """A built-in source left out because its package is not installed."""

    name: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class PreparedCorpus:
    """What `prepare_corpus` leaves behind and the loader reads."""

    folder: Path
    vocab_size: int
    """Ids the tokenizer uses."""
    sources: tuple[PreparedSource, ...]
    absent: tuple[AbsentSource, ...]
    settings: dict[str, Any]
    """The settings it was made with; other settings are refused."""

    @property
    def tokenizer_folder(self) -> Path:
        """Holds tokenizer.json and tokenizer_config.json."""
        return self.folder / "tokenizer"

    def tokenizer(self) -> Tokenizer:
        """Return the tokenizer of this corpus."""
        return Tokenizer.from_file(self.tokenizer_folder)

    def source_folder(self, source: PreparedSource) -> Path:
        """Return the folder with the shards of a source."""
        return self.folder / source.folder

    def held_out(self, source: PreparedSource | str) -> list[str]:
        """Return the texts of a source that are never trained on; a source may also be given by its name.

        Raises:
            DataError: there is no such source, or its file is damaged.
        """
        wanted = source if isinstance(source, str) else source.name
        found = next((each for each in self.sources if each.name == wanted), None)
        if found is None:
            names = ", ".join(f"'{each.name}'" for each in self.sources)
            raise DataError(f"the corpus has no source '{wanted}'; its sources are {names}")
        file = self.source_folder(found) / HELD_OUT
        try:
            with file.open(encoding="utf-8") as lines:
                return [json.loads(line)["text"] for line in lines]
        except (OSError, ValueError, KeyError) as error:
            raise DataError(f"cannot read held-out texts from {file} ({error}); prepare the corpus again") from error


def save_prepared(corpus: PreparedCorpus) -> None:
    """Write the marker that makes the folder a finished corpus."""
    values = {
        "format": FORMAT,
        "vocab_size": corpus.vocab_size,
        "sources": [asdict(source) for source in corpus.sources],
        "absent": [asdict(source) for source in corpus.absent],
        "settings": corpus.settings,
    }
    write_json(values, path=corpus.folder / MARKER)


def load_prepared(folder: Path | str) -> PreparedCorpus:
    """Read what a prepared corpus says of itself; shards are opened when rows are asked for.

    Raises:
        DataError: the folder holds no finished corpus, or one of another version.
    """
    folder = Path(folder)
    marker = folder / MARKER
    if not marker.is_file():
        raise DataError(
            f"no finished corpus at {folder} ({MARKER} is missing); prepare it, or run the same command again"
        )
    try:
        values = json.loads(marker.read_text(encoding="utf-8"))
        if values["format"] != FORMAT:
            raise DataError(
                f"the corpus at {folder} has format {values['format']}, and this version reads {FORMAT}; "
                "remove the folder and prepare it again"
            )
        return PreparedCorpus(
            folder=folder,
            vocab_size=values["vocab_size"],
            sources=tuple(_source(source) for source in values["sources"]),
            absent=tuple(AbsentSource(**source) for source in values["absent"]),
            settings=values["settings"],
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"cannot read {marker} ({type(error).__name__}: {error}); remove the corpus folder and prepare it again"
        ) from error


def _source(values: dict[str, Any]) -> PreparedSource:
    remarks = {
        field: tuple(Remark(**{**remark, "examples": tuple(remark["examples"])}) for remark in values[field])
        for field in ("skipped", "changed")
    }
    return PreparedSource(**{**values, **remarks})
