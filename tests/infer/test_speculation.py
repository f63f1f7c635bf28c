"""How many drafts pay, against made-up costs; and what the modules leave behind, against a pass made afresh."""

import random
from dataclasses import replace

import pytest
import torch

from dsv3.batch import TokenBatch
from dsv3.config import EngineConfig
from dsv3.infer.engine import Engine
from dsv3.infer.pages import page_keys
from dsv3.infer.params import SamplingParams
from dsv3.infer.request import Request
from dsv3.infer.runner import TorchRunner
from dsv3.infer.speculation import DraftLength
from dsv3.model.transformer import Transformer

from .conftest import TINY

# ---- how many ----


def lengths_chosen(length, *, cost, acceptance, steps, num_sequences=1, chance=None):
    """Run steps that take what `cost` says, with drafts right as often as `acceptance`; return the lengths chosen."""
    chance = chance or random.Random(0)
    chosen = []
    for _ in range(steps):
        drafts = length.choose(num_sequences=num_sequences)
        chosen.append(drafts)
        length.record(num_sequences=num_sequences, length=drafts, seconds=cost(drafts) * chance.uniform(0.97, 1.03))
        for _ in range(num_sequences if drafts else 0):
            accepted = 0
            while accepted < drafts and chance.random() < acceptance:
                accepted += 1
            length.record_drafts(drafted=drafts, accepted=accepted)
    return chosen


def best_length(*, cost, acceptance, most):
    def tokens(drafts):
        return sum(acceptance**place for place in range(drafts + 1))

    return max(range(most + 1), key=lambda drafts: tokens(drafts) / cost(drafts))


CASES = {
    "drafts cost as much as tokens": (lambda drafts: 1 + drafts, 0.7, 0),
    "drafts cost next to nothing": (lambda drafts: 1 + 0.02 * drafts, 0.9, 4),
    "drafts are never right": (lambda drafts: 1 + 0.1 * drafts, 0.0, 0),
    "one draft is best": (lambda drafts: 1 + 0.1 * drafts + 0.3 * max(0, drafts - 1), 0.6, 1),
    "two drafts are best": (lambda drafts: 1 + 0.1 * drafts + 0.8 * max(0, drafts - 2), 0.7, 2),
}


@pytest.mark.parametrize("case", CASES)
def test_the_length_that_gives_most_tokens_a_second_is_used_most(case):
    cost, acceptance, best = CASES[case]
    assert best_length(cost=cost, acceptance=acceptance, most=4) == best  # by the formula, Leviathan et al. 2023, eq. 1
    chosen = lengths_chosen(DraftLength(4, is_adaptive=True), cost=cost, acceptance=acceptance, steps=1200)
    assert chosen[200:].count(best) > 0.85 * len(chosen[200:])


def test_a_neighbour_of_the_best_is_tried_again_now_and_then():
    cost, acceptance, best = CASES["two drafts are best"]
    chosen = lengths_chosen(DraftLength(4, is_adaptive=True), cost=cost, acceptance=acceptance, steps=1200)[600:]
    assert {best - 1, best + 1} <= set(chosen)


def test_a_text_that_changes_changes_the_length():
    length, chance = DraftLength(3, is_adaptive=True), random.Random(1)
    options = {"cost": lambda drafts: 1 + 0.2 * drafts, "steps": 1600, "chance": chance}
    for acceptance, most_used in ((0.95, 3), (0.02, 0), (0.95, 3)):
        chosen = lengths_chosen(length, acceptance=acceptance, **options)[1000:]
        assert max(set(chosen), key=chosen.count) == most_used


def test_few_and_many_requests_have_a_length_each():
    length = DraftLength(2, is_adaptive=True)
    few = {"cost": lambda drafts: 1 + 0.02 * drafts, "acceptance": 0.8, "num_sequences": 1}
    many = {"cost": lambda drafts: 1 + drafts, "acceptance": 0.8, "num_sequences": 32}
    for _ in range(3):
        for case, expected in ((few, 2), (many, 0)):
            chosen = lengths_chosen(length, steps=150, **case)[40:]
            assert chosen.count(expected) > 0.8 * len(chosen)


@pytest.mark.parametrize("is_adaptive", [True, False])
def test_the_length_never_exceeds_what_is_allowed(is_adaptive):
    for most in (0, 1, 3):
        length = DraftLength(most, is_adaptive=is_adaptive)
        chosen = lengths_chosen(length, cost=lambda drafts: 1 / (1 + drafts), acceptance=0.9, steps=300)
        assert max(chosen) == most
        assert is_adaptive or set(chosen) == {most}


def test_one_slow_step_does_not_put_an_end_to_a_length():
    cost, acceptance, best = CASES["drafts cost next to nothing"]
    length = DraftLength(4, is_adaptive=True)
    lengths_chosen(length, cost=cost, acceptance=acceptance, steps=200)
    length.record(num_sequences=1, length=best, seconds=1000.0)
    assert lengths_chosen(length, cost=cost, acceptance=acceptance, steps=60).count(best) > 45


# ---- what the modules read ----


