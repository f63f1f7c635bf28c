"""Items of evaluations in a text: so many words in a row of one, a short one whole, a shorter one as a line."""

import gzip
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import UInt64
from numpy import ndarray

from dsv3.config.curation import ContaminationConfig
from dsv3.data.contamination import texts_of
from dsv3.data.curation.words import WordCounter, Words
from dsv3.errors import DataError
from dsv3.runtime.atomic import whole_file

ITEMS = "evaluation_items.jsonl.gz"


@dataclass(frozen=True, kw_only=True)
class EvaluationItem:
    """What is asked in an evaluation."""

    set: str
    text: str


def write_items(items: Iterable[EvaluationItem], *, folder: Path) -> int:
    """Keep the items beside the corpus they are not to be in, each once, and return how many there are."""
    count, seen = 0, set()
    with whole_file(folder / ITEMS) as stored, gzip.GzipFile(fileobj=stored, mode="wb", mtime=0) as file:
        for item in items:
            if (item.set, item.text) not in seen:
                seen.add((item.set, item.text))
                file.write(json.dumps([item.set, item.text]).encode() + b"\n")
                count += 1
    return count


def read_items(folder: Path) -> Iterator[EvaluationItem]:
    """Yield the items that `write_items` kept; none where there is no file."""
    if (folder / ITEMS).is_file():
        with gzip.open(folder / ITEMS, "rt", encoding="utf-8") as lines:
            for line in lines:
                name, text = json.loads(line)
                yield EvaluationItem(set=name, text=text)


def items_of_file(path: Path) -> Iterator[EvaluationItem]:
    """Yield the items of a file of your own: of JSON lines every text of each, of others the lines.

    Raises:
        DataError: it cannot be read, or has no item.
    """
    texts, wholes = texts_of(str(path))
    found = [text for text in dict.fromkeys((*texts, *wholes)) if text.strip()]
    if not found:
        raise DataError(f"{path} has no text that could be left out")
    for text in found:
        yield EvaluationItem(set=path.name, text=text)


class ItemFinder:
    """Finds items in texts."""

    def __init__(self, items: Iterable[EvaluationItem], *, config: ContaminationConfig, counter: WordCounter) -> None:
        self.config = config
        self._counter = counter
        self._lines: dict[tuple[str, ...], int] = {}
        numbers: dict[str, int] = {}
        rows: dict[int, list[tuple[UInt64[ndarray, " row"], int]]] = defaultdict(list)
        for item in items:
            words = counter.words(item.text)
            size = min(config.words, len(words))
            if size < config.min_line_words:
                continue
            place = numbers.setdefault(item.set, len(numbers))
            rows[size].append((words.rows(size), place))
            if size < min(config.min_exact_words, config.words):
                self._lines.setdefault(tuple(words.words), place)
        self.sets = list(numbers)
        self._rows = {size: RowTable(parts) for size, parts in sorted(rows.items(), reverse=True)}

    def __bool__(self) -> bool:
        return bool(self._rows)

    def find(self, text: str, *, words: Words) -> str:
        """Return the set of an item that a text has; '' where it has none."""
        for size, table in self._rows.items():
            place = table.find(words.rows(size))
            if place is not None and size < min(self.config.min_exact_words, self.config.words):
                place = self._line(text)
            if place is not None:
                return self.sets[place]
        return ""

    def _line(self, text: str) -> int | None:
        for line in text.split("\n"):
            if 3 < len(line) < 400:
                place = self._lines.get(tuple(self._counter.words(line).words))
                if place is not None:
                    return place
        return None


class RowTable:
    """Hashes of words in a row, and the set that each is of."""

    def __init__(self, parts: list[tuple[UInt64[ndarray, " row"], int]]) -> None:
        hashes = np.concatenate([rows for rows, _ in parts])
        sets = np.concatenate([np.full(len(rows), place) for rows, place in parts])
        self._known, first = np.unique(hashes, return_index=True)
        self._sets = sets[first]
        # Nearly all rows of a text are unknown; a look at one byte says so without a search.
        self._mask = np.uint64((1 << max((16 * len(self._known)).bit_length(), 10)) - 1)
        self._marks = np.zeros(int(self._mask) + 1, dtype=bool)
        self._marks[(self._known & self._mask).astype(np.int64)] = True

    def find(self, rows: UInt64[ndarray, " row"]) -> int | None:
        """Return the set of the first row that is known."""
        marked = rows[self._marks[(rows & self._mask).astype(np.int64)]]
        places = np.searchsorted(self._known, marked)
        places[places == len(self._known)] = 0
        hits = np.flatnonzero(self._known[places] == marked)
        return int(self._sets[places[hits[0]]]) if len(hits) else None
