"""Answers that do not depend on company: batches, chunks, pages, prefixes, preemption and drafts change no token."""

import math
import random
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3.batch import TokenBatch
from dsv3.checkpoint.names import published_layout
from dsv3.config import EngineConfig
from dsv3.errors import ConfigError
from dsv3.infer.engine import Engine
from dsv3.infer.events import FinishReason
from dsv3.infer.packed_model import pack_from_state
from dsv3.infer.packed_runner import PackedRunner
from dsv3.infer.params import SamplingParams
from dsv3.infer.request import Request
from dsv3.infer.runner import States, TorchRunner
from dsv3.model.transformer import Transformer

from .conftest import TINY

VOCAB, EOS = 60, 1


@cache
def model_of(depth=1, *, dtype=torch.float32):
    model = Transformer(replace(TINY, num_nextn_predict_layers=depth))
    model.init_weights(generator=torch.Generator().manual_seed(0))
    return model.requires_grad_(False).to(dtype)


def packed(depth=1):
    model = model_of(depth)
    layout = published_layout(model.config)
    return PackedRunner(pack_from_state(model.state_dict(), config=model.config, layout=layout, name="fp32"))


RUNNERS = {"packed": packed, "torch": lambda depth=1: TorchRunner(model_of(depth, dtype=torch.float64))}
"""The packed one is exact to the last bit; torch's sums depend on company, so it works in FP64, far from ties."""


@pytest.fixture
def new_runner(our_kernels):
    return packed


@pytest.fixture(params=RUNNERS)
def either_runner(request, our_kernels):
    return RUNNERS[request.param]


def engine_of(runner, **changes):
    settings = {"page_tokens": 4, "num_pages": 64, "max_drafts": 0, "adaptive_drafts": False}
    return Engine(runner, config=EngineConfig(**(settings | changes)), vocab_size=VOCAB, eos_id=EOS)


