"""Distributions against their formulas, draws against distributions, and noise that is a function of (seed, place)."""

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3.errors import CheckpointError, ConfigError
from dsv3.infer import sampler as sampling
from dsv3.infer.params import SamplingParams
from dsv3.infer.sampler import TokenSampler, draw_freely, likely_tokens, next_probabilities, waiting_times

logit_lists = st.lists(st.floats(-8, 8, width=32), min_size=2, max_size=12)


def sampler_of(*, prompt_ids=(), vocab_size=None, answer=(), **params):
    params = {"temperature": 1.0, "top_p": 1.0, "seed": 0} | params
    sampler = TokenSampler(SamplingParams(**params), prompt_ids=prompt_ids, vocab_size=vocab_size or 1000)
    for token in answer:
        sampler.add(token)
    return sampler


def draws(logits, count, **params):
    sampler = sampler_of(**params)
    return [sampler.choose(torch.tensor(logits), place=place) for place in range(count)]


def chi_square(counts, expected):
    return sum((count - mean) ** 2 / mean for count, mean in zip(counts, expected, strict=True) if mean > 0)


def in_full(logits, **params):
    """The distribution of one row over the whole vocabulary, by `likely_tokens`."""
    tokens, probabilities = likely_tokens(logits, params=SamplingParams(**params))
    full = torch.zeros(len(logits), dtype=torch.float64)
    full[torch.from_numpy(tokens)] = torch.from_numpy(probabilities)
    return full


# ---- the distribution ----


def test_temperature_zero_lies_on_the_likeliest_of_each_row():
    logits = torch.tensor([[0.0, 3.0, 1.0], [5.0, 3.0, 1.0]])
    assert next_probabilities(logits, params=SamplingParams(temperature=0.0)).tolist() == [[0, 1, 0], [1, 0, 0]]


def test_top_k_keeps_exactly_k_even_among_equals():
    probabilities = next_probabilities(torch.zeros(1, 9), params=SamplingParams(temperature=1.0, top_p=1.0, top_k=4))
    assert sorted(probabilities[0].tolist())[-4:] == pytest.approx([0.25] * 4)
    assert (probabilities > 0).sum() == 4


def test_top_k_beyond_the_vocabulary_leaves_all_in():
    probabilities = next_probabilities(torch.zeros(1, 4), params=SamplingParams(temperature=1.0, top_p=1.0, top_k=9))
    assert probabilities.tolist() == [[0.25] * 4]


def test_top_p_keeps_no_token_beyond_those_that_just_reach_it():
    params = SamplingParams(temperature=1.0, top_p=0.5)
    assert next_probabilities(torch.zeros(1, 4), params=params).tolist() == [[0.5, 0.5, 0, 0]]


def test_top_p_is_measured_after_top_k():
    # Of 0.4, 0.3, 0.2, 0.1 top-k 2 leaves 4/7 and 3/7; the first alone reaches 0.5.
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    params = SamplingParams(temperature=1.0, top_k=2, top_p=0.5)
    assert next_probabilities(logits, params=params).tolist() == [[1, 0, 0, 0]]


def test_min_p_is_a_share_of_the_likeliest():
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    params = SamplingParams(temperature=1.0, top_p=1.0, min_p=0.45)
    assert next_probabilities(logits, params=params)[0].tolist() == pytest.approx([4 / 9, 3 / 9, 2 / 9, 0])


@given(logit_lists, st.floats(0.01, 1.0), st.floats(0.1, 3.0))
def test_top_p_keeps_the_shortest_list_of_likeliest_tokens_that_reaches_it(logits, top_p, temperature):
    full = torch.tensor([logits], dtype=torch.float64).div(temperature).softmax(-1)[0].tolist()
    params = SamplingParams(temperature=temperature, top_p=top_p)
    kept = next_probabilities(torch.tensor([logits]), params=params)[0].tolist()
    inside = [p for p, q in zip(full, kept, strict=True) if q > 0]
    outside = [p for p, q in zip(full, kept, strict=True) if q == 0]
    assert inside
    assert sum(kept) == pytest.approx(1)
    assert min(inside) >= max(outside, default=0) - 1e-6  # the likeliest ones
    assert sum(inside) >= top_p - 1e-5  # they reach it
    assert sum(inside) - min(inside) < top_p + 1e-5  # and one fewer would not
    assert kept == pytest.approx([p / sum(inside) if q > 0 else 0 for p, q in zip(full, kept, strict=True)], abs=1e-5)


@given(logit_lists, st.floats(0.05, 1.0), st.integers(0, 5))
def test_a_row_has_the_distribution_that_it_has_alone(logits, top_p, top_k):
    params = SamplingParams(temperature=0.9, top_p=top_p, top_k=top_k)
    row = torch.tensor([logits])
    both = next_probabilities(torch.cat([row.flip(1), row]), params=params)
    assert torch.equal(both[1:], next_probabilities(row, params=params))


