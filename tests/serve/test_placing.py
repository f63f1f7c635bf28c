"""Requests go where they are soonest served: less to slow workers, and to those that know how a prompt begins."""

from hypothesis import given
from hypothesis import strategies as st

from dsv3.infer.events import EngineStats
from dsv3.infer.pages import page_keys
from dsv3.serve.placing import Decoding, KnownPrefixes, Pace, Reading, choose_decoder, choose_reader


def reading(pending=0, new=100, pace=0.01):
    return Reading(pending_tokens=pending, new_tokens=new, seconds_per_token=pace)


def decoding(requests=0, pages=0, new=4, step=0.01):
    return Decoding(
        num_requests=requests, most_requests=16, pages=pages, most_pages=64, new_pages=new, seconds_per_step=step
    )


def test_a_prompt_goes_to_who_will_have_read_it_first():
    assert choose_reader([reading(pending=300), reading(pending=200)]) == 1
    assert choose_reader([reading(pending=300), reading(pending=200, pace=0.02)]) == 0
    assert choose_reader([reading(pending=300, new=10), reading(pending=250, new=100)]) == 0, "its beginning is known"
    assert choose_reader([reading(pending=10, pace=None), reading(pending=20, pace=0.02)]) == 0, "new ones get a chance"


def test_a_slow_reader_gets_less_in_proportion():
    paces, pending, given_to = [0.01, 0.03], [0, 0], [0, 0]
    for _ in range(400):
        place = choose_reader([reading(pending=tokens, pace=pace) for tokens, pace in zip(pending, paces, strict=True)])
        pending[place] += 100
        given_to[place] += 1
    assert given_to == [300, 100]


def test_a_request_goes_to_the_decoder_with_most_room_of_what_is_scarce():
    assert choose_decoder([decoding(requests=3), decoding(requests=2)]) == 1
    assert choose_decoder([decoding(requests=2, pages=50), decoding(requests=8, pages=10)]) == 1, "pages are scarcer"
    assert choose_decoder([decoding(requests=4, pages=40, new=1), decoding(requests=4, pages=40, new=8)]) == 0
    assert choose_decoder([decoding(requests=4, step=0.03), decoding(requests=9)]) == 1, (
        "the first is three times slower"
    )


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 64), st.floats(0.001, 1)), min_size=1, max_size=6))
def test_one_without_room_is_taken_only_where_none_has_any(states):
    workers = [decoding(requests=requests, pages=pages, step=step) for requests, pages, step in states]
    fits = [w.num_requests < 16 and w.pages + w.new_pages <= 64 for w in workers]
    assert fits[choose_decoder(workers)] or not any(fits)


def test_prefixes_are_found_from_the_beginning_on_and_the_oldest_forgotten():
    one, other = (page_keys(list(range(first, first + 40)), page_tokens=4) for first in (0, 1000))
    known = KnownPrefixes(most=14)
    known.add(one)
    assert (known.find(one), known.find(other), known.find(one[:3])) == (10, 0, 3)
    known.add(other)  # 20 pages of 14: the end of the first prompt goes first
    assert (known.find(other), known.find(one)) == (10, 4)


def test_the_pace_is_what_the_steps_say():
    pace = Pace()
    pace.take(EngineStats())
    assert (pace.seconds_per_token, pace.seconds_per_step) == (None, None)
    pace.take(EngineStats(num_read_tokens=100, num_steps=2, step_seconds=1.0))
    assert (pace.seconds_per_token, pace.seconds_per_step) == (0.01, 0.5)
    pace.take(EngineStats(num_read_tokens=100, num_steps=2, step_seconds=1.0))
    assert pace.seconds_per_token == 0.01, "nothing new"
    for step in range(3, 40):
        pace.take(EngineStats(num_read_tokens=50 * step, num_steps=step, step_seconds=2.0 * step - 3))
    assert 0.039 < pace.seconds_per_token < 0.041, "it follows what changes"