def prompt_of(length, *, seed=0):
    return torch.randint(2, VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def request_of(name, prompt, *, constraint=None, num_logprobs=None, prompt_logprobs=False, **params):
    return Request(
        id=name,
        prompt_ids=prompt,
        params=SamplingParams(**({"temperature": 0.0, "max_tokens": 12} | params)),
        constraint=constraint,
        num_logprobs=num_logprobs,
        prompt_logprobs=prompt_logprobs,
    )


def finish(engine, requests=(), *, most_steps=2000):
    """Run until all is done; return events by request, checking the books after every step."""
    for request in requests:
        engine.add(request)
    events = {}
    for _ in range(most_steps):
        if not engine.has_work:
            break
        for event in engine.step():
            events.setdefault(event.id, []).append(event)
        engine.check()
    else:
        raise AssertionError(f"{most_steps} steps were not enough")
    assert engine.stats().num_pages_in_use == 0
    return events


def tokens_of(events):
    return {name: [token for event in of_one for token in event.tokens] for name, of_one in events.items()}


def answers(engine, requests):
    return tokens_of(finish(engine, requests))


def mixed_requests(count=8):
    """Greedy and seeded, short and long, with penalties, bias and stop tokens, some beginning alike."""
    chance = random.Random(3)
    requests = []
    for place in range(count):
        params = {
            "temperature": 0.0 if place % 2 else 1.0,
            "seed": place,
            "max_tokens": chance.randint(1, 30),
            "frequency_penalty": 0.4 if place % 3 == 0 else 0.0,
            "repetition_penalty": 1.2 if place % 4 == 1 else 1.0,
            "logit_bias": ((7, 1.5),) if place % 5 == 2 else (),
            "stop_token_ids": (9,) if place % 3 == 1 else (),
        }
        requests.append(request_of(str(place), prompt_of(chance.randint(1, 40), seed=place % 3), **params))
    return requests


def alone(new_runner, requests, **changes):
    return {request.id: answers(engine_of(new_runner(), **changes), [request])[request.id] for request in requests}


def test_a_request_beside_others_is_answered_as_alone(either_runner):
    assert answers(engine_of(either_runner()), mixed_requests()) == alone(either_runner, mixed_requests())


@pytest.mark.parametrize(
    "changes",
    [
        {"max_step_tokens": 1},
        {"max_step_tokens": 7},
        {"max_sequences": 1},
        {"page_tokens": 1, "num_pages": 200},
        {"prefix_caching": False},
        {"page_tokens": 64, "num_pages": 3},
    ],
    ids=str,
)
def test_chunks_and_pages_change_no_answer(new_runner, changes):
    assert answers(engine_of(new_runner(), **changes), mixed_requests()) == answers(
        engine_of(new_runner()), mixed_requests()
    )


def test_requests_that_have_to_give_up_their_pages_are_answered_all_the_same(new_runner):
    def ask():
        return [
            request_of(str(seed), prompt_of(5, seed=seed), seed=seed, temperature=1.0, max_tokens=40, ignore_end=True)
            for seed in range(6)
        ]

    expected = answers(engine_of(new_runner(), num_pages=128), ask())
    for drafts in (0, 2):
        tight = engine_of(new_runner(), num_pages=20, max_step_tokens=16, max_drafts=drafts)
        assert answers(tight, ask()) == expected
        assert tight.stats().num_preemptions > 0


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("drafts", [1, 2, 3, 4])
def test_drafts_change_no_token(new_runner, drafts, depth):
    plain = answers(engine_of(new_runner(depth)), mixed_requests())
    for changes in ({}, {"num_pages": 20, "max_step_tokens": 9}, {"adaptive_drafts": True}):
        engine = engine_of(new_runner(depth), max_drafts=drafts, **changes)
        events = finish(engine, mixed_requests())
        assert tokens_of(events) == plain
        check_counts(engine.stats(), events)


def check_counts(stats, events):
    """What events say of drafts and tokens sums up to what the engine counted."""
    every = [event for of_one in events.values() for event in of_one]
    assert sum(stats.drafted_at) == sum(event.num_drafted for event in every) > 0
    assert sum(stats.accepted_at) == sum(event.num_accepted for event in every) > 0
    assert stats.num_generated_tokens == sum(len(event.tokens) for event in every)
    assert sorted(stats.drafted_at, reverse=True) == stats.drafted_at
    assert sorted(stats.accepted_at, reverse=True) == stats.accepted_at
    for event in every:
        assert event.num_accepted <= min(event.num_drafted, len(event.tokens))
    assert sum(stats.finished.values()) == len(events)
    assert stats.num_prompt_tokens == sum(of_one[0].num_prompt_tokens for of_one in events.values())
    assert stats.num_cached_tokens == sum(of_one[0].num_cached_tokens for of_one in events.values())


def test_drafts_change_no_token_of_the_model_that_trains():
    new_runner = RUNNERS["torch"]
    plain = answers(engine_of(new_runner(2)), mixed_requests(5))
    assert answers(engine_of(new_runner(2), max_drafts=3, max_step_tokens=9), mixed_requests(5)) == plain


def test_a_model_that_is_never_at_a_loss_for_a_token_of_the_padding_says_none(new_runner):
    """Its rows from `vocab_size` on score as others do, and are left out everywhere."""
    requests = [request_of(str(seed), prompt_of(4), seed=seed, temperature=50.0, top_p=1.0) for seed in range(30)]
    for drafts in (0, 2):
        said = answers(engine_of(new_runner(), max_drafts=drafts), requests)
        assert max(token for tokens in said.values() for token in tokens) < VOCAB


def test_a_text_that_begins_alike_is_found_in_the_cache_and_answered_alike(either_runner):
    engine, prompt = engine_of(either_runner(), max_drafts=1), prompt_of(21)
    first = finish(engine, [request_of("a", prompt)])
    again = finish(engine, [request_of("b", prompt)])
    other = prompt[:10] + prompt_of(9, seed=5)
    branched = finish(engine, [request_of("c", other)])
    assert tokens_of(again)["b"] == tokens_of(first)["a"]
    assert tokens_of(branched)["c"] == answers(engine_of(either_runner()), [request_of("c", other)])["c"]
    assert [events[0].num_cached_tokens for events in (first["a"], again["b"], branched["c"])] == [0, 20, 8]


def test_a_second_turn_finds_the_answer_of_the_first(new_runner):
    engine, prompt = engine_of(new_runner()), prompt_of(9)
    said = answers(engine, [request_of("a", prompt, max_tokens=11, ignore_end=True)])["a"]
    events = finish(engine, [request_of("b", [*prompt, *said, *prompt_of(3, seed=8)])])
    assert events["b"][0].num_cached_tokens == 16  # of 20, of which the last was never read


def test_prompts_that_begin_alike_and_come_together_are_computed_once(new_runner):
    engine, prompt = engine_of(new_runner(), max_step_tokens=16), prompt_of(40)
    events = finish(engine, [request_of(str(place), [*prompt, 5 + place]) for place in range(4)])
    assert [events[str(place)][0].num_cached_tokens for place in range(4)] == [0, 40, 40, 40]


class Counting:
    """A toy grammar: tokens must rise by one to three, and from 50 on nothing but the end may follow."""

    def __init__(self, log=None):
        self.state = [10]
        self.log = log

    @property
    def finished(self):
        return self.state[-1] >= 50

    def allowed(self, *, vocab_size):
        mask = np.zeros(vocab_size, dtype=np.bool_)
        if self.finished:
            mask[EOS] = True
        else:
            mask[self.state[-1] + 1 : self.state[-1] + 4] = True
        return mask

    def advance(self, token):
        ok = not self.finished and self.state[-1] < token <= self.state[-1] + 3
        if ok:
            self.state.append(token)
        return ok

    def roll_back(self, count):
        assert count < len(self.state)
        del self.state[len(self.state) - count :]


@pytest.mark.parametrize("drafts", [0, 1, 3])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_grammar_is_obeyed_and_moves_back_with_wrong_drafts(new_runner, drafts, temperature):
    def ask():
        return request_of("a", prompt_of(5), constraint=Counting(), max_tokens=60, temperature=temperature, seed=3)

    events = finish(engine_of(new_runner(), max_drafts=drafts), [ask()])
    said = tokens_of(events)["a"]
    assert all(1 <= later - earlier <= 3 for earlier, later in zip([10, *said], said, strict=False))
    assert events["a"][-1].finish_reason is FinishReason.END_OF_TEXT
    assert said == answers(engine_of(new_runner()), [ask()])["a"]


def test_what_a_grammar_ends_is_ended_also_for_those_who_ignore_the_end(new_runner):
    asked = request_of("a", prompt_of(5), constraint=Counting(), max_tokens=60, ignore_end=True)
    assert finish(engine_of(new_runner()), [asked])["a"][-1].finish_reason is FinishReason.END_OF_TEXT


class Scripted:
    """A runner that says a fixed text, and whose module guesses it right, or wrong, or not at all."""

    config = replace(TINY, num_nextn_predict_layers=1)
    num_mtp_modules = 1
    bytes_per_token = 1
    device = torch.device("cpu")

    def __init__(self, *, right=True, rows=None):
        self.right = right
        self.rows = rows
        self.passes = []

    def make_pages(self, *, num_pages, page_tokens):
        pass

    def forward(self, batch, *, pages, with_experts=False):
        assert batch.positions.max() < self.config.max_position_embeddings
        self.passes.append(batch.num_tokens)
        hidden = batch.positions[:, None].float()
        return States(hidden=hidden, handed_on=hidden)

    def predict_ahead(self, state, *, depth, batch, pages):
        assert torch.equal(state[:, 0].abs().long(), batch.positions)  # the state of the very position
        return States(hidden=-1.0 - batch.positions[:, None].float(), handed_on=-1.0 * state.abs() - 1.0)

    def read_pages(self, pages):
        raise AssertionError("nothing is handed over here")

    write_pages = read_pages

    def logits(self, hidden):
        logits = torch.zeros(len(hidden), self.config.vocab_size)
        for row, place in zip(logits, hidden[:, 0].tolist(), strict=True):
            is_draft = place < 0
            token = 2 + (int(-place) if is_draft else int(place)) % 50
            row[token if self.right or not is_draft else 2 + (token + 5) % 50] = 9.0
        return logits


@pytest.mark.parametrize(("right", "steps"), [(True, 5), (False, 17)])
def test_right_drafts_give_one_token_more_a_step_each_and_wrong_ones_cost_nothing_but_time(right, steps):
    runner = Scripted(right=right)
    events = finish(engine_of(runner, max_drafts=3), [request_of("a", [5, 6, 7], max_tokens=17)])
    assert tokens_of(events)["a"] == [2 + place for place in range(2, 19)]
    assert len(runner.passes) == steps  # the prompt's own token, then 4 a step, or 1
    drafted, accepted = (sum(getattr(event, name) for event in events["a"]) for name in ("num_drafted", "num_accepted"))
    assert (accepted > 0) == right
    assert drafted > accepted or right


def test_modules_read_what_they_read_in_training(our_kernels):
    """States, tokens and positions of every pass of a module, whatever was accepted before, are those of training."""
    model = model_of(2, dtype=torch.float64)
    runner = TorchRunner(model)
    seen = {}
    original = runner.predict_ahead

    def spy(state, *, depth, batch, pages):
        states = original(state, depth=depth, batch=batch, pages=pages)
        for place, position in enumerate(batch.positions.tolist()):
            seen[depth, position] = (int(batch.tokens[place]), states.hidden[place])
        return states

    runner.predict_ahead = spy
    said = answers(
        engine_of(runner, max_drafts=3), [request_of("a", prompt_of(9), max_tokens=20, seed=2, temperature=1.0)]
    )["a"]
    text = [*prompt_of(9), *said]
    whole = model(TokenBatch.from_sequences([text]), mtp=True)
    for module, output in enumerate(whole.mtp):
        # The last few positions read drafts, and there was no time to make them anew.
        for position in range(len(text) - 6):
            token, hidden = seen[module, position]
            assert token == text[position + module + 1]
            torch.testing.assert_close(hidden, output.hidden[position])


def test_log_probabilities_are_the_models(either_runner):
    prompt = prompt_of(11)
    asked = request_of(
        "a", prompt, max_tokens=9, num_logprobs=3, prompt_logprobs=True, temperature=1.0, seed=1, ignore_end=True
    )
    events = finish(engine_of(either_runner(), max_step_tokens=4, max_drafts=1), [asked])["a"]
    said = [token for event in events for token in event.tokens]
    model = model_of(dtype=torch.float64)
    logits = model.logits(model(TokenBatch.from_sequences([[*prompt, *said]])).hidden)[:, :VOCAB].log_softmax(-1)
    found = [*events[0].prompt_logprobs[1:], *(entry for event in events for entry in event.logprobs)]
    text = [*prompt, *said]
    assert events[0].prompt_logprobs[0] is None
    assert [entry.token for entry in found] == text[1:]
    assert [entry.logprob for entry in found] == pytest.approx(
        [float(logits[i, t]) for i, t in enumerate(text[1:])], abs=1e-4
    )
    for place, entry in enumerate(found):
        top = logits[place].topk(3)
        assert [token for token, _ in entry.top] == top.indices.tolist()
        assert [value for _, value in entry.top] == pytest.approx(top.values.tolist(), abs=1e-4)


def test_drawn_tokens_follow_the_models_distribution_with_and_without_drafts(our_kernels):
    """The first two tokens of many seeds, against the probabilities of the full forward; chi-square."""
    prompt, draws = prompt_of(4), 600
    model = model_of(dtype=torch.float64)
    first = model.logits(model(TokenBatch.from_sequences([prompt])).hidden)[-1, :VOCAB]
    for drafts in (0, 2):
        engine = engine_of(packed(), max_drafts=drafts, num_pages=512, max_sequences=128)
        requests = [
            request_of(
                str(seed), prompt, seed=seed, temperature=0.7, top_p=1.0, max_tokens=3, logit_bias=((EOS, -100.0),)
            )
            for seed in range(draws)
        ]
        said = answers(engine, requests)
        biased = first.clone()
        biased[EOS] -= 100
        expected = (biased / 0.7).softmax(-1)
        check_distribution([tokens[0] for tokens in said.values()], expected)
        likeliest = int(expected.argmax())
        after = model.logits(model(TokenBatch.from_sequences([[*prompt, likeliest]])).hidden)[-1, :VOCAB].clone()
        after[EOS] -= 100
        check_distribution([tokens[1] for tokens in said.values() if tokens[0] == likeliest], (after / 0.7).softmax(-1))


def check_distribution(drawn, probabilities):
    counts = torch.bincount(torch.tensor(drawn), minlength=VOCAB).double()
    expected = probabilities * len(drawn)
    common = expected >= 5
    observed = torch.cat([counts[common], counts[~common].sum()[None]])
    wanted = torch.cat([expected[common], expected[~common].sum()[None]])
    statistic = float(((observed - wanted) ** 2 / wanted.clamp_min(1e-9)).sum())
    freedom = len(wanted) - 1
    assert statistic < freedom + 4.5 * math.sqrt(2 * freedom) + 8


def test_drafts_are_right_as_often_as_the_coupling_promises(our_kernels):
    """With main p and module q both fixed, a draft is right with probability between (1 - d) / (1 + d) and 1 - d."""
    p, q = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.3, 0.5, 0.2])
    distance = float((p - q).abs().sum()) / 2

    class Fixed(Scripted):
        def logits(self, hidden):
            logits = torch.full((len(hidden), self.config.vocab_size), -99.0)
            logits[:, 2:5] = torch.where(hidden < 0, q.log(), p.log())
            return logits

    engine = engine_of(Fixed(), max_drafts=2, num_pages=400)
    finish(
        engine,
        [request_of(str(seed), [5], seed=seed, temperature=1.0, top_p=1.0, max_tokens=100) for seed in range(12)],
    )
    stats = engine.stats()
    for accepted, tried in zip(stats.accepted_at, (stats.drafted_at[0], stats.accepted_at[0]), strict=True):
        slack = 4 * math.sqrt(0.25 / tried)
        assert (1 - distance) / (1 + distance) - slack <= accepted / tried <= 1 - distance + slack


