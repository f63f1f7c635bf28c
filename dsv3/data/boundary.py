"""Random splitting of tokens that join punctuation and line breaks (report 4.1, 'token boundary bias').

The pre-tokeniser keeps ").\\n" together. A prompt that ends in ")." without the line break was then never seen in
training; splitting some of these tokens shows the model both.
"""

import unicodedata

import numpy as np

from dsv3.data.chance import hash_parts
from dsv3.data.tokenizer import Tokenizer


class BoundarySplitter:
    """Replaces a share of the combined tokens by their punctuation and their line breaks. The text stays the same."""

    def __init__(self, tokenizer: Tokenizer, *, rate: float, seed: int) -> None:
        self.rate = rate
        self.seed = seed
        self.parts = combined_tokens(tokenizer)
        self._is_combined = np.zeros(tokenizer.vocab_size, dtype=bool)
        self._is_combined[list(self.parts)] = True

    def split(self, ids: list[int], *, document: str) -> list[int]:
        """Split each combined token with probability `rate`, by the seed and the name of the document alone."""
        places = np.flatnonzero(self._is_combined[np.asarray(ids, dtype=np.int64)])
        if not self.rate or not len(places):
            return ids
        generator = np.random.default_rng(hash_parts("boundary", self.seed, document))
        chosen = places[generator.random(len(places)) < self.rate]
        split: list[int] = []
        done = 0
        for place in chosen.tolist():
            split += ids[done:place]
            split += self.parts[ids[place]]
            done = place + 1
        return split + ids[done:]


def combined_tokens(tokenizer: Tokenizer) -> dict[int, list[int]]:
    """Return the ids that are a run of punctuation followed by line breaks, each with the ids of its two parts."""
    combined = {}
    for token in range(tokenizer.vocab_size):
        try:
            text = tokenizer.token_bytes(token).decode("utf-8")
        except UnicodeDecodeError:
            continue
        marks = text.rstrip("\r\n")
        run = marks.removeprefix(" ")
        if run and marks != text and all(unicodedata.category(character)[0] in "PS" for character in run):
            combined[token] = tokenizer.encode(marks) + tokenizer.encode(text[len(marks) :])
    return combined
