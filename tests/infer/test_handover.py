"""What one engine reads and another continues is answered as one engine answers it."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3.errors import ConfigError
from dsv3.infer.events import FinishReason

from .test_engine import (
    RUNNERS,
    Counting,
    answers,
    either_runner,
    engine_of,
    finish,
    mixed_requests,
    new_runner,
    packed,
    prompt_of,
    request_of,
    tokens_of,
)

__all__ = ["either_runner", "new_runner"]


class Here:
    """The way to an engine of the same process, which notes what has gone."""

    def __init__(self, engine, request):
        self.first_page = engine.expect(request)
        self.sent = []
        self.handover = None
        self._engine = engine
        self._id = request.id

    def send(self, entries, *, first_page):
        assert self.handover is None, "pages come after the end"
        self.sent.append(range(first_page, first_page + entries.shape[1]))
        self._engine.write(self._id, entries=entries, first_page=first_page)

    def finish(self, handover):
        self.handover = handover
        self._engine.adopt(self._id, handover)


def hand_over(reading, going_on, requests):
    """Read on one engine and go on on the other; return all events by request, and the ways they went."""
    ways = {request.id: Here(going_on, request) for request in requests}
    first = finish(reading, [replace(request, hand_to=ways[request.id]) for request in requests])
    for request in requests:
        if ways[request.id].handover is None:
            going_on.cancel(request.id)
    then = finish(going_on)
    return {name: [*of_one, *then.get(name, [])] for name, of_one in first.items()}, ways


def without_the_change(events):
    """Events as one engine tells them."""
    return {
        name: [e for e in of_one if e.finish_reason is not FinishReason.HANDED_OVER or e.tokens]
        for name, of_one in events.items()
    }


@pytest.mark.parametrize("drafts", [0, 2])
def test_a_request_handed_over_is_answered_as_by_one_engine(either_runner, drafts):
    requests = mixed_requests()
    expected = answers(engine_of(either_runner(2), max_drafts=drafts), requests)
    changes = {"max_drafts": drafts, "max_step_tokens": 7, "num_pages": 128}
    reading, going_on = (engine_of(either_runner(2), **changes) for _ in range(2))
    events, ways = hand_over(reading, going_on, requests)
    assert tokens_of(without_the_change(events)) == expected
    assert sum(way.handover is not None for way in ways.values()) > len(requests) / 2
    assert going_on.stats().num_prompt_tokens == 0, "nothing is read twice"


def test_pages_go_over_while_the_prompt_is_read_and_each_of_them_once(new_runner):
    request = request_of("a", prompt_of(30))
    reading, going_on = engine_of(new_runner(), max_step_tokens=8), engine_of(new_runner())
    way = Here(going_on, request)
    reading.add(replace(request, hand_to=way))
    seen = []
    while reading.has_work:
        reading.step()
        seen.append(sum(map(len, way.sent)))
    assert seen == [2, 4, 6, 8]  # pages of 4 tokens, the last one half full
    assert [page for pages in way.sent for page in pages] == list(range(8))


@pytest.mark.parametrize("drafts", [0, 1])
def test_what_the_other_engine_has_in_its_prefix_cache_does_not_go_over(new_runner, drafts):
    prompt = prompt_of(30)
    reading, going_on = (engine_of(new_runner(), max_drafts=drafts) for _ in range(2))
    first, _ = hand_over(reading, going_on, [request_of("a", prompt)])
    again, ways = hand_over(reading, going_on, [request_of("b", prompt)])
    assert tokens_of(first)["a"] == tokens_of(again)["b"]
    assert ways["b"].first_page == 7
    assert [page for pages in ways["b"].sent for page in pages] == [7]


def test_an_engine_that_reads_a_prompt_again_sends_no_page_twice(new_runner):
    """Four requests want 28 pages of 20: those that came last give theirs up and are read again."""
    requests = [request_of(str(place), prompt_of(26, seed=place), max_tokens=9) for place in range(4)]
    expected = answers(engine_of(new_runner()), requests)
    reading = engine_of(new_runner(), num_pages=20, max_step_tokens=6, prefix_caching=False)
    events, ways = hand_over(reading, engine_of(new_runner()), requests)
    assert tokens_of(events) == expected
    for way in ways.values():
        pages = [page for pages in way.sent for page in pages]
        assert pages == sorted(set(pages))


def test_a_grammar_goes_on_where_it_stood(new_runner):
    def ask(**changes):
        return replace(request_of("a", prompt_of(5), max_tokens=60, constraint=Counting()), **changes)

    expected = answers(engine_of(new_runner()), [ask()])["a"]
    reading, going_on = engine_of(new_runner()), engine_of(new_runner())
    way = Here(going_on, ask())
    first = finish(reading, [ask(hand_to=way)])
    assert [*tokens_of(first)["a"], *tokens_of(finish(going_on))["a"]] == expected


def test_a_request_that_ends_with_its_first_token_is_not_handed_over(new_runner):
    events, ways = hand_over(
        engine_of(new_runner()), engine_of(new_runner()), [request_of("a", prompt_of(9), max_tokens=1)]
    )
    assert events["a"][0].finish_reason is FinishReason.MAX_TOKENS
    assert ways["a"].handover is None


def test_there_is_room_or_there_is_not_and_then_nothing_is_held(new_runner):
    engine = engine_of(new_runner(), num_pages=8, max_sequences=2)
    assert engine.expect(request_of("a", prompt_of(20))) == 0
    assert engine.expect(request_of("b", prompt_of(20))) is None
    engine.check()
    assert not engine.has_work
    engine.cancel("a")
    assert engine.expect(request_of("b", prompt_of(20))) == 0
    assert engine.expect(request_of("c", prompt_of(3))) == 0
    engine.cancel("c")
    engine.step()
    assert engine.expect(request_of("d", prompt_of(3))) == 0
    assert engine.expect(request_of("e", prompt_of(1))) is None  # two at once is the limit
    for name in "bd":
        engine.cancel(name)
    engine.step()
    engine.check()
    assert engine.stats().num_pages_in_use == 0


@settings(deadline=None, max_examples=15)
@given(st.data())
def test_an_answer_that_is_begun_elsewhere_goes_on_as_it_would_have(data):
    request = data.draw(st.sampled_from(mixed_requests()))
    drafts = data.draw(st.integers(0, 2))
    whole = answers(engine_of(packed(), max_drafts=drafts), [request])[request.id]
    known = data.draw(st.integers(0, max(0, len(whole) - 1)))
    rest = replace(request, answer_ids=whole[:known])
    engine = engine_of(packed(), max_drafts=drafts, max_step_tokens=9)
    assert answers(engine, [rest])[request.id] == whole[known:]


def test_an_answer_that_is_begun_elsewhere_can_be_handed_over_too():
    request = request_of("a", prompt_of(10), temperature=1.0, seed=4, frequency_penalty=0.5, max_tokens=20)
    whole = answers(engine_of(packed()), [request])["a"]
    rest = replace(request, answer_ids=whole[:6])
    events, _ = hand_over(engine_of(packed()), engine_of(packed()), [rest])
    assert tokens_of(events)["a"] == whole[6:]


def test_an_answer_that_is_whole_already_is_refused():
    request = replace(request_of("a", prompt_of(4), max_tokens=2), answer_ids=[5, 6])
    with pytest.raises(ConfigError, match="answer_ids has 2 tokens, and max_tokens = 2"):
        engine_of(packed()).add(request)


@pytest.mark.parametrize("kind", RUNNERS)
def test_pages_hold_elsewhere_what_they_held(kind, our_kernels):
    runners = [RUNNERS[kind]() for _ in range(2)]
    engines = [engine_of(runner) for runner in runners]
    finish(engines[0], [request_of("a", prompt_of(12), max_tokens=4)])
    entries = runners[0].read_pages([0, 1, 2, 3])
    runners[1].write_pages([5, 1, 9, 0], entries=entries)
    assert entries.shape[:3] == (3, 4, 4)  # two layers and an MTP module, four pages of four tokens
    assert (entries != 0).any()
    assert runners[1].read_pages([5, 1, 9, 0]).equal(entries)
