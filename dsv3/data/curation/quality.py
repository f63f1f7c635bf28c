"""Why a text is not worth training on: rules like those of Gopher, C4 and FineWeb, each for what it is meant for.

Code is held to rules for code; mathematics is spared those that count signs. All n-gram rules work on numbers of words.
"""

import re
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Int, UInt64
from numpy import ndarray

from dsv3.config.curation import QualityConfig
from dsv3.data.curation.domain import CHINESE_LANGUAGES
from dsv3.data.curation.kinds import CODE, MATHS, WEB
from dsv3.data.curation.words import Words

STOP_WORDS = frozenset(("the", "be", "to", "of", "and", "that", "have", "with"))
"""Gopher's."""
LETTER = re.compile(r"[^\W\d_]")
LINE_ENDS = tuple(".!?:;\"'”’)]}>。！？：；」』）…،؟।")
BULLETS = ("•", "-", "*", "●", "▪", "–")
ELLIPSES = ("...", "…")
SHORT_LINE = 30
CHARACTER_LANGUAGES = (*CHINESE_LANGUAGES, "ja", "ko")
"""Where each character counts as a word."""
CHARACTERS_OF_A_WORD = 2
"""In those: what they have in a row is said in half as many words."""
UNSPACED_LANGUAGES = (*CHARACTER_LANGUAGES, "th", "lo", "km", "my", "bo", "dz")
"""Where that is so, or words are not set apart."""
DIGITS = "0123456789"


class Judge:
    """Says why a text is dropped."""

    def __init__(self, config: QualityConfig) -> None:
        self.config = config
        self._forbidden = tuple(phrase.lower() for phrase in config.forbidden)
        self._policy = re.compile("|".join(map(re.escape, config.policy_lines)), re.IGNORECASE)

    def without_policies(self, text: str) -> str:
        """Return the text of a web page without its lines on terms and cookies (C4)."""
        if not self.config.policy_lines or not self._policy.search(text):
            return text
        return "\n".join(line for line in text.split("\n") if not (len(line) < 500 and self._policy.search(line)))

    def why_not(self, text: str, *, words: Words, kind: str, language: str) -> str:
        """Return the first rule that a text breaks; '' where it is good."""
        if kind == CODE:
            return self._code(text)
        reason = self._words(text, words=words, kind=kind, language=language)
        if reason := reason or self._lines(text, kind=kind):
            return reason
        scale = CHARACTERS_OF_A_WORD if language in CHARACTER_LANGUAGES else 1
        return self._repetition(text, words=words, scale=scale, is_maths=kind == MATHS)

    def _code(self, text: str) -> str:
        config = self.config
        lines = text.split("\n")
        longest = sorted(map(len, lines), reverse=True)[:10]
        if sum(longest) / len(longest) > config.max_code_line:
            return "code: lines too long"
        seen = text[:100_000]
        if sum(map(str.isalnum, seen)) < config.min_code_letters * len(seen):
            return "code: too few letters"
        return ""

    def _words(self, text: str, *, words: Words, kind: str, language: str) -> str:
        config, count = self.config, len(words)
        if count < config.min_words:
            return "too few words (Gopher)"
        if count > config.max_words:
            return "too many words (Gopher)"
        if language not in UNSPACED_LANGUAGES:
            mean = float(words.lengths.mean())
            if not config.min_mean_word_length <= mean <= config.max_mean_word_length and kind != MATHS:
                return "mean length of words (Gopher)"
        marks = text.count("#") + text.count("...") + text.count("…")
        if marks > config.max_symbol_ratio * count and kind != MATHS:
            return "number signs and ellipses (Gopher)"
        if kind != MATHS and sum(map(text.count, DIGITS)) > config.max_digits * len(text):
            return "too many digits"
        between_spaces = words.words if language in CHARACTER_LANGUAGES else text[:100_000].split()
        if kind != MATHS and _letter_share(between_spaces) < config.min_letter_words:
            return "words without a letter (Gopher)"
        if language == "en" and kind != MATHS and len(STOP_WORDS.intersection(words.words)) < config.min_stop_words:
            return "no stop words (Gopher)"
        if self._forbidden and any(phrase in text.lower() for phrase in self._forbidden):
            return "forbidden phrase (C4)"
        return ""

    def _lines(self, text: str, *, kind: str) -> str:
        config = self.config
        lines = [stripped for line in text.split("\n") if (stripped := line.strip())]
        if not lines:
            return "empty"
        count = len(lines)
        if sum(line.startswith(BULLETS) for line in lines) > config.max_bullet_lines * count and count > 3:
            return "bullets (Gopher)"
        if sum(line.endswith(ELLIPSES) for line in lines) > config.max_ellipsis_lines * count:
            return "lines that end in an ellipsis (Gopher)"
        repeated = _Repeated(lines)
        if repeated.count > config.max_repeated_lines * count:
            return "repeated lines (Gopher)"
        if repeated.characters > config.max_repeated_line_characters * len(text):
            return "repeated lines, by characters (Gopher)"
        if kind != WEB:
            return ""
        if sum(line.endswith(LINE_ENDS) for line in lines) < config.min_line_ends * count:
            return "lines without a mark at their end (FineWeb)"
        if sum(len(line) <= SHORT_LINE for line in lines) > config.max_short_lines * count and count > 3:
            return "short lines (FineWeb)"
        return ""

    def _repetition(self, text: str, *, words: Words, scale: int, is_maths: bool) -> str:
        """Look for n-grams of `scale` times as many words as the limits are for."""
        characters = len(text) * (self.config.maths_repetition if is_maths else 1)
        rows = words.rows_by_size(10 * scale)
        for size, share in zip((2, 3, 4), self.config.max_top_ngram, strict=True):
            top = top_characters(rows[size * scale], size=size * scale, lengths=words.lengths)
            if top > share * characters:
                return f"most frequent {size}-gram (Gopher)"
            if not top:  # Where no pair is there twice, nothing longer is.
                return ""
        least = min(self.config.max_repeated_ngram) * characters
        for size, share in zip(range(5, 11), self.config.max_repeated_ngram, strict=True):
            repeated = repeated_words(rows[size * scale], size=size * scale, count=len(words))
            covered = int(words.lengths[repeated].sum())
            if covered > share * characters:
                return f"repeated {size}-grams (Gopher)"
            if covered <= least:  # What longer ones cover, shorter ones do.
                return ""
        return ""


