import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3.data.packing import best_fit, pack

LENGTHS = st.lists(st.integers(1, 300), max_size=200)


@given(LENGTHS, st.integers(2, 64))
def test_every_token_of_every_document_lies_in_exactly_one_row(lengths, capacity):
    packing = pack(np.array(lengths, dtype=np.int64), capacity=capacity)
    seen = [np.zeros(length, dtype=int) for length in lengths]
    for document, offset, length in packing.pieces.tolist():
        seen[document][offset : offset + length] += 1
    assert sum(piece[2] for piece in packing.pieces.tolist()) == sum(lengths)
    assert all((counts == 1).all() for counts in seen)


@given(LENGTHS, st.integers(2, 64))
def test_no_row_holds_more_than_its_capacity_and_none_is_empty(lengths, capacity):
    packing = pack(np.array(lengths, dtype=np.int64), capacity=capacity)
    filled = [int(packing.row(row)[:, 2].sum()) for row in range(packing.num_rows)]
    assert all(0 < tokens <= capacity for tokens in filled)


@given(LENGTHS, st.integers(2, 64))
def test_only_documents_longer_than_a_row_are_cut_and_as_seldom_as_can_be(lengths, capacity):
    packing = pack(np.array(lengths, dtype=np.int64), capacity=capacity)
    pieces = np.bincount(packing.pieces[:, 0], minlength=len(lengths)).tolist()
    assert pieces == [-(-length // capacity) for length in lengths]


@given(st.lists(st.integers(1, 40), max_size=120), st.just(40))
def test_best_fit_puts_each_item_where_a_plain_search_would(sizes, capacity):
    """The definition, in quadratic time: the fullest row that still takes the item."""
    sizes = sorted(sizes, reverse=True)
    spaces: list[int] = []
    expected_spaces = []
    for size in sizes:
        fitting = [space for space in spaces if space >= size]
        space = min(fitting, default=capacity)
        if fitting:
            spaces.remove(space)
        spaces.append(space - size)
        expected_spaces.append(sorted(spaces))
    rows = best_fit(sizes, capacity=capacity)
    left: dict[int, int] = {}
    for place, (size, row) in enumerate(zip(sizes, rows, strict=True)):
        left[row] = left.get(row, capacity) - size
        assert sorted(left.values()) == expected_spaces[place]


def test_a_known_case():
    # 10 tokens a row: 23 = 10 + 10 + 3; then 7 and 6 open rows, 4 joins 6, 3 joins 7.
    packing = pack(np.array([23, 4, 7, 6]), capacity=10)
    rows = [packing.row(row).tolist() for row in range(packing.num_rows)]
    assert rows == [[[0, 0, 10]], [[0, 10, 10]], [[2, 0, 7], [0, 20, 3]], [[3, 0, 6], [1, 0, 4]]]


def test_little_is_wasted_on_documents_of_many_lengths():
    lengths = np.random.default_rng(0).lognormal(mean=5, sigma=1.2, size=5000).astype(np.int64) + 2
    packing = pack(lengths, capacity=257)
    assert packing.num_rows * 257 / lengths.sum() < 1.005
    full = sum(packing.row(row)[:, 2].sum() == 257 for row in range(packing.num_rows))
    assert full / packing.num_rows > 0.95


def test_packing_is_deterministic():
    lengths = np.random.default_rng(1).integers(1, 90, size=500)
    first, second = pack(lengths, capacity=33), pack(lengths, capacity=33)
    assert (first.pieces == second.pieces).all()
    assert (first.row_starts == second.row_starts).all()


def test_no_documents_make_no_rows():
    assert pack(np.array([], dtype=np.int64), capacity=8).num_rows == 0


@pytest.mark.parametrize("capacity", [129, 4097])
def test_a_shard_of_short_documents_packs_in_seconds(capacity):
    lengths = np.random.default_rng(2).integers(10, 100, size=200_000)
    packing = pack(lengths, capacity=capacity)
    assert packing.num_rows < 1.05 * lengths.sum() / capacity
