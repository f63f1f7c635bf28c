import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3.serve.load.measure import Outcome, distribution, percentile, summarise

NUMBERS = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=60)


@given(values=NUMBERS, share=st.floats(0, 1))
def test_percentiles_are_those_of_numpy(values, share):
    expected = float(np.percentile(values, 100 * share))
    assert percentile(values, share=share) == pytest.approx(expected, rel=1e-9, abs=1e-6)


@given(values=NUMBERS, share=st.floats(0, 1), more=st.floats(0, 1))
def test_percentiles_lie_within_the_values_and_rise_with_the_share(values, share, more):
    low, high = sorted([share, more])
    assert min(values) <= percentile(values, share=low) <= percentile(values, share=high) + 1e-9 <= max(values) + 2e-9


@given(values=NUMBERS)
def test_the_order_of_values_does_not_matter(values):
    assert distribution(values) == distribution(sorted(values))


def test_nothing_has_no_percentile():
    assert math.isnan(percentile([], share=0.5))
    assert math.isnan(distribution([]).mean)


def answered(scheduled: float, **more) -> Outcome:
    first, last = scheduled + 0.5, scheduled + 1.5
    usage = {"prompt_tokens": 10, "cached_tokens": 4, "completion_tokens": 11, "is_counted": True}
    return Outcome(
        scheduled=scheduled, sent=scheduled, first=first, last=last, end=scheduled + 2.0, **{**usage, **more}
    )


def test_a_load_is_summed_up():
    whole = [answered(0.0, accepted_drafts=3, rejected_drafts=1, gaps=[0.4, 0.6]), answered(3.0, gaps=[1.0])]
    lost = [
        Outcome(scheduled=1.0, sent=1.25, end=10.0, error="timeout"),
        Outcome(scheduled=2.0, sent=2.0, error="http 429"),
    ]
    summary = summarise([*whole, *lost, Outcome(scheduled=2.0, sent=2.0, end=2.1, error="http 429")])
    assert (summary.num_requests, summary.num_whole) == (5, 2)
    assert summary.errors == {"http 429": 2, "timeout": 1}
    assert summary.seconds == 10.0
    assert summary.requests_per_second == pytest.approx(0.2)
    assert summary.output_tokens_per_second == pytest.approx(2.2)
    assert summary.total_tokens_per_second == pytest.approx(4.2)
    assert summary.cached_share == pytest.approx(0.4)
    assert summary.draft_acceptance == pytest.approx(0.75)
    assert summary.time_to_first_token.p50 == pytest.approx(0.5)
    assert summary.time_per_token.mean == pytest.approx(0.1)  # one second for the ten tokens after the first
    assert summary.gap.p50 == pytest.approx(0.6)
    assert summary.latency.p99 == pytest.approx(2.0)
    assert summary.send_delay.mean == pytest.approx(0.05)


def test_waiting_to_be_sent_counts_as_waiting():
    late = Outcome(scheduled=1.0, sent=4.0, first=4.5, last=4.5, end=5.0, completion_tokens=1)
    assert late.time_to_first_token == pytest.approx(3.5)
    assert late.latency == pytest.approx(4.0)
    assert late.time_per_token is None


def test_no_answer_at_all_is_summed_up_and_written_without_nan():
    for outcomes in ([], [Outcome(scheduled=0.0, end=1.0, error="timeout")]):
        content = json.loads(json.dumps(summarise(outcomes).as_dict(), allow_nan=False))
        assert content["latency"] == {"mean": None, "p50": None, "p90": None, "p99": None}
        assert content["draft_acceptance"] is None
