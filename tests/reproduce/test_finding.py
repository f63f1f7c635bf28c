"""What is the same sign, what the other, and what says nothing."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3.reproduce.finding import Limit, Number, Order, Verdict, shown, standard_error

VALUES = st.floats(0.1, 10)


def order(lower, higher, **more):
    return Order(claim="a below b", report="a 1, b 2", lower=tuple(lower), higher=tuple(higher), **more)


@pytest.mark.parametrize(
    ("lower", "higher", "verdict"),
    [
        ([1.0, 1.1, 0.9], [2.0, 1.2, 1.0], Verdict.SAME),
        ([2.0, 1.2, 1.0], [1.0, 1.1, 0.9], Verdict.OTHER),
        ([1.0, 1.3, 0.9], [2.0, 1.2, 1.0], Verdict.UNCLEAR),
        ([1.0], [1.0], Verdict.OTHER),  # equal is not lower
        ([1.0], [2.0], Verdict.SAME),
    ],
)
def test_a_sign_is_seen_only_where_every_seed_has_it(lower, higher, verdict):
    assert order(lower, higher).verdict is verdict


def test_no_worse_is_weaker_than_better():
    slightly_worse = ([1.004, 1.001], [1.0, 1.0])
    assert order(*slightly_worse).verdict is Verdict.OTHER
    assert order(*slightly_worse, margin=0.005).verdict is Verdict.SAME
    assert order([1.004, 1.009], [1.0, 1.0], margin=0.005).verdict is Verdict.UNCLEAR


@given(pairs=st.lists(st.tuples(VALUES, VALUES), min_size=1, max_size=6))
def test_what_is_the_same_sign_one_way_round_is_the_other_sign_the_other(pairs):
    here = order(*zip(*pairs, strict=True))
    there = order(here.higher, here.lower)
    assert here.mean == pytest.approx(-there.mean)
    assert here.error == pytest.approx(there.error)
    if all(a != b for a, b in pairs):
        turned = {Verdict.SAME: Verdict.OTHER, Verdict.OTHER: Verdict.SAME, Verdict.UNCLEAR: Verdict.UNCLEAR}
        assert there.verdict is turned[here.verdict]


def test_the_spread_is_the_standard_error_over_seeds():
    assert standard_error([1.0, 2.0, 3.0]) == pytest.approx(1 / 3**0.5)
    assert standard_error([5.0]) == 0
    assert "lower by +1 ± 0.58 (seeds: +0 +1 +2)" in order([3.0, 2.0, 1.0], [3.0, 3.0, 3.0]).seen


def test_a_number_agrees_within_its_tolerance():
    number = Number(claim="hours", report="100", expected=100.0, value=104.9, tolerance=0.05)
    assert number.verdict is Verdict.AGREES
    assert number.seen == "104.9 (+4.9%)"
    far = Number(claim="hours", report="100", expected=100.0, value=105.1, tolerance=0.05)
    assert far.verdict is Verdict.DIFFERS
    assert Number(claim="n", report="3", expected=3, value=3).seen == "3"


def test_a_limit_has_to_be_kept_by_every_seed():
    assert Limit(claim="gap", report="0.25", bound=0.25, values=(0.1, 0.25)).verdict is Verdict.AGREES
    assert Limit(claim="gap", report="0.25", bound=0.25, values=(0.1, 0.26)).verdict is Verdict.DIFFERS
    assert Limit(claim="rate", report="0.85", bound=0.85, values=(0.9,), at_least=True).verdict is Verdict.AGREES
    assert Limit(claim="rate", report="0.85", bound=0.85, values=(0.8,), at_least=True).verdict is Verdict.DIFFERS


def test_findings_are_written_with_their_verdict():
    read = json.loads(json.dumps(order([1.0], [2.0]).as_dict()))
    assert (read["verdict"], read["seen"], read["differences"]) == ("same sign", "1 and 2", [1.0])


@pytest.mark.parametrize(
    ("value", "text"), [(70_272.0, "70,272"), (4.66301, "4.663"), (2_601_884.4, "2,601,884"), (0.08374, "0.08374")]
)
def test_numbers_can_be_read(value, text):
    assert shown(value) == text
