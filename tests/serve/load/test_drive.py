"""Loads on a server whose delays are known: what is measured must be those."""

import asyncio
import time
from contextlib import suppress

import pytest

from dsv3.errors import ConfigError
from dsv3.serve.load import LoadConfig, run_load, summarise
from dsv3.serve.load.arrivals import poisson_arrivals
from dsv3.serve.load.client import start_clock
from dsv3.serve.load.drive import closed_loop, open_loop
from dsv3.serve.load.lengths import Lengths
from dsv3.serve.load.workload import read_text

TEXT = read_text(None)
PIECES = [{"content": "word "}] * 5
USAGE = {
    "prompt_tokens": 100,
    "completion_tokens": 9,
    "prompt_tokens_details": {"cached_tokens": 64},
    "completion_tokens_details": {"accepted_prediction_tokens": 4, "rejected_prediction_tokens": 1},
}


def load(server, *, url: str = "", api_key: str = "", **settings):
    outcomes = []
    ended = []
    config = LoadConfig(prompt_tokens=Lengths(low=20, high=20), **settings)
    asyncio.run(
        run_load(
            config,
            url=url or server.url,
            text=TEXT,
            outcomes=outcomes,
            api_key=api_key,
            on_end=lambda: ended.append(None),
        )
    )
    assert len(ended) == len(outcomes)
    return outcomes


@pytest.mark.parametrize("endpoint", ["completions", "chat"])
def test_known_delays_come_out(server, scripted, endpoint):
    server.scripts = [scripted.Script(deltas=PIECES, usage=USAGE, seconds_to_first=0.1, seconds_between=0.03)]
    summary = summarise(load(server, clients=2, num_requests=4, endpoint=endpoint))
    assert (summary.num_whole, summary.errors, summary.num_uncounted) == (4, {}, 0)
    # A sleep never ends early; how late it ends depends on the machine, so the upper bounds are wide.
    assert 0.1 <= summary.time_to_first_token.p50 < 0.2
    assert 0.03 * 4 / 8 <= summary.time_per_token.p50 < 0.03  # four gaps for the eight tokens after the first
    assert 0.025 <= summary.gap.p50 < 0.06
    assert 0.22 <= summary.latency.p50 < 0.4
    assert summary.seconds >= 2 * 0.22
    assert summary.cached_share == pytest.approx(0.64)
    assert summary.draft_acceptance == pytest.approx(0.8)
    assert summary.output_tokens == 9


def test_a_closed_loop_has_so_many_requests_under_way_and_no_more(server, scripted):
    server.scripts = [scripted.Script(deltas=PIECES, seconds_to_first=0.05)]
    outcomes = load(server, clients=3, num_requests=9)
    assert server.most_at_once == 3
    assert len(outcomes) == 9
    assert all(outcome.scheduled <= outcome.sent < outcome.scheduled + 0.05 for outcome in outcomes)


def test_an_open_loop_sends_at_its_times_whatever_the_server_does(server, scripted):
    server.scripts = [scripted.Script(deltas=PIECES, seconds_to_first=0.2)]
    outcomes = load(server, rate=40.0, num_requests=10, seed=5)
    scheduled = [time for time, _ in zip(poisson_arrivals(40.0, seed=5), range(10), strict=False)]
    assert sorted(outcome.scheduled for outcome in outcomes) == scheduled
    assert server.most_at_once > 3
    gaps = [later - server.times[1] for later in server.times[1:]]  # The first one was the warm-up.
    assert gaps == pytest.approx([time - scheduled[0] for time in scheduled], abs=0.08)


def test_waits_for_a_place_count_as_latency_in_an_open_loop(server, scripted, monkeypatch):
    monkeypatch.setattr("dsv3.serve.load.drive.MAX_IN_FLIGHT", 1)
    server.scripts = [scripted.Script(deltas=PIECES, seconds_to_first=0.06)]
    outcomes = load(server, rate=1000.0, num_requests=5)
    assert server.most_at_once == 1
    latencies = sorted(outcome.latency for outcome in outcomes)
    assert latencies[-1] > 0.29  # The last of five waited for the four before it.
    assert summarise(outcomes).send_delay.p99 > 0.2