@pytest.mark.parametrize("drafts", [0, 3])
def test_an_answer_ends_where_it_must_also_within_right_drafts(drafts):
    def end_of(**params):
        (event,) = (
            event
            for event in finish(engine_of(Scripted(), max_drafts=drafts), [request_of("a", [5, 6, 7], **params)])["a"]
            if event.finish_reason
        )
        return event.finish_reason

    def said(**params):
        return tokens_of(finish(engine_of(Scripted(), max_drafts=drafts), [request_of("a", [5, 6, 7], **params)])).get(
            "a", []
        )

    counted = engine_of(Scripted(), max_drafts=drafts)
    finish(counted, [request_of("a", [5, 6, 7], max_tokens=6)])
    assert counted.stats().drafted_at == counted.stats().accepted_at  # none that could not have counted
    assert (said(max_tokens=6), end_of(max_tokens=6)) == ([4, 5, 6, 7, 8, 9], FinishReason.MAX_TOKENS)
    stopped = {"stop_token_ids": (9,), "max_tokens": 40}
    assert (said(**stopped), end_of(**stopped)) == ([4, 5, 6, 7, 8], FinishReason.END_OF_TEXT)
    assert (len(said(max_tokens=None)), end_of(max_tokens=None)) == (125, FinishReason.CONTEXT_LIMIT)


