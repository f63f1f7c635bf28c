import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from dsv3.data.permutation import permuted


@given(st.integers(1, 700), st.integers(0, 2**64 - 1))
def test_every_place_is_taken_once(count, key):
    assert sorted(permuted(place, count=count, key=key) for place in range(count)) == list(range(count))


@given(st.integers(1, 2**50), st.integers(0, 2**64 - 1), st.data())
def test_huge_counts_need_no_memory(count, key, data):
    place = data.draw(st.integers(0, count - 1))
    assert 0 <= permuted(place, count=count, key=key) < count


def test_keys_give_unlike_orders():
    orders = {tuple(permuted(place, count=20, key=key) for place in range(20)) for key in range(100)}
    assert len(orders) == 100


def test_first_places_are_spread_evenly():
    counts = np.bincount([permuted(0, count=10, key=key * 7919) for key in range(10_000)], minlength=10)
    # Chi-squared with 9 degrees of freedom: above 27.9 once in a thousand.
    assert ((counts - 1000) ** 2 / 1000).sum() < 27.9


def test_neighbours_do_not_stay_neighbours():
    order = [permuted(place, count=5000, key=42) for place in range(5000)]
    assert np.mean(np.abs(np.diff(order))) > 1500  # A random order has 5000 / 3 on average.
    assert abs(np.corrcoef(order, range(5000))[0, 1]) < 0.05
