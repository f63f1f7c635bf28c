import lzma
import math
import random
from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3.errors import DataError
from dsv3.evals.baselines import NgramModel, UnigramModel, modified_discounts, xz_bits

VOCAB = 12


def kneser_ney_by_the_book(sequences, *, order, context, token):
    """Chen and Goodman's recursion with dictionaries, one probability at a time."""
    padded = [[sequence[0]] * max(order - 2, 0) + list(sequence) for sequence in sequences]
    grams = {length: Counter() for length in range(1, order + 1)}
    for row in padded:
        for end in range(max(order - 1, 1), len(row)):
            for length in range(1, order + 1):
                grams[length][tuple(row[end - length + 1 : end + 1])] += 1
    counts = {order: grams[order]}
    for length in range(order - 1, 0, -1):
        left = defaultdict(set)
        for gram in grams[length + 1]:
            left[gram[1:]].add(gram[0])
        counts[length] = {gram: len(neighbours) for gram, neighbours in left.items()}

    def discounts(table):
        n = [sum(1 for value in table.values() if value == number) for number in range(5)]
        try:
            y = n[1] / (n[1] + 2 * n[2])
            found = [1 - 2 * y * n[2] / n[1], 2 - 3 * y * n[3] / n[2], 3 - 4 * y * n[4] / n[3]]
        except ZeroDivisionError:
            return [0.75] * 3
        return found if n[4] and all(0 < d <= k + 1 for k, d in enumerate(found)) else [0.75] * 3

    def probability(length, context):
        if length == 0:
            return 1 / VOCAB
        table = counts[length]
        amounts = discounts(table)
        continued = {gram: value for gram, value in table.items() if gram[:-1] == context}
        total = sum(continued.values())
        shorter = probability(length - 1, context[1:])
        if not total:
            return shorter
        count = table.get((*context, token), 0)
        freed = sum(amounts[min(value, 3) - 1] for value in continued.values())
        return (count - (amounts[min(count, 3) - 1] if count else 0)) / total + freed / total * shorter

    return probability(order, tuple(context))


def random_sequences(seed, *, documents, longest):
    rng = random.Random(seed)
    weights = [1 / (rank + 1) for rank in range(VOCAB - 1)]
    return [
        [0, *(rng.choices(range(1, VOCAB), weights)[0] for _ in range(rng.randint(1, longest)))]
        for _ in range(documents)
    ]


@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("documents", [2, 60])
def test_probabilities_equal_kneser_ney_written_out_with_dictionaries(order, documents):
    sequences = random_sequences(1, documents=documents, longest=30)
    model = NgramModel.train(sequences, vocab_size=VOCAB, order=order)
    rng = random.Random(2)
    for _ in range(5):
        context = [rng.randrange(VOCAB) for _ in range(order - 1)]
        ours = model.probabilities(context)
        expected = [
            kneser_ney_by_the_book(sequences, order=order, context=context, token=token) for token in range(VOCAB)
        ]
        assert ours == pytest.approx(expected, rel=1e-9)


@settings(max_examples=40, deadline=None)
@given(
    sequences=st.lists(st.lists(st.integers(0, VOCAB - 1), min_size=2, max_size=20), min_size=1, max_size=8),
    context=st.lists(st.integers(0, VOCAB - 1), max_size=4),
    order=st.integers(1, 4),
)
def test_probabilities_sum_to_one_after_any_context(sequences, context, order):
    model = NgramModel.train(sequences, vocab_size=VOCAB, order=order)
    probabilities = model.probabilities(context)
    assert probabilities.sum() == pytest.approx(1.0, abs=1e-9)
    assert (probabilities > 0).all()


def test_bigram_by_hand():
    # One text, a b a c (0 begins it): bigrams 0a ab ba ac. Counts of counts are incomplete, so every discount is 0.75.
    # Left neighbours: a has {0, b}, b has {a}, c has {a}: 4 in all. Freed at the unigram: 3 * 0.75 / 4.
    a, b, c = 1, 2, 3
    model = NgramModel.train([[0, a, b, a, c]], vocab_size=4, order=2)
    unigram_b = (1 - 0.75) / 4 + (3 * 0.75 / 4) / 4
    assert model.probabilities([])[b] == pytest.approx(unigram_b)
    # After a: b and c once each, so 2 in all, of which 2 * 0.75 / 2 is freed.
    assert model.probabilities([a])[b] == pytest.approx((1 - 0.75) / 2 + 0.75 * unigram_b)
    # c was never continued: the unigram answers.
    assert model.probabilities([c])[b] == pytest.approx(unigram_b)