def test_cancelling_frees_the_pages_at_once_whatever_a_request_is_doing(new_runner):
    engine = engine_of(new_runner(), num_pages=24, max_step_tokens=8, max_drafts=1)
    for name, length in (("decoding", 3), ("reading", 40), ("waiting", 60)):
        engine.add(request_of(name, prompt_of(length), max_tokens=50, ignore_end=True))
    for _ in range(2):
        engine.step()
    for name in ("waiting", "reading", "decoding", "never there"):
        engine.cancel(name)
        engine.check()
    assert engine.stats().num_pages_in_use == 0
    events = finish(engine)
    assert {name: [event.finish_reason for event in of_one] for name, of_one in events.items()} == {
        name: [FinishReason.CANCELLED] for name in ("waiting", "reading", "decoding")
    }


def test_what_breaks_in_one_request_ends_that_request_alone(new_runner):
    class Breaking(Counting):
        def allowed(self, *, vocab_size):
            if len(self.state) > 3:
                raise RuntimeError("the grammar broke")
            return super().allowed(vocab_size=vocab_size)

    good = request_of("good", prompt_of(6), max_tokens=20)
    expected = answers(engine_of(new_runner()), [good])["good"]
    for drafts in (0, 2):
        events = finish(
            engine_of(new_runner(), max_drafts=drafts),
            [good, request_of("bad", prompt_of(7), constraint=Breaking(), max_tokens=20)],
        )
        assert tokens_of(events)["good"] == expected
        assert events["bad"][-1].finish_reason is FinishReason.FAILED
        assert "the grammar broke" in events["bad"][-1].error


