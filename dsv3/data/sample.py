"""The texts a tokenizer is trained on: a few megabytes, drawn from the sources by weight."""

import heapq
from collections.abc import Iterable

from dsv3.data.chance import hash_parts
from dsv3.data.document import Document

SAMPLE_CHARACTERS = 8_000_000
"""Enough for stable merges of a small vocabulary, and trained on in seconds."""
EXCERPT_CHARACTERS = 32_768
"""At most this much of one document, so that a long one does not stand for its whole source."""


def sample_texts(documents: Iterable[Document], *, characters: int, seed: int) -> list[str]:
    """Return excerpts of documents drawn by hash, about `characters` in all, in the order of the hashes.

    One pass; only the sample is held in memory. The choice depends on names and the seed, not on the order of
    the documents.
    """
    kept: list[tuple[int, str]] = []  # A heap whose first entry has the highest hash, negated.
    total = 0
    for document in documents:
        hashed = hash_parts("sample", seed, document.name)
        if total >= characters and -kept[0][0] <= hashed:
            continue
        text = _excerpt(document.text, hashed=hashed)
        heapq.heappush(kept, (-hashed, text))
        total += len(text)
        while len(kept) > 1 and total - len(kept[0][1]) >= characters:
            total -= len(heapq.heappop(kept)[1])
    return [text for _, text in sorted(kept, reverse=True)]


def _excerpt(text: str, *, hashed: int) -> str:
    if len(text) <= EXCERPT_CHARACTERS:
        return text
    start = hashed % (len(text) - EXCERPT_CHARACTERS)
    return text[start : start + EXCERPT_CHARACTERS]