def test_bits_are_the_sum_over_places_of_minus_log2_of_the_probability():
    sequences = random_sequences(3, documents=40, longest=25)
    model = NgramModel.train(sequences, vocab_size=VOCAB, order=3)
    held_out = random_sequences(4, documents=3, longest=12)
    expected = 0.0
    for text in held_out:
        padded = [text[0], *text]
        for end in range(2, len(padded)):
            expected -= math.log2(model.probabilities(padded[end - 2 : end])[padded[end]])
    assert model.bits(held_out) == pytest.approx(expected)


def test_no_text_reads_into_the_text_before_it():
    sequences = random_sequences(5, documents=20, longest=10)
    model = NgramModel.train(sequences, vocab_size=VOCAB, order=3)
    held_out = random_sequences(6, documents=4, longest=10)
    assert model.bits(held_out) == pytest.approx(sum(model.bits([text]) for text in held_out))
    swapped = NgramModel.train(sequences[::-1], vocab_size=VOCAB, order=3)
    assert swapped.bits(held_out) == pytest.approx(model.bits(held_out))


def test_max_tokens_trains_on_exactly_the_first_tokens():
    sequences = random_sequences(7, documents=30, longest=20)
    flat = [token for sequence in sequences for token in sequence]
    limit = len(sequences[0]) + len(sequences[1]) + 3
    cut = [sequences[0], sequences[1], sequences[2][:3]]
    ngram = NgramModel.train(sequences, vocab_size=VOCAB, max_tokens=limit)
    assert ngram.training_tokens == limit
    assert ngram.bits(sequences) == pytest.approx(NgramModel.train(cut, vocab_size=VOCAB).bits(sequences))
    unigram = UnigramModel.train(sequences, vocab_size=VOCAB, max_tokens=limit)
    assert unigram.training_tokens == limit
    assert unigram.probabilities[1] == pytest.approx((flat[:limit].count(1) + 1) / (limit + VOCAB))


def test_unigram_is_add_one_and_skips_the_first_token():
    model = UnigramModel.train([[0, 1, 1], [2]], vocab_size=4)
    assert model.probabilities.tolist() == pytest.approx([2 / 8, 3 / 8, 2 / 8, 1 / 8])
    assert model.bits([[0, 1, 3]]) == pytest.approx(-math.log2(3 / 8) - math.log2(1 / 8))


def test_modified_discounts_follow_equation_17():
    counts = np.array([1.0] * 10 + [2.0] * 4 + [3.0] * 2 + [4.0] * 1 + [9.0])
    y = 10 / (10 + 2 * 4)
    expected = [0, 1 - 2 * y * 4 / 10, 2 - 3 * y * 2 / 4, 3 - 4 * y * 1 / 2]
    assert modified_discounts(counts).tolist() == pytest.approx(expected)


def test_a_token_outside_the_vocabulary_is_refused_by_number():
    with pytest.raises(DataError, match="token 12 "):
        NgramModel.train([[0, 12]], vocab_size=12)
    with pytest.raises(DataError, match="no training tokens"):
        UnigramModel.train([], vocab_size=12)


def test_xz_alone_agrees_with_the_standard_library_to_its_headers():
    text = b"the quick brown fox jumps over the lazy dog. " * 50 + bytes(range(256))
    standard = lzma.compress(text, preset=6)
    assert 0 < len(standard) - xz_bits(text) / 8 < 100


def test_xz_after_a_prefix_that_holds_the_text_needs_almost_nothing():
    text = random.Random(0).randbytes(4000)
    assert xz_bits(text) >= 8 * 4000
    assert xz_bits(text, prefix=b"x" * 100_000 + text) < 8 * 100
