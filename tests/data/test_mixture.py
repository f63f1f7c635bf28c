from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3.config import MixtureConfig, ShareConfig
from dsv3.data.mixture import BLOCK_ROWS, AnnealedMixture, Mixture, shared_weights
from dsv3.errors import ConfigError

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


def rows_of(mixture, rows):
    return [mixture.locate(row) for row in rows]


def test_a_source_of_no_weight_is_never_drawn():
    assert {source for source, _ in rows_of(Mixture([1.0, 0.0, 1e-6], seed=0), range(2048))} == {0, 2}


def test_rows_drawn_before_a_row_are_those_that_were_dealt():
    mixture = Mixture([3.0, 1.0, 2.0], seed=4)
    for row in (0, 1, 700, 1024, 2500):
        dealt = [source for source, _ in rows_of(mixture, range(row))]
        assert mixture.drawn(row) == [dealt.count(source) for source in range(3)]


def test_annealing_goes_on_in_each_source_where_the_mixture_has_stopped():
    annealed = AnnealedMixture(Mixture([1.0, 3.0], seed=0), last=Mixture([1.0, 0.0], seed=0), from_row=1500)
    dealt = rows_of(annealed, range(3000))
    assert {source for source, _ in dealt[1500:]} == {0}
    for source in (0, 1):
        drawn = [count for found, count in dealt if found == source]
        assert drawn == list(range(len(drawn)))


SOURCES = [("web/english", 900.0), ("web/maths", 100.0), ("code/code", 1000.0)]


def weights(*shares, temperature=1.0):
    return shared_weights(SOURCES, shares=[ShareConfig(**share) for share in shares], temperature=temperature)


def test_without_shares_tokens_count_and_a_temperature_raises_what_is_small():
    assert weights() == [900.0, 100.0, 1000.0]
    assert weights(temperature=2.0) == pytest.approx([30.0, 10.0, 1000**0.5])


def test_weights_are_divided_among_what_a_share_is_of_by_tokens():
    assert weights({"of": "web", "weight": 0.4}, {"of": "code", "weight": 0.6}) == pytest.approx([0.36, 0.04, 0.6])


def test_the_closest_share_counts():
    shares = [{"of": "web", "weight": 1.0}, {"of": "web/maths", "weight": 2.0}, {"of": "code", "weight": 1.0}]
    assert weights(*shares) == [1.0, 2.0, 1.0]


def test_epochs_say_how_often_something_is_read_while_the_rest_is_read_once():
    assert weights({"of": "maths", "epochs": 4.0}) == [900.0, 400.0, 1000.0]


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ([{"of": "poems", "weight": 1.0}], "a share of poems; the corpus has web/english"),
        ([{"of": "web", "weight": 1.0}], "gives code/code no weight"),
    ],
)
def test_shares_that_fit_nothing_or_leave_something_out_are_refused(shares, message):
    with pytest.raises(ConfigError, match=message):
        weights(*shares)


def test_weights_and_epochs_are_not_mixed():
    with pytest.raises(ConfigError, match="not both"):
        MixtureConfig(shares=(ShareConfig(of="a", weight=1.0), ShareConfig(of="b", epochs=2.0)))
    with pytest.raises(ConfigError, match="go together"):
        MixtureConfig(annealing_tokens=5)