class _Repeated:
    """Lines that were there before."""

    def __init__(self, lines: list[str]) -> None:
        self._lines = lines
        self.count = len(lines) - len(set(lines))

    @cached_property
    def characters(self) -> int:
        """Of those lines."""
        return sum(map(len, self._lines)) - sum(map(len, set(self._lines))) if self.count else 0


def _letter_share(found: list[str]) -> float:
    """Return the share of what stands between spaces that has a letter."""
    return sum(1 for one in found if LETTER.search(one)) / max(len(found), 1)


def top_characters(rows: UInt64[ndarray, " row"], *, size: int, lengths: Int[ndarray, " word"]) -> int:
    """Return the characters of all occurrences of the most frequent n-gram; 0 where none is there twice."""
    if len(rows) < 2:
        return 0
    order = np.argsort(rows, kind="stable")
    ordered = rows[order]
    starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
    counts = np.diff(np.append(starts, len(rows)))
    most = int(counts.max())
    if most == 1:
        return 0
    places = order[starts[counts == most]]
    return most * int(sum(lengths[places + offset] for offset in range(size)).max())


def repeated_words(rows: UInt64[ndarray, " row"], *, size: int, count: int) -> Bool[ndarray, " word"]:
    """Return which words lie in an n-gram that was there before."""
    covered = np.zeros(count, dtype=bool)
    if len(rows) < 2:
        return covered
    order = np.argsort(rows, kind="stable")
    same = rows[order[1:]] == rows[order[:-1]]
    later = order[1:][same]
    for offset in range(size):
        covered[later + offset] = True
    return covered
