"""What simple predictors need for the same held-out text, in bits per byte: the numbers a model has to beat.

A model's bits per byte mean little alone: Shakespeare is harder than arithmetic. Beside it stand a unigram and an
n-gram over the very same tokens, trained on as many tokens as the model has read, and a general compressor. All of
them are complete probability distributions (or a working code), so the comparison is in the same unit with nothing
hidden.
"""

import lzma
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dsv3.errors import DataError

Tokens = npt.NDArray[np.int64]
Numbers = npt.NDArray[np.float64]

FALLBACK_DISCOUNT = 0.75
"""Used for every count where the counts of counts give no usable discounts: tiny or repetitive corpora."""


@dataclass(frozen=True, kw_only=True)
class UnigramModel:
    """Token frequencies with one added to every count."""

    probabilities: Numbers
    """Of each token of the vocabulary; they sum to 1."""
    training_tokens: int

    @classmethod
    def train(
        cls, sequences: Iterable[Sequence[int] | Tokens], *, vocab_size: int, max_tokens: int | None = None
    ) -> "UnigramModel":
        """Count the first `max_tokens` tokens of the sequences. The first token of each is counted too."""
        tokens = np.concatenate([np.empty(0, np.int64), *take_tokens(sequences, max_tokens=max_tokens)])
        check_vocabulary(tokens, vocab_size=vocab_size)
        counts = np.bincount(tokens, minlength=vocab_size) + 1.0
        return cls(probabilities=counts / counts.sum(), training_tokens=len(tokens))

    def bits(self, sequences: Iterable[Sequence[int] | Tokens]) -> float:
        """Return the bits that all tokens but the first of each sequence cost; the first is context."""
        predicted = [np.asarray(sequence, np.int64)[1:] for sequence in sequences]
        return float(-np.log2(self.probabilities[np.concatenate([np.empty(0, np.int64), *predicted])]).sum())


@dataclass(frozen=True, kw_only=True)
class GramTable:
    """All n-grams of one length: how often, and how their contexts were continued.

    An n-gram is coded as `id of its context * vocab_size + its last token`, where the context is an n-gram one
    shorter with its place in that table as id. So any length fits into 64 bits.
    """

    codes: Tokens
    """Sorted and distinct; the position of an n-gram here is its id."""
    numerators: Numbers
    """Count of each n-gram less its discount. Below the highest order, counts are of distinct left neighbours."""
    totals: Numbers
    """For each context: the sum of the counts of the n-grams it begins. Zero for a context never continued."""
    leftover: Numbers
    """For each context: the probability mass that discounting frees, and that the shorter n-grams share out."""