def test_log_probabilities_of_a_prompt_that_is_read_again_come_once(new_runner):
    """The second prompt gives up its pages when it is half read."""
    asked = request_of("b", prompt_of(30), num_logprobs=0, prompt_logprobs=True, max_tokens=1)
    (expected,) = finish(engine_of(new_runner()), [asked])["b"]
    assert len(expected.prompt_logprobs) == 30
    engine = engine_of(new_runner(), num_pages=10, max_step_tokens=4)
    events = finish(engine, [request_of("a", prompt_of(3, seed=1), max_tokens=20, ignore_end=True), asked])
    assert engine.stats().num_preemptions > 0
    assert events["b"][0].prompt_logprobs == expected.prompt_logprobs


def test_logits_that_are_not_numbers_end_their_own_request(new_runner):
    class Damaged(Scripted):
        def logits(self, hidden):
            logits = super().logits(hidden)
            logits[hidden[:, 0] == 12, 20] = math.nan
            return logits

    short, long = request_of("short", [5, 6], max_tokens=6), request_of("long", [5, 6], max_tokens=30)
    for drafts in (0, 2):
        events = finish(engine_of(Damaged(), max_drafts=drafts), [short, long])
        assert events["short"][-1].finish_reason is FinishReason.MAX_TOKENS
        assert events["long"][-1].finish_reason is FinishReason.FAILED
        assert "not numbers" in events["long"][-1].error
        assert tokens_of(events)["long"] == [3 + place for place in range(11)]


