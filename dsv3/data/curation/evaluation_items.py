"""Items of evaluations in a text: so many words in a row of one, a short one whole, a shorter one as a line."""

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
from dsv3.data.shards import load_array, save_array
from dsv3.errors import DataError
from dsv3.runtime.atomic import write_json

LONGEST_LINE = 400
"""Characters; a longer line is no item of a few words."""
FOLDER = "evaluation"
"""Below the work folder: what is looked for, made once for all tasks."""


@dataclass(frozen=True, kw_only=True)
class EvaluationItem:
    """What is asked in an evaluation."""

    set: str
    text: str


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


def write_tables(items: Iterable[EvaluationItem], *, folder: Path, config: ContaminationConfig) -> int:
    """Make the tables in which `ItemFinder` looks, below a work folder, and return how many items they hold."""
    place = folder / FOLDER
    place.mkdir(parents=True, exist_ok=True)
    counter, count = WordCounter(), 0
    numbers: dict[str, int] = {}
    lines: dict[str, int] = {}
    rows: dict[int, list[tuple[UInt64[ndarray, " row"], int]]] = defaultdict(list)
    for item in items:
        words = counter.words(item.text)
        size = min(config.words, len(words))
        if size < config.min_line_words:
            continue
        count += 1
        number = numbers.setdefault(item.set, len(numbers))
        rows[size].append((words.rows(size), number))
        if size < min(config.min_exact_words, config.words):
            lines.setdefault(" ".join(words.words), number)
    for size, parts in rows.items():
        hashes = np.concatenate([found for found, _ in parts])
        sets = np.concatenate([np.full(len(found), number, dtype=np.uint64) for found, number in parts])
        known, first = np.unique(hashes, return_index=True)
        save_array(np.stack([known, sets[first]]), path=place / f"{size:03d}.npy")
    write_json({"sets": list(numbers), "sizes": sorted(rows, reverse=True), "lines": lines}, path=place / "items.json")
    return count


class ItemFinder:
    """Finds items in texts."""

    def __init__(self, folder: Path, *, config: ContaminationConfig) -> None:
        """Open the tables of a work folder; without any, nothing is found."""
        self.config = config
        self._counter = WordCounter()
        self._tables: dict[int, RowTable] = {}
        place = folder / FOLDER
        if config.enabled and (place / "items.json").is_file():
            about = json.loads((place / "items.json").read_text(encoding="utf-8"))
            self._sets: list[str] = about["sets"]
            self._lines: dict[str, int] = about["lines"]
            self._tables = {size: RowTable(load_array(place / f"{size:03d}.npy")) for size in about["sizes"]}

    def __bool__(self) -> bool:
        return bool(self._tables)

    def find(self, text: str, *, words: Words) -> str:
        """Return the set of an item that a text has; '' where it has none."""
        for size, table in self._tables.items():
            number = table.find(words.rows(size))
            if number is not None and size < min(self.config.min_exact_words, self.config.words):
                number = self._line(text)
            if number is not None:
                return self._sets[number]
        return ""

    def _line(self, text: str) -> int | None:
        for line in text.split("\n"):
            if 3 < len(line) < LONGEST_LINE:
                number = self._lines.get(" ".join(self._counter.words(line).words))
                if number is not None:
                    return number
        return None


class RowTable:
    """Hashes of words in a row, and the set that each is of."""

    def __init__(self, table: UInt64[ndarray, "2 row"]) -> None:
        self._known, self._sets = table[0], table[1]
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