@dataclass(frozen=True, kw_only=True)
class NgramModel:
    """Interpolated modified Kneser-Ney over tokens, the strongest n-gram model without neural parts.

    Each order discounts the counts it has seen by one of three amounts (for counts 1, 2 and more) and gives the
    freed mass to the next shorter context; below the highest order a count is the number of different tokens seen
    before the n-gram. The shortest context interpolates with the uniform distribution, so that every token of the
    vocabulary has a probability and all sum to 1.

    Source: Chen and Goodman (1999), "An empirical study of smoothing techniques", 3.1, with discounts of eq. 17.
    """

    tables: tuple[GramTable, ...]
    """Orders 1, 2, ... up to the highest."""
    vocab_size: int
    training_tokens: int

    @property
    def order(self) -> int:
        """Length of the longest n-grams: the token predicted and those it is predicted from."""
        return len(self.tables)

    @classmethod
    def train(
        cls,
        sequences: Iterable[Sequence[int] | Tokens],
        *,
        vocab_size: int,
        order: int = 3,
        max_tokens: int | None = None,
    ) -> "NgramModel":
        """Count the n-grams within each of the sequences, up to `max_tokens` tokens in all.

        The first token of a sequence (as a rule the begin-of-text token) is repeated to its left, so that the
        beginning of a text has contexts of full length too.
        """
        pieces = take_tokens(sequences, max_tokens=max_tokens)
        stream, predicted = pad_starts(pieces, order=order)
        check_vocabulary(stream, vocab_size=vocab_size)
        # ids[k][i]: the id of the k-gram that ends at place i of the stream, or -1 where it would begin before it.
        ids: list[Tokens] = [np.zeros(len(stream), np.int64)]
        codes: list[Tokens] = []
        for length in range(1, order + 1):
            context = shift(ids[-1]) if length > 1 else ids[0]
            code = np.where(context >= 0, context * vocab_size + stream, -1)
            known = np.unique(code[code >= 0])
            codes.append(known)
            ids.append(np.where(code >= 0, np.searchsorted(known, code), -1))
        tables: list[GramTable] = []
        counts = np.bincount(ids[order][predicted], minlength=len(codes[order - 1])).astype(np.float64)
        for length in range(order, 0, -1):
            num_contexts = len(codes[length - 2]) if length > 1 else 1
            tables.append(make_table(codes[length - 1], counts=counts, num_contexts=num_contexts, vocab=vocab_size))
            if length > 1:
                counts = count_left_neighbours(ids, length=length, predicted=predicted, num_shorter=num_contexts)
        return cls(
            tables=tuple(reversed(tables)), vocab_size=vocab_size, training_tokens=sum(len(piece) for piece in pieces)
        )

    def bits(self, sequences: Iterable[Sequence[int] | Tokens]) -> float:
        """Return the bits that all tokens but the first of each sequence cost; the first is context."""
        stream, predicted = pad_starts([np.asarray(sequence, np.int64) for sequence in sequences], order=self.order)
        return float(-np.log2(self.stream_probabilities(stream)[predicted]).sum())

    def probabilities(self, context: Sequence[int]) -> Numbers:
        """Return the probability of each token of the vocabulary after the context; they sum to 1.

        A context shorter than `order - 1` is used as it is, with the shorter n-grams alone.
        """
        kept = list(context)[len(context) - min(len(context), self.order - 1) :]
        rows = np.array([[*kept, token] for token in range(self.vocab_size)], np.int64)
        return self.stream_probabilities(rows.ravel(), longest=len(kept) + 1)[len(kept) :: len(kept) + 1]

    def stream_probabilities(self, stream: Tokens, *, longest: int | None = None) -> Numbers:
        """Return the probability of each place of a stream after the places before it, from n-grams up to `longest`."""
        probability = np.full(len(stream), 1.0 / self.vocab_size)
        context = np.zeros(len(stream), np.int64)  # id of the n-gram before each place; the empty one at first
        for table in self.tables[:longest]:
            has_context = context >= 0
            known = np.where(has_context, context, 0)
            code = np.where(has_context, known * self.vocab_size + stream, -1)
            place = np.minimum(np.searchsorted(table.codes, code), len(table.codes) - 1)
            found = table.codes[place] == code
            total = np.where(has_context, table.totals[known], 0.0)
            seen = total > 0
            discounted = np.where(found, table.numerators[place], 0.0) / np.where(seen, total, 1.0)
            probability = np.where(seen, discounted + table.leftover[known] * probability, probability)
            context = shift(np.where(found, place, -1))
        return probability


def make_table(codes: Tokens, *, counts: Numbers, num_contexts: int, vocab: int) -> GramTable:
    """Discount the counts of one order and give each context its total and the mass left over."""
    discounts = modified_discounts(counts)[np.minimum(counts, 3).astype(np.int64)]
    contexts = codes // vocab
    totals = np.bincount(contexts, weights=counts, minlength=num_contexts).astype(np.float64)
    freed = np.bincount(contexts, weights=discounts, minlength=num_contexts).astype(np.float64)
    leftover = np.divide(freed, totals, out=np.zeros(num_contexts), where=totals > 0)
    return GramTable(codes=codes, numerators=counts - discounts, totals=totals, leftover=leftover)


