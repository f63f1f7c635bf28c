import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3.serve.load.arrivals import poisson_arrivals


def take(count: int, *, rate: float, seed: int) -> list[float]:
    return list(itertools.islice(poisson_arrivals(rate, seed=seed), count))


@given(rate=st.floats(1e-3, 1e4), seed=st.integers(0, 2**40))
def test_times_rise_and_are_the_same_for_the_same_seed(rate, seed):
    times = take(50, rate=rate, seed=seed)
    assert times == take(50, rate=rate, seed=seed)
    assert all(earlier < later for earlier, later in itertools.pairwise([0.0, *times]))


@given(rate=st.floats(1e-3, 1e4), scale=st.floats(0.1, 10), seed=st.integers(0, 1000))
def test_another_rate_stretches_time_and_nothing_else(rate, scale, seed):
    stretched = take(20, rate=rate * scale, seed=seed)
    assert [time * scale for time in stretched] == pytest.approx(take(20, rate=rate, seed=seed))


def test_counts_in_equal_stretches_have_a_mean_and_a_variance_equal_to_the_rate():
    rate, stretches = 5.0, 4000
    counts = [0] * stretches
    for time in itertools.takewhile(lambda time: time < stretches, poisson_arrivals(rate, seed=1)):
        counts[int(time)] += 1
    mean = sum(counts) / stretches
    variance = sum((count - mean) ** 2 for count in counts) / stretches
    # Five standard errors: of the mean sqrt(rate / n), of the variance sqrt((rate + 2 rate^2) / n).
    assert mean == pytest.approx(rate, abs=5 * math.sqrt(rate / stretches))
    assert variance == pytest.approx(rate, abs=5 * math.sqrt((rate + 2 * rate**2) / stretches))


def test_gaps_know_nothing_of_the_gaps_before_them():
    times = take(20_000, rate=1.0, seed=2)
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    product = sum((a - 1) * (b - 1) for a, b in itertools.pairwise(gaps)) / (len(gaps) - 1)
    assert product == pytest.approx(0.0, abs=5 / math.sqrt(len(gaps)))