@settings(max_examples=200)
@given(
    vocab=st.sampled_from([2, 40, 255, 256, 257, 700, 5000]),
    spread=st.sampled_from([0.0, 0.05, 0.5, 3.0]),
    seed=st.integers(0, 1000),
    temperature=st.sampled_from([0.3, 1.0, 2.0]),
    top_k=st.sampled_from([0, 1, 3, 256, 300, 6000]),
    top_p=st.sampled_from([0.05, 0.5, 0.903, 1.0]),
    min_p=st.sampled_from([0.0, 0.02, 0.5, 1.0]),
)
def test_the_likely_tokens_have_the_plain_forms_distribution(vocab, spread, seed, temperature, top_k, top_p, min_p):
    logits = spread * torch.randn(vocab, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    settings_ = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    if spread == 0 and (top_k or top_p < 1):  # Which of equals are kept is nobody's right: count them.
        plain = next_probabilities(logits[None], params=SamplingParams(**settings_))[0]
        kept = int((plain > 0).sum())
        found = in_full(logits, **settings_)
        assert abs(int((found > 0).sum()) - kept) <= 1  # a sum of equal shares may miss the edge by its rounding
        assert found[found > 0].tolist() == pytest.approx([1 / int((found > 0).sum())] * int((found > 0).sum()))
    else:
        plain = next_probabilities(logits[None], params=SamplingParams(**settings_))[0]
        torch.testing.assert_close(in_full(logits, **settings_), plain, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("top_p", "kept"), [(0.02, 100), (0.5, 2500), (0.99, 4950)])
def test_top_p_may_reach_beyond_the_tokens_looked_at_first(top_p, kept):
    logits = -1e-7 * torch.arange(5000, dtype=torch.float64)  # as good as uniform, and in order
    tokens, probabilities = likely_tokens(logits, params=SamplingParams(temperature=1.0, top_p=top_p))
    assert abs(len(tokens) - kept) <= 2
    assert tokens.tolist() == list(range(len(tokens)))
    assert probabilities.sum() == pytest.approx(1)


def test_equals_are_kept_by_their_ids_lowest_first():
    tokens, _ = likely_tokens(torch.tensor([1.0, 2.0] * 400), params=SamplingParams(temperature=1.0, top_k=3))
    assert tokens.tolist() == [1, 3, 5]


@pytest.mark.parametrize("top_p", [0.9, 1.0])
def test_a_tiny_temperature_is_greedy_and_stays_finite(top_p):
    logits = torch.tensor([[300.0, 299.0, -300.0]])
    params = SamplingParams(temperature=1e-30, top_p=top_p)
    assert next_probabilities(logits, params=params).tolist() == [[1, 0, 0]]
    for temperature in (1e-30, 1e-310):  # of which FP32 makes 0
        assert in_full(logits[0], temperature=temperature, top_p=top_p).tolist() == [1, 0, 0]


# ---- the noise ----


def kolmogorov_smirnov(sample):
    """Distance of a sample from the exponential distribution, times the root of its size; above 1.95 once in 1000."""
    ordered = np.sort(sample)
    reached = 1 - np.exp(-ordered)
    steps = np.arange(len(ordered) + 1) / len(ordered)
    return max(np.abs(reached - steps[1:]).max(), np.abs(reached - steps[:-1]).max()) * math.sqrt(len(ordered))


def test_waiting_times_are_exponential_over_tokens_over_places_and_over_seeds():
    count, one = 5000, np.array([17])
    over_tokens = waiting_times(5, place=3, tokens=np.arange(count))
    over_places = np.concatenate([waiting_times(5, place=place, tokens=one) for place in range(count)])
    over_seeds = np.concatenate([waiting_times(seed, place=3, tokens=one) for seed in range(count)])
    for sample in (over_tokens, over_places, over_seeds):
        assert kolmogorov_smirnov(sample) < 1.95
        assert np.corrcoef(sample[:-1], sample[1:])[0, 1] == pytest.approx(0, abs=4 / math.sqrt(count))
    neighbours = waiting_times(6, place=3, tokens=np.arange(count)), waiting_times(5, place=4, tokens=np.arange(count))
    for other in neighbours:
        assert np.corrcoef(over_tokens, other)[0, 1] == pytest.approx(0, abs=4 / math.sqrt(count))


def test_a_waiting_time_does_not_depend_on_the_other_tokens_asked_about():
    few = waiting_times(9, place=2, tokens=np.array([70, 3]))
    assert few.tolist() == waiting_times(9, place=2, tokens=np.arange(100))[[70, 3]].tolist()


def test_seed_0_place_0_and_token_0_are_nothing_special():
    """SplitMix64 turns 0 into 0, which would make the wait so long that token 0 could hardly ever be drawn there."""
    assert waiting_times(0, place=0, tokens=np.array([0]))[0] < 10
    assert (waiting_times(2**63 - 1, place=10**6, tokens=np.arange(1000)) > 0).all()


# ---- draws ----


def test_draws_follow_the_softmax_at_the_temperature():
    logits, temperature, count = [1.0, 0.0, -0.5, 2.0, 0.3], 0.7, 4000
    weights = [math.exp(x / temperature) for x in logits]
    counts = Counter(draws(logits, count, temperature=temperature, seed=3))
    # 4 degrees of freedom: above 23.5 with probability 1e-4.
    assert chi_square([counts[i] for i in range(5)], [count * w / sum(weights) for w in weights]) < 23.5


def test_draws_over_seeds_follow_the_same_distribution():
    probabilities = torch.tensor([0.5, 0.3, 0.2])
    counts = Counter(sampler_of(seed=seed).choose(probabilities.log(), place=0) for seed in range(4000))
    assert chi_square([counts[i] for i in range(3)], [2000, 1200, 800]) < 18.4  # 2 degrees of freedom, 1e-4


@given(
    rows=st.integers(1, 9),
    vocab=st.integers(1, 40),
    seed=st.integers(0, 2**62),
    temperature=st.floats(1e-3, 5.0),
    at_once=st.sampled_from([1, 64, 1 << 19]),
)
def test_draws_of_many_are_those_of_each_and_the_largest_p_by_waiting_time(rows, vocab, seed, temperature, at_once):
    logits = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed % 1000)) * 3
    options = {
        "seeds": [seed + row for row in range(rows)],
        "places": list(range(rows)),
        "temperatures": [temperature] * rows,
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "DRAWN_AT_ONCE", at_once)
        together = draw_freely(logits, **options)
    params = SamplingParams(temperature=temperature, top_p=1.0)
    for row, token in enumerate(together):
        alone = TokenSampler(replace(params, seed=seed + row), prompt_ids=[], vocab_size=vocab)
        assert token == alone.choose(logits[row], place=row)
        waits = waiting_times(seed + row, place=row, tokens=np.arange(vocab))
        share = next_probabilities(logits[row : row + 1].double(), params=params)[0].numpy() / waits
        assert share[token] >= share.max() * (1 - 1e-9)


