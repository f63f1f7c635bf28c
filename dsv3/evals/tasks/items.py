"""The items of a benchmark's file, one a line, each of which can say what is wrong with it and where it stands."""

import gzip
import json
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from dsv3.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Item:
    """One line of a file, as a table of names and values."""

    values: Mapping[str, Any]
    path: Path
    line: int
    id: str
    """Unique in its file: what the file calls it, or else its line."""

    def text(self, key: str) -> str:
        """Return a text that is there and not empty."""
        found = self.values.get(key)
        if not isinstance(found, str) or not found.strip():
            raise self.broken(f"'{key}' should be a text; it is {shown(found)}")
        return found

    def texts(self, key: str, *, at_least: int = 1) -> tuple[str, ...]:
        """Return a list of texts, of which none is empty."""
        found = self.values.get(key)
        if not isinstance(found, list) or len(found) < at_least or not all(isinstance(x, str) and x for x in found):
            raise self.broken(f"'{key}' should be {at_least} or more texts; it is {shown(found)}")
        return tuple(found)

    def place(self, key: str, *, among: int) -> int:
        """Return the place of the right one among so many choices."""
        found = self.values.get(key)
        if not isinstance(found, int) or isinstance(found, bool) or not 0 <= found < among:
            raise self.broken(
                f"'{key}' should be 0 to {among - 1}, for there are {among} choices; it is {shown(found)}"
            )
        return found

    def broken(self, what: str) -> DataError:
        """Return the error that says where this item is and what is wrong with it."""
        return DataError(f"{self.path}, line {self.line}, item '{self.id}': {what}")


def read_items(path: Path, *, id_key: str | None = None) -> Iterator[Item]:
    """Read a gzipped file of JSON lines.

    Raises:
        DataError: the file is missing, empty or no gzip; a line is no JSON object; two items have one id.
    """
    seen: dict[str, int] = {}
    for line, text in enumerate(_lines(path), start=1):
        try:
            values = json.loads(text)
        except ValueError as error:
            raise DataError(f"{path}, line {line}: this is no JSON ({error})") from error
        if not isinstance(values, dict):
            raise DataError(f"{path}, line {line}: a table of names and values should be here; it is {shown(values)}")
        named = str(line) if id_key is None else values.get(id_key)
        if not isinstance(named, str | int) or named == "":
            raise DataError(f"{path}, line {line}: '{id_key}' should name the item; it is {shown(named)}")
        if (first := seen.setdefault(str(named), line)) != line:
            raise DataError(f"{path}, line {line}: item '{named}' stands in line {first} already")
        yield Item(values=values, path=path, line=line, id=str(named))
    if not seen:
        raise DataError(f"{path} is empty")


def first_items(path: Path, *, count: int, id_key: str | None = None) -> list[Item]:
    """Return the first items of a file, which are to be worked examples.

    Raises:
        DataError: there are fewer, and as `read_items`.
    """
    found = list(islice(read_items(path, id_key=id_key), count))
    if len(found) < count:
        raise DataError(f"{path}: {count} worked examples are wanted, and it has {len(found)} items")
    return found


def shown(value: Any) -> str:
    """Return a value as it can stand in a message."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _lines(path: Path) -> Iterator[str]:
    try:
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            yield from lines
    except FileNotFoundError as error:
        raise DataError(f"there is no {path}; --data takes the folder that '{path.parent.name}' lies in") from error
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read to its end as gzipped UTF-8: {error}") from error
