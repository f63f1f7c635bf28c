import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3.errors import ConfigError
from dsv3.serve.load.lengths import LONGEST_IN_MEDIANS, parse_lengths


@given(low=st.integers(1, 1000), more=st.integers(0, 1000), seed=st.integers())
def test_a_range_gives_numbers_between_its_ends_with_both_of_them(low, more, seed):
    lengths = parse_lengths(f"{low}-{low + more}", option="--x")
    assert low <= lengths.draw(random.Random(seed)) <= low + more


def test_all_numbers_of_a_range_are_drawn_alike():
    rng = random.Random(0)
    drawn = [parse_lengths("3-6", option="--x").draw(rng) for _ in range(8000)]
    assert [drawn.count(length) / 8000 for length in (3, 4, 5, 6)] == pytest.approx([0.25] * 4, abs=0.025)


def test_one_number_is_always_that_number():
    assert {parse_lengths("7", option="--x").draw(random.Random(seed)) for seed in range(20)} == {7}


def test_lognormal_has_its_median_and_its_spread_and_ends_at_ten_medians():
    rng = random.Random(0)
    drawn = [parse_lengths("lognormal:200:0.8", option="--x").draw(rng) for _ in range(8000)]
    quartiles = statistics.quantiles(drawn, n=4)
    assert quartiles[1] == pytest.approx(200, rel=0.05)
    assert quartiles[2] / quartiles[1] == pytest.approx(2.71828 ** (0.8 * 0.6745), rel=0.06)  # z of 75 % is 0.6745
    assert min(drawn) >= 1
    assert max(drawn) <= 200 * LONGEST_IN_MEDIANS


@pytest.mark.parametrize(
    "text",
    ["", "x", "0", "-5", "9-3", "0-4", "1-2-3", "lognormal:10", "lognormal:0:1", "lognormal:nan:1", "lognormal:9:9"],
)
def test_what_is_no_distribution_is_refused_with_the_option_named(text):
    with pytest.raises(ConfigError, match="--prompt-tokens"):
        parse_lengths(text, option="--prompt-tokens")
