from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3.data.mixture import BLOCK_ROWS, Mixture

WEIGHTS = st.lists(st.floats(0.001, 1000), min_size=1, max_size=8)


@settings(max_examples=20)
@given(WEIGHTS, st.integers(0, 5), st.integers(0, 10**6))
def test_every_block_holds_the_sources_by_weight(weights, seed, block):
    mixture = Mixture(weights, seed=seed)
    drawn = Counter(mixture.locate(block * BLOCK_ROWS + row)[0] for row in range(BLOCK_ROWS))
    for source, weight in enumerate(weights):
        exact = BLOCK_ROWS * weight / sum(weights)
        assert drawn[source] >= 1
        assert abs(drawn[source] - exact) < 1 + len(weights)


def test_shares_that_come_out_even_are_exact():
    mixture = Mixture([0.5, 0.25, 0.25], seed=0)
    assert Counter(mixture.locate(row)[0] for row in range(2 * BLOCK_ROWS)) == {0: 1024, 1: 512, 2: 512}


@settings(max_examples=15)
@given(WEIGHTS, st.integers(0, 5))
def test_each_source_is_drawn_without_gap_or_repeat(weights, seed):
    mixture = Mixture(weights, seed=seed)
    draws: dict[int, list[int]] = {}
    for row in range(2 * BLOCK_ROWS):
        source, drawn = mixture.locate(row)
        draws.setdefault(source, []).append(drawn)
    for drawn in draws.values():
        assert drawn == list(range(len(drawn)))


def test_a_row_is_the_same_whatever_was_asked_before():
    fresh = [Mixture([1.0, 2.0, 3.0], seed=4).locate(row) for row in (0, 5000, 1023, 1024)]
    mixture = Mixture([1.0, 2.0, 3.0], seed=4)
    assert [mixture.locate(row) for row in (0, 5000, 1023, 1024)] == fresh


def test_seeds_and_blocks_are_shuffled_differently():
    def sources(seed, start):
        mixture = Mixture([1.0, 1.0], seed=seed)
        return [mixture.locate(start + row)[0] for row in range(64)]

    assert sources(0, 0) != sources(1, 0)
    assert sources(0, 0) != sources(0, BLOCK_ROWS)


@pytest.mark.parametrize("count", [100, 3000])
def test_many_sources_all_get_rows(count):
    mixture = Mixture([1.0] * (count - 1) + [1e6], seed=0)
    assert min(mixture.rows_per_block) == 1