def test_a_module_whose_logits_are_not_numbers_drafts_nothing_and_harms_nobody():
    class Damaged(Scripted):
        def logits(self, hidden):
            return super().logits(hidden).masked_fill(hidden < -10, math.nan)

    events = finish(engine_of(Damaged(), max_drafts=2), [request_of("a", [5, 6], max_tokens=30)])
    assert tokens_of(events)["a"] == [3 + place for place in range(30)]
    assert events["a"][0].num_drafted == events["a"][-1].num_drafted == 0 < events["a"][1].num_drafted


@pytest.mark.parametrize("method", ["advance", "roll_back"])
def test_a_grammar_that_breaks_while_it_is_moved_over_drafts_ends_its_request_alone(method):
    class Breaking(Counting):
        def advance(self, token):
            assert method != "advance" or len(self.state) < 3
            return super().advance(token)

        def roll_back(self, count):
            raise RuntimeError

    good = request_of("good", [5, 6], max_tokens=20)
    engine = engine_of(Scripted(), max_drafts=2)
    events = finish(engine, [good, request_of("bad", [5], constraint=Breaking())])
    assert tokens_of(events)["good"] == [3 + place for place in range(20)]
    assert events["bad"][-1].finish_reason is FinishReason.FAILED
    assert len(tokens_of(events)["bad"]) == 1
    check_counts(engine.stats(), events)


