"""Stretches of held-out documents: every token predicted once, and batches no larger than asked."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from dsv3.data.windows import batched, cut_windows

DOCUMENTS = st.lists(st.lists(st.integers(0, 9), max_size=20), max_size=6)


@given(documents=DOCUMENTS, length=st.integers(1, 8))
def test_every_token_but_the_first_of_a_document_is_predicted_once_in_order(documents, length):
    windows = cut_windows(documents, length=length)
    assert all(2 <= len(window.tokens) <= length + 1 for window in windows)
    for number, document in enumerate(documents):
        mine = [window.tokens for window in windows if window.document == number]
        assert [token for tokens in mine for token in tokens[1:]] == document[1:]
        for before, after in pairwise(mine):
            assert after[0] == before[-1]


@given(documents=DOCUMENTS, length=st.integers(1, 8), max_tokens=st.integers(1, 12))
def test_batches_hold_all_stretches_in_order_and_no_more_tokens_than_asked(documents, length, max_tokens):
    windows = cut_windows(documents, length=length)
    batches = list(batched(windows, max_tokens=max_tokens))
    assert [window for batch in batches for window in batch] == windows
    for batch in batches:
        assert batch
        assert len(batch) == 1 or sum(len(window.tokens) - 1 for window in batch) <= max_tokens
    sizes = [len(window.tokens) for window in windows]
    assert sizes == sorted(sizes, reverse=True)


def test_a_document_of_one_token_costs_nothing_and_windows_cover_the_rest():
    windows = cut_windows([[0], [0, 1, 2, 3], []], length=2)
    assert [(piece.document, piece.tokens) for piece in windows] == [(1, [0, 1, 2]), (1, [2, 3])]