def model_of(**changes):
    model = Transformer(replace(TINY, **{"num_nextn_predict_layers": 2} | changes))
    model.init_weights(generator=torch.Generator().manual_seed(0))
    return model.requires_grad_(False).double()


class Half:
    """Drafts that are right every other time, whatever the modules say: every history of right and wrong comes up."""

    def __init__(self, drafter):
        self._follow = drafter.follow
        self._chance = random.Random(0)
        drafter.follow = self.follow

    def follow(self, chains):
        self._follow(chains)
        for chain in chains:
            drafts = chain.sequence.drafts
            answer = self.known[chain.sequence.num_answer :]
            chain.sequence.drafts = [
                true if self._chance.random() < 0.7 else wrong for wrong, true in zip(drafts, answer, strict=False)
            ]


def engine_of(model, *, drafts, max_step_tokens=512):
    config = EngineConfig(
        page_tokens=4, num_pages=40, max_step_tokens=max_step_tokens, max_drafts=drafts, adaptive_drafts=False
    )
    runner = TorchRunner(model)
    return Engine(runner, config=config, vocab_size=60, eos_id=1), runner


PROMPT = [7, 50, 22, 31, 7, 9, 15, 48, 33, 2, 40]


def ask(engine, *, max_tokens=50):
    params = SamplingParams(temperature=1.0, seed=2, max_tokens=max_tokens, ignore_end=True)
    engine.add(Request(id="a", prompt_ids=PROMPT, params=params))


@pytest.mark.parametrize(
    ("modules", "drafts", "max_step_tokens", "source"),
    [
        (1, 1, 512, "post_norm"),
        (1, 3, 4, "pre_norm"),
        (2, 1, 5, "post_norm"),
        (2, 2, 512, "pre_norm"),
        (2, 4, 7, "post_norm"),
    ],
)
def test_after_right_and_wrong_drafts_the_modules_cache_is_that_of_training(modules, drafts, max_step_tokens, source):
    model = model_of(num_nextn_predict_layers=modules, mtp_hidden_source=source)
    plain, _ = engine_of(model, drafts=0)
    ask(plain)
    known = []
    while plain.has_work:
        known += [token for event in plain.step() for token in event.tokens]

    engine, runner = engine_of(model, drafts=drafts, max_step_tokens=max_step_tokens)
    Half(engine._drafter).known = known
    ask(engine)
    num_accepted = num_drafted = 0
    for step in range(17):
        for event in engine.step():
            num_accepted, num_drafted = num_accepted + event.num_accepted, num_drafted + event.num_drafted
        (sequence,) = engine._sequences.values()
        assert sequence.tokens[len(PROMPT) :] == known[: sequence.num_answer]
        if step % 5 == 1:
            compare_with_training(model, runner, sequence, modules=min(modules, drafts))
    assert 0 < num_accepted < num_drafted


@pytest.mark.parametrize("max_tokens", [9, 10, 11, 12])
def test_a_page_can_be_found_only_when_the_modules_have_filled_it_too(max_tokens):
    """They are behind at the end of an answer, by more or less as its length falls on the pages of 4."""
    model = model_of()
    engine, runner = engine_of(model, drafts=2)
    ask(engine, max_tokens=max_tokens)
    said = []
    while engine.has_work:
        said += [token for event in engine.step() for token in event.tokens]
    text = [*PROMPT, *said]
    keys = page_keys(text, page_tokens=4)
    pages = engine._scheduler.pool.share(keys[: engine._scheduler.pool.find(keys)])
    assert len(pages) >= len(PROMPT) // 4
    slots = [page * 4 + place for page in pages for place in range(4)]
    expected = cache_of_training(model, text, modules=2)
    torch.testing.assert_close(runner._cache.storage[:, slots], expected[:, : len(slots)])


def cache_of_training(model, text, *, modules):
    """Return the cache that the training-side passes leave of a text."""
    fresh = TorchRunner(model)
    fresh.make_pages(num_pages=40, page_tokens=4)
    pages = [list(range(30))]
    batch = TokenBatch.from_sequences([text])
    states = fresh.forward(batch, pages=pages)
    for module in range(modules):
        handed_on = states.handed_on.index_select(0, batch.not_last)
        batch = batch.ahead()
        states = fresh.predict_ahead(handed_on, depth=module, batch=batch, pages=pages)
    return fresh._cache.storage


def compare_with_training(model, runner, sequence, *, modules):
    """Compare the cache, layer by layer, with the one that the training-side passes leave of the same tokens."""
    expected = cache_of_training(model, sequence.tokens, modules=modules)
    for layer in range(TINY.num_hidden_layers + modules):
        length = sequence.num_computed
        if layer >= TINY.num_hidden_layers and sequence.mtp:
            length = sequence.mtp[layer - TINY.num_hidden_layers].done
        slots = [sequence.pages[place // 4] * 4 + place % 4 for place in range(length)]
        torch.testing.assert_close(runner._cache.storage[layer, slots], expected[layer, :length])
    if sequence.num_answer and sequence.is_decoding:
        # All that can be known: module m needs the token m + 1 further on.
        assert [past.done for past in sequence.mtp] == [len(sequence.tokens) - 1 - module for module in range(modules)]
