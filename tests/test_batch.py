"""TokenBatch: rows, sequences and the shift that MTP modules read."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from dsv3.batch import IGNORE, TokenBatch


def test_rows_give_every_input_its_next_token_as_target():
    batch = TokenBatch.from_rows(torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]]))
    assert batch.tokens.tolist() == [1, 2, 3, 5, 6, 7]
    assert batch.targets.tolist() == [2, 3, 4, 6, 7, 8]
    assert batch.positions.tolist() == [0, 1, 2, 0, 1, 2]
    assert batch.starts.tolist() == [0, 3, 6]
    assert batch.row_length == 3


def test_ahead_moves_tokens_and_targets_but_not_positions():
    ahead = TokenBatch.from_rows(torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])).ahead()
    assert ahead.tokens.tolist() == [2, 3, 6, 7]
    assert ahead.targets.tolist() == [3, 4, 7, 8]
    assert ahead.positions.tolist() == [0, 1, 0, 1]
    assert ahead.starts.tolist() == [0, 2, 4]


@given(lengths=st.lists(st.integers(1, 6), min_size=1, max_size=5), depth=st.integers(1, 4))
def test_ahead_k_times_pairs_place_i_with_token_i_plus_k(lengths, depth):
    sequences = [[100 * s + i for i in range(length + 1)] for s, length in enumerate(lengths)]
    batch = TokenBatch(
        tokens=torch.tensor([token for sequence in sequences for token in sequence[:-1]]),
        positions=torch.cat([torch.arange(length) for length in lengths]),
        starts=torch.tensor([0, *lengths]).cumsum(0),
        targets=torch.tensor([token for sequence in sequences for token in sequence[1:]]),
    )
    place = torch.arange(batch.num_tokens)  # which place of the first batch each row stands for
    for _ in range(depth):
        place = place[batch.not_last]
        batch = batch.ahead()
    expected = [
        (100 * s + i, 100 * s + i + depth, 100 * s + i + depth + 1)
        for s, length in enumerate(lengths)
        for i in range(length - depth)
    ]
    first = torch.tensor([token for sequence in sequences for token in sequence[:-1]])
    assert list(zip(first[place].tolist(), batch.tokens.tolist(), batch.targets.tolist(), strict=True)) == expected
    assert batch.starts[-1] == len(expected)


def test_ignored_targets_stay_ignored_ahead():
    batch = TokenBatch.from_rows(torch.tensor([[1, 2, 3]]))
    batch = TokenBatch(
        tokens=batch.tokens, positions=batch.positions, starts=batch.starts, targets=torch.tensor([2, IGNORE])
    )
    assert batch.ahead().targets.tolist() == [IGNORE]


@given(bounds=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 4)), min_size=1, max_size=5))
def test_firsts_and_ends_are_the_positions_that_each_sequence_goes_from_and_to(bounds):
    batch = pieces([(first, first + count) for first, count in bounds])
    assert batch.firsts == tuple(first if count else 0 for first, count in bounds)  # an empty one could be anywhere
    assert batch.ends == tuple(first + count if count else 0 for first, count in bounds)


@given(bounds=st.lists(st.tuples(st.integers(0, 9), st.integers(1, 4)), min_size=1, max_size=5))
def test_firsts_stay_when_a_batch_moves_and_when_it_looks_ahead(bounds):
    batch = pieces([(first, first + count) for first, count in bounds])
    assert batch.to("cpu").firsts == batch.firsts
    ahead = batch.ahead()
    assert ahead.firsts == batch.firsts
    assert ahead.ends == tuple(first + count - 1 for first, count in bounds)
    where = zip(ahead.firsts, ahead.ends, strict=True)
    assert ahead.positions.tolist() == [place for first, end in where for place in range(first, end)]


def test_rows_and_whole_sequences_begin_at_0():
    assert TokenBatch.from_rows(torch.ones(3, 5, dtype=torch.long)).firsts == (0, 0, 0)
    batch = TokenBatch.from_sequences([[4, 5], [6]])
    assert (batch.firsts, batch.ends, batch.lengths) == ((0, 0), (2, 1), (2, 1))


def pieces(bounds):
    """Sequences that go on from where they are, each from one position to another."""
    return TokenBatch(
        tokens=torch.zeros(sum(end - first for first, end in bounds), dtype=torch.long),
        positions=torch.cat([torch.arange(first, end) for first, end in bounds]),
        starts=torch.tensor([0, *(end - first for first, end in bounds)]).cumsum(0),
    )