def test_no_request_begins_after_the_duration(server, scripted):
    server.scripts = [scripted.Script(deltas=PIECES, seconds_to_first=0.05)]
    for kind in ({"clients": 2}, {"rate": 100.0}):
        began = time.monotonic()
        outcomes = load(server, num_requests=2000, duration_seconds=0.2, **kind)
        assert time.monotonic() - began < 5
        assert 3 <= len(outcomes) < 100
        assert max(outcome.scheduled for outcome in outcomes) < 0.2


def test_errors_are_counted_by_kind_and_leave_the_latencies_alone(server, scripted):
    server.scripts = [
        scripted.Script(deltas=PIECES),  # the warm-up
        scripted.Script(status=429, error={"message": "full"}),
        scripted.Script(deltas=PIECES, error={"message": "out of pages"}),
        scripted.Script(deltas=PIECES, is_cut=True),
        scripted.Script(raw="data: {oops\n\n"),
        scripted.Script(deltas=PIECES, seconds_to_first=60.0),
        scripted.Script(deltas=PIECES),
    ]
    outcomes = load(server, clients=1, num_requests=6, timeout_seconds=0.4)
    summary = summarise(outcomes)
    kinds = {"http 429": 1, "error in the stream": 1, "broken off": 1, "not JSON": 1, "timeout": 1}
    assert summary.errors == kinds
    assert summary.num_whole == 1
    assert summary.latency.p99 < 0.4
    assert "out of pages" in outcomes[1].detail
    assert server.hung_up.wait(timeout=5)


def test_tokens_that_the_server_does_not_count_are_counted_as_pieces(server, scripted):
    server.scripts = [scripted.Script(deltas=PIECES)]
    summary = summarise(load(server, clients=1, num_requests=2))
    assert (summary.num_uncounted, summary.output_tokens) == (2, 5)


def test_separators_of_unicode_within_a_piece_do_not_break_it(server, scripted):
    event = 'data: {"choices": [{"text": "a\u2028b\u0085c"}]}\r\n\r\n'
    server.scripts = [scripted.Script(raw=event + "data: [DONE]\r\n\r\n")]
    assert summarise(load(server, clients=1, num_requests=1)).errors == {}


def test_the_length_of_prompts_follows_the_tokens_the_server_counts(server, scripted):
    server.scripts = [
        scripted.Script(usage={"prompt_tokens": 200, "completion_tokens": 1})
    ]  # 400 characters: 2 a token
    load(server, clients=1, num_requests=3)
    assert {len(body["prompt"]) for body in server.received[1:]} == {40}
    assert {body["model"] for body in server.received} == {"tiny"}


def test_a_server_that_cannot_be_loaded_is_refused_before_the_load(server, scripted):
    with pytest.raises(ConfigError, match="no server answers at"):
        load(server, clients=1, url="http://127.0.0.1:1")
    server.key = "secret"
    with pytest.raises(ConfigError, match="does not list a model; it answers 401"):
        load(server, clients=1)
    assert load(server, clients=1, num_requests=1, api_key="secret")[0].error == ""
    server.scripts = [scripted.Script(status=400, error={"message": "no such model"})]
    with pytest.raises(ConfigError, match=r"first request: http 400: .*no such model"):
        load(server, clients=1, api_key="secret", model="other")


@pytest.mark.parametrize("settings", [{"clients": 3}, {"rate": 200.0}])
def test_who_is_told_to_stop_asks_no_more_even_if_a_request_took_that_for_itself(settings):
    """As a client may that closes a connection meanwhile."""
    config = LoadConfig(num_requests=10_000, **settings)
    asked = []

    async def ask(prompt, scheduled):
        asked.append(prompt)
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(0.02)

    async def use():
        loop = open_loop if config.rate else closed_loop
        load = asyncio.ensure_future(loop(config, prompts=iter(range(10_000)), ask=ask, clock=start_clock()))
        await asyncio.sleep(0.1)
        load.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(load, 5)

    asyncio.run(use())
    assert 3 <= len(asked) < 100