def modified_discounts(counts: Numbers) -> Numbers:
    """Return the discounts of counts 0, 1, 2 and 3-or-more, from how many n-grams have counts 1 to 4.

    Source: Chen and Goodman (1999), eq. 17. A discount may not exceed the count it is taken from; where the counts
    of counts are missing or odd (tiny corpora, repeated text), 0.75 is taken from every count.
    """
    of_count = [0.0, *(float((counts == number).sum()) for number in (1, 2, 3, 4))]
    plain = np.array([0.0, FALLBACK_DISCOUNT, FALLBACK_DISCOUNT, FALLBACK_DISCOUNT])
    if not all(of_count[1:]):
        return plain
    shared = of_count[1] / (of_count[1] + 2 * of_count[2])
    exact = [number - (number + 1) * shared * of_count[number + 1] / of_count[number] for number in (1, 2, 3)]
    if any(not 0 < discount <= number for number, discount in zip((1, 2, 3), exact, strict=True)):
        return plain
    return np.array([0.0, *exact])


def count_left_neighbours(ids: list[Tokens], *, length: int, predicted: Tokens, num_shorter: int) -> Numbers:
    """For each n-gram of `length - 1`: how many different tokens were seen to the left of it."""
    _, first = np.unique(ids[length][predicted], return_index=True)
    return np.bincount(ids[length - 1][predicted][first], minlength=num_shorter).astype(np.float64)


def shift(values: Tokens) -> Tokens:
    """Move all values one place on; nothing (-1) stands before the first."""
    return np.concatenate([np.array([-1], np.int64), values[:-1]]) if len(values) else values


def pad_starts(pieces: list[Tokens], *, order: int) -> tuple[Tokens, Tokens]:
    """Lay the pieces end to end, each with its first token repeated `order - 2` times before it.

    Returns the stream, and the places in it that are predicted: all but those of the first tokens. No n-gram that
    ends at such a place reaches into the piece before.
    """
    repeats = max(order - 2, 0)
    stream = [np.empty(0, np.int64)]
    predicted = [np.empty(0, np.int64)]
    length = 0
    for piece in pieces:
        if len(piece) < 2:
            continue
        stream += [np.repeat(piece[:1], repeats), piece]
        predicted.append(np.arange(length + repeats + 1, length + repeats + len(piece)))
        length += repeats + len(piece)
    return np.concatenate(stream), np.concatenate(predicted)


def take_tokens(sequences: Iterable[Sequence[int] | Tokens], *, max_tokens: int | None) -> list[Tokens]:
    """Return the sequences up to `max_tokens` tokens in all; the last one may be cut."""
    taken: list[Tokens] = []
    room = max_tokens
    for sequence in sequences:
        piece = np.asarray(sequence, np.int64)[:room]
        if len(piece):
            taken.append(piece)
        if room is not None:
            room -= len(piece)
            if room <= 0:
                break
    return taken


def check_vocabulary(tokens: Tokens, *, vocab_size: int) -> None:
    """Raise DataError when there is nothing to count, or a token lies outside the vocabulary."""
    if not len(tokens):
        raise DataError("a baseline was asked for, but there are no training tokens to count")
    outside = tokens[(tokens < 0) | (tokens >= vocab_size)]
    if len(outside):
        raise DataError(
            f"token {int(outside[0])} of the training text is outside the vocabulary of {vocab_size}; "
            "baselines must use the model's own tokenizer"
        )


def xz_bits(text: bytes, *, prefix: bytes = b"", preset: int = 6) -> float:
    """Return the bits by which xz's output grows when `text` follows `prefix`; without one, the bits of text alone.

    The dictionary is as large as everything compressed, so that all of the prefix stays within reach, and headers
    (which are not about the text) are left out.
    """
    if not prefix:
        return 8.0 * compressed_size(text, dictionary=len(text), preset=preset)
    reach = len(prefix) + len(text)
    return 8.0 * (
        compressed_size(prefix + text, dictionary=reach, preset=preset)
        - compressed_size(prefix, dictionary=reach, preset=preset)
    )


def compressed_size(text: bytes, *, dictionary: int, preset: int) -> int:
    """Return the bytes of the raw LZMA2 stream of a text."""
    smallest, largest = 4096, 1536 << 20  # what liblzma accepts
    filters = [{"id": lzma.FILTER_LZMA2, "preset": preset, "dict_size": min(max(dictionary, smallest), largest)}]
    return len(lzma.compress(text, format=lzma.FORMAT_RAW, filters=filters))
