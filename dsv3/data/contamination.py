"""Whether a text has been seen in an evaluation: 13 words in a row, or a whole question.

Words are runs of letters and digits, in lower case; of scripts without spaces each character is one. What is compared
whole keeps its signs, so that 3 - 4 is not 3 + 4.
"""

import json
import re
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dsv3.data.chance import hash_parts
from dsv3.errors import DataError

WORDS_IN_A_ROW = 13
"""The customary length, since GPT-3."""
_UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af"
WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")
WHOLE, IN_A_ROW = "whole", "in a row"


class Exclusions:
    """The texts of evaluation files."""

    def __init__(self, files: Sequence[str]) -> None:
        """Read files: of JSON lines every text in them, of others the lines, and words in a row across them.

        Raises:
            DataError: one cannot be read, or has no text.
        """
        self._whole: dict[str, set[int]] = {}
        self._rows: dict[str, set[int]] = {}
        for file in files:
            texts, wholes = texts_of(file)
            self._whole[file] = {hash_parts(same) for text in wholes if (same := normalised(text))}
            self._rows[file] = {row for text in texts for row in rows_of(text)}
            if not self._whole[file]:
                raise DataError(f"{file} has no text that could be left out")

    def with_question(self, texts: Sequence[str]) -> dict[str, str]:
        """Return the files that have one of the texts of a question, and whether 'whole' or only 'in a row'."""
        wholes = {hash_parts(same) for text in texts if (same := normalised(text))}
        found = {file: WHOLE for file, known in self._whole.items() if known & wholes}
        return dict.fromkeys(self.with_answer("\n".join(texts)), IN_A_ROW) | found

    def with_answer(self, text: str) -> list[str]:
        """Return the files that share words in a row with an answer; that one has a short answer whole says nothing."""
        rows = rows_of(text) if self._rows else set()
        return [file for file, known in self._rows.items() if not known.isdisjoint(rows)]


def normalised(text: str) -> str:
    """Return a text in lower case and composed form, its spaces as one, without the sign that ends it."""
    return " ".join(unicodedata.normalize("NFKC", text).lower().split()).rstrip(".?!:; ")


def rows_of(text: str) -> set[int]:
    """Return the hashes of all words in a row."""
    words = WORD.findall(unicodedata.normalize("NFKC", text).lower())
    return {hash_parts(*words[place : place + WORDS_IN_A_ROW]) for place in range(len(words) - WORDS_IN_A_ROW + 1)}


def texts_of(file: str) -> tuple[list[str], list[str]]:
    """Return what is looked through for words in a row, and what is compared whole."""
    try:
        text = Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"cannot read {file} ({type(error).__name__}: {error}); evaluations are text in UTF-8, or JSON lines"
        ) from error
    lines = text.split("\n")  # splitlines() also splits at separators of Unicode, and so within JSON.
    if Path(file).suffix.lower() != ".jsonl":
        return [text], lines
    found: list[str] = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                found += _leaves(json.loads(line))
            except ValueError as error:
                raise DataError(f"{file}, line {number} is no JSON ({error})") from error
    return found, found


def _leaves(value: Any) -> Iterator[str]:
    """Yield every text of a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _leaves(one)