def test_draws_from_a_cut_distribution_are_the_uncut_ones_as_far_as_they_lie_within():
    """So min-p or top-p do not change a text until it would have left them."""
    logits = [1.0, 0.0, -0.5, 2.0, 0.3]
    whole, cut = draws(logits, 500, seed=1), draws(logits, 500, seed=1, top_k=3)
    assert all(a == b for a, b in zip(whole, cut, strict=True) if a in (3, 0, 4))
    assert set(cut) == {3, 0, 4}


def test_ids_from_the_vocabulary_size_on_are_never_drawn():
    logits = [0.0] * 5 + [50.0] * 3  # What the unused rows of the head score must not matter.
    for params in ({}, {"temperature": 0.0}, {"top_p": 0.9}, {"presence_penalty": 1.0}, {"logit_bias": ((4, 1.0),)}):
        drawn = draws(logits, 200, vocab_size=5, **params)
        assert max(drawn) < 5
        assert params or set(drawn) == {0, 1, 2, 3, 4}


def test_the_same_seed_draws_the_same_tokens_and_another_does_not():
    first, again, other = (draws([0.0] * 100, 64, seed=seed) for seed in (5, 5, 6))
    assert first == again
    assert first != other


def test_no_seed_draws_a_fresh_one():
    assert sampler_of(seed=None).seed != sampler_of(seed=None).seed


@settings(max_examples=200)
@given(
    logits=logit_lists,
    data=st.data(),
    seed=st.integers(0, 2**63 - 1),
    temperature=st.sampled_from([0.0, 0.7, 50.0]),
    top_p=st.sampled_from([0.1, 1.0]),
    bias=st.sampled_from([-math.inf, -100.0, 100.0]),
)
def test_what_a_grammar_forbids_is_never_drawn(logits, data, seed, temperature, top_p, bias):
    mask = data.draw(st.lists(st.booleans(), min_size=len(logits), max_size=len(logits)).filter(any))
    biased = next((i for i, allowed in enumerate(mask) if not allowed), None)
    sampler = sampler_of(
        vocab_size=len(logits),
        seed=seed,
        temperature=temperature,
        top_p=top_p,
        logit_bias=() if biased is None else ((biased, bias),),
        presence_penalty=1.0,
        answer=[0],
    )
    assert mask[sampler.choose(torch.tensor(logits), place=0, allowed=np.array(mask))]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_where_everything_is_forbidden_an_error_says_so(temperature):
    sampler = sampler_of(temperature=temperature)
    with pytest.raises(ConfigError, match="no token may come next"):
        sampler.choose(torch.zeros(4), place=0, allowed=np.zeros(4, dtype=np.bool_))
    sampler = sampler_of(temperature=temperature, logit_bias=tuple((token, -math.inf) for token in range(4)))
    with pytest.raises(ConfigError, match="no token may come next"):
        sampler.choose(torch.zeros(4), place=0)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_not_numbers_are_refused(value, temperature):
    with pytest.raises(CheckpointError, match="not numbers"):
        sampler_of(temperature=temperature).choose(torch.tensor([0.0, value]), place=0)