def test_where_drafting_fails_what_was_drawn_before_is_told_and_the_engine_goes_on():
    runner = Scripted()
    engine = engine_of(runner, max_drafts=2)
    original, runner.predict_ahead = runner.predict_ahead, lambda *_, **__: (_ for _ in ()).throw(KeyError("depth"))
    events = finish(engine, [request_of("a", [5, 6]), request_of("done", [5], max_tokens=1)])
    assert tokens_of(events) == {"a": [3], "done": [2]}
    assert events["done"][-1].finish_reason is FinishReason.MAX_TOKENS
    assert (events["a"][-1].finish_reason, events["a"][-1].error) == (FinishReason.FAILED, "KeyError('depth')")
    runner.predict_ahead = original
    more = finish(engine, [request_of("b", [5], max_tokens=9)])
    assert tokens_of(more)["b"] == [2 + place for place in range(9)]
    check_counts(engine.stats(), events | more)


def test_a_pass_that_fails_ends_its_requests_and_the_engine_goes_on():
    runner = Scripted()
    engine = engine_of(runner, max_drafts=1)
    original, runner.forward = runner.forward, lambda *_, **__: (_ for _ in ()).throw(RuntimeError("out of memory"))
    events = finish(engine, [request_of("a", [5]), request_of("b", [6])])
    assert all("out of memory" in events[name][-1].error for name in "ab")
    runner.forward = original
    assert finish(engine, [request_of("c", [5])])["c"][-1].finish_reason is FinishReason.MAX_TOKENS


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (request_of("a", []), "no tokens"),
        (request_of("a", [3, 99]), "token id 99 at place 1"),
        (request_of("a", [5] * 128), "128 tokens, and the model's context is 128 .* at most 127"),
        (request_of("a", [5], logit_bias=((61, 1.0),)), "token id 61 at place 0 of logit_bias"),
        (request_of("a", [5], stop_token_ids=(70,)), "of stop_token_ids"),
        (request_of("a", [5, 61], prompt_logprobs=True), "token id 61 at place 1 is outside .* of 60"),
    ],
)
def test_what_can_never_run_is_refused_and_leaves_no_trace(request_, message):
    engine = engine_of(Scripted())
    with pytest.raises(ConfigError, match=message):
        engine.add(request_)
    assert not engine.has_work
    small = engine_of(Scripted(), num_pages=5)
    with pytest.raises(ConfigError, match="all pages of the engine's cache hold 20"):
        small.add(request_of("b", [5] * 20))
    engine.add(request_of("c", [5]))
    with pytest.raises(ConfigError, match="'c' is being worked on"):
        engine.add(request_of("c", [5]))


def test_a_text_is_read_between_steps_and_leaves_no_page_behind(new_runner):
    engine, text = engine_of(new_runner(), num_pages=8), prompt_of(10)
    engine.add(request_of("a", prompt_of(9), max_tokens=9, ignore_end=True))
    engine.step()
    held = engine.stats().num_pages_in_use
    model = model_of()
    expected = model.logits(model(TokenBatch.from_sequences([text])).hidden)
    torch.testing.assert_close(engine.read(text), expected, atol=1e-4, rtol=1e-4)
    for wrong, message in ((prompt_of(30), "30 tokens do not fit the 20 "), ([5, 99], "token id 99 at place 1")):
        with pytest.raises(ConfigError, match=message):
            engine.read(wrong)
    assert engine.stats().num_pages_in_use == held
    expected = answers(engine_of(new_runner()), [request_of("a", prompt_of(9), max_tokens=9, ignore_end=True)])["a"]
    assert expected[1:] == tokens_of(finish(engine))["a"]


def test_lengths_are_tried_also_where_one_request_never_has_a_draft():
    class Ending(Scripted):
        """Its module guesses that the text ends, which is never drafted."""

        def logits(self, hidden):
            logits = super().logits(hidden)
            logits[hidden[:, 0] < 0, EOS] = 99.0
            return logits

    engine, recorded = engine_of(Ending(), max_drafts=2, adaptive_drafts=True), []
    original = engine._draft_length.record
    engine._draft_length.record = lambda **step: (recorded.append(step["length"]), original(**step))
    finish(engine, [request_of("a", [5], max_tokens=30)])
    assert set(recorded) == {0, 1, 2}


def test_drafts_of_a_model_without_modules_are_refused():
    runner = Scripted()
    runner.num_mtp_modules = 0
    with pytest.raises(ConfigError, match="no MTP module to draft with"):
        engine_of(runner, max_drafts=1)


@settings(max_examples=30)
@given(
    page_tokens=st.integers(1, 9),
    num_pages=st.integers(2, 40),
    max_step_tokens=st.integers(1, 40),
    max_sequences=st.integers(1, 6),
    drafts=st.integers(0, 3),
    prefix_caching=st.booleans(),
    data=st.data(),
)
def test_any_traffic_leaves_the_books_in_order_and_every_answer_as_alone(
    our_kernels, page_tokens, num_pages, max_step_tokens, max_sequences, drafts, prefix_caching, data
):
    config = {
        "page_tokens": page_tokens,
        "num_pages": num_pages,
        "max_step_tokens": max_step_tokens,
        "max_sequences": max_sequences,
        "max_drafts": drafts,
        "prefix_caching": prefix_caching,
        "adaptive_drafts": data.draw(st.booleans()),
    }
    engine = engine_of(one_runner(), **config)
    left = data.draw(
        st.lists(st.tuples(st.integers(1, 30), st.integers(0, 2), st.integers(1, 20), st.booleans()), max_size=6)
    )
    added, cancelled, said, ended = {}, set(), {}, {}
    for _ in range(4000):
        if left and (not engine.has_work or data.draw(st.booleans())):
            length, seed, most, constrained = left.pop()
            name = str(len(added))
            params = {"max_tokens": most, "seed": seed, "temperature": 0.9 if seed else 0.0}
            request = request_of(
                name, prompt_of(length, seed=seed), constraint=Counting() if constrained else None, **params
            )
            try:
                engine.add(request)
            except ConfigError:
                assert length >= page_tokens * num_pages
                continue
            added[name] = (length, seed, most, constrained)
        if not left and not engine.has_work:
            break
        if added and data.draw(st.integers(0, 15)) == 0:
            name = data.draw(st.sampled_from(sorted(added)))
            engine.cancel(name)
            cancelled.add(name)
        for event in engine.step():
            said.setdefault(event.id, []).extend(event.tokens)
            if event.finish_reason:
                assert event.id not in ended
                ended[event.id] = event.finish_reason
        engine.check()
    assert set(ended) == set(added)
    assert engine.stats().num_pages_in_use == 0
    limit = min(page_tokens * num_pages, TINY.max_position_embeddings)
    for name, (length, seed, most, constrained) in added.items():
        expected = whole_answer(length, seed, most, constrained)
        if ended[name] is FinishReason.CANCELLED:
            assert said[name] == expected[: len(said[name])]
        else:
            assert said[name] == expected[: limit - length]


@cache
def whole_answer(length, seed, most, constrained):
    params = {"max_tokens": most, "seed": seed, "temperature": 0.9 if seed else 0.0}
    request = request_of("a", prompt_of(length, seed=seed), constraint=Counting() if constrained else None, **params)
    return answers(engine_of(packed()), [request]).get("a", [])


@cache
def one_runner():
    """The packed runner of the random traffic: making one takes longer than an example."""
    return packed()