# ---- penalties and bias ----


def adjusted_by_formula(logits, *, answer, presence, frequency, bias):
    """OpenAI's: mu[j] - c[j] * alpha_frequency - float(c[j] > 0) * alpha_presence, and the bias added."""
    counts = Counter(answer)
    return [
        mu - counts[j] * frequency - float(counts[j] > 0) * presence + dict(bias).get(j, 0.0)
        for j, mu in enumerate(logits)
    ]


@settings(max_examples=100)
@given(
    logits=logit_lists,
    answer=st.lists(st.integers(0, 1), max_size=6),
    drafts=st.lists(st.integers(0, 1), max_size=3),
    presence=st.floats(-2, 2, width=16),
    frequency=st.floats(-2, 2, width=16),
    bias=st.sampled_from([(), ((0, 2.0),), ((1, -1.5), (0, 0.5))]),
)
def test_penalties_count_the_answer_and_the_drafts_before_a_place(logits, answer, drafts, presence, frequency, bias):
    expected = adjusted_by_formula(logits, answer=answer + drafts, presence=presence, frequency=frequency, bias=bias)
    params = {"presence_penalty": presence, "frequency_penalty": frequency, "logit_bias": bias}
    # What the answer has counts; what only the prompt has does not.
    greedy = sampler_of(temperature=0.0, answer=answer, prompt_ids=[0, 0, 1], **params)
    token = greedy.choose(torch.tensor(logits), place=0, drafts=drafts)
    assert expected[token] == pytest.approx(max(expected), abs=1e-5)
    mine, plain = sampler_of(answer=answer, seed=4, **params), sampler_of(seed=4)
    for place in range(5):
        drawn = mine.choose(torch.tensor(logits, dtype=torch.float64), place=place, drafts=drafts)
        assert drawn == plain.choose(torch.tensor(expected, dtype=torch.float64), place=place)


@settings(max_examples=100)
@given(
    logits=logit_lists,
    prompt=st.lists(st.integers(0, 1), min_size=1, max_size=4),
    answer=st.lists(st.integers(0, 1), max_size=4),
    penalty=st.floats(0.25, 4.0),
)
def test_the_repetition_penalty_is_the_one_of_transformers(logits, prompt, answer, penalty):
    from transformers import RepetitionPenaltyLogitsProcessor

    theirs = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([prompt + answer]), torch.tensor([logits]))[0]
    mine = sampler_of(prompt_ids=prompt, answer=answer, seed=8, repetition_penalty=penalty)
    greedy = sampler_of(prompt_ids=prompt, answer=answer, temperature=0.0, repetition_penalty=penalty)
    assert greedy.choose(torch.tensor(logits), place=0) == int(theirs.argmax())
    for place in range(5):
        assert mine.choose(torch.tensor(logits), place=place) == sampler_of(seed=8).choose(theirs, place=place)


def test_a_prompt_may_have_ids_that_are_never_drawn():
    logits = torch.tensor([1.0, 3.0, 2.0, 9.0])
    sampler = sampler_of(prompt_ids=[3, 1], vocab_size=3, temperature=0.0, repetition_penalty=2.0)
    assert sampler.choose(logits, place=0) == 2
    sampler = sampler_of(prompt_ids=[3], vocab_size=3, temperature=0.0, repetition_penalty=2.0)
    assert sampler.choose(logits, place=0) == 1


def test_the_logits_given_are_left_as_they_are():
    logits = torch.zeros(4)
    sampler_of(answer=[1], frequency_penalty=1.0, logit_bias=((2, 3.0),)).choose(logits, place=0)
    assert logits.tolist() == [0.0] * 4


def test_a_sampler_is_plain_only_if_the_likeliest_token_is_all_it_takes():
    assert sampler_of(temperature=0.0, top_p=0.5, seed=1).is_plain
    for params in (
        {"temperature": 0.1},
        {"presence_penalty": 0.1},
        {"frequency_penalty": -0.1},
        {"repetition_penalty": 1.1},
        {"logit_bias": ((1, 1.0),)},
    ):
        assert not sampler_of(**({"temperature": 0.0} | params)).is_plain


# ---- settings ----
