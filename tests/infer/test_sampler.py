import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3.errors import CheckpointError, ConfigError
from dsv3.infer.sampler import SamplingParams, draw, next_probabilities, sample, seeded_generator

logit_lists = st.lists(st.floats(-8, 8, width=32), min_size=2, max_size=12)


def chi_square(counts, expected):
    return sum((count - mean) ** 2 / mean for count, mean in zip(counts, expected, strict=True) if mean > 0)


def test_draws_follow_the_softmax_at_the_temperature():
    logits, temperature, draws = [1.0, 0.0, -0.5, 2.0, 0.3], 0.7, 20_000
    weights = [math.exp(x / temperature) for x in logits]
    expected = [draws * weight / sum(weights) for weight in weights]
    params = SamplingParams(temperature=temperature, top_p=1.0)
    rows = torch.tensor(logits).repeat(draws, 1)
    drawn = sample(rows, params=params, generator=seeded_generator(3))
    # 4 degrees of freedom: above 23.5 with probability 1e-4.
    assert chi_square(torch.bincount(drawn, minlength=5).tolist(), expected) < 23.5


def test_draws_one_request_at_a_time_follow_the_same_distribution():
    probabilities, generator = torch.tensor([[0.5, 0.3, 0.2, 0.0]]), seeded_generator(11)
    drawn = torch.cat([draw(probabilities, generator=generator) for _ in range(6000)])
    counts = torch.bincount(drawn, minlength=4).tolist()
    assert counts[3] == 0
    assert chi_square(counts, [3000, 1800, 1200, 0]) < 18.4  # 2 degrees of freedom, 1e-4


def test_temperature_zero_takes_the_likeliest_of_each_row():
    logits = torch.tensor([[0.0, 3.0, 1.0], [5.0, 3.0, 1.0]])
    params = SamplingParams(temperature=0.0)
    assert sample(logits, params=params, generator=seeded_generator(0)).tolist() == [1, 0]
    assert next_probabilities(logits, params=params).tolist() == [[0, 1, 0], [1, 0, 0]]


def test_ids_from_the_vocabulary_size_on_are_never_drawn():
    logits = torch.zeros(5000, 8)
    logits[:, 5:] = 50.0  # What the unused rows of the head score must not matter.
    for temperature in (0.0, 1.0):
        params = SamplingParams(temperature=temperature, top_p=1.0)
        drawn = sample(logits, params=params, generator=seeded_generator(1), vocab_size=5)
        assert drawn.max() < 5
    assert set(drawn.tolist()) == {0, 1, 2, 3, 4}


def test_the_same_seed_draws_the_same_tokens_and_another_does_not():
    logits, params = torch.zeros(64, 100), SamplingParams(temperature=1.0, top_p=1.0)
    first, again, other = (
        sample(logits, params=params, generator=seeded_generator(seed)).tolist() for seed in (5, 5, 6)
    )
    assert first == again
    assert first != other


def test_no_seed_draws_a_fresh_one():
    logits, params = torch.zeros(64, 100), SamplingParams(temperature=1.0, top_p=1.0)
    first, second = (sample(logits, params=params, generator=seeded_generator(None)).tolist() for _ in range(2))
    assert first != second


def test_a_tiny_temperature_is_greedy_and_stays_finite():
    logits = torch.tensor([[300.0, 299.0, -300.0]])
    assert next_probabilities(logits, params=SamplingParams(temperature=1e-30, top_p=1.0)).tolist() == [[1, 0, 0]]


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


@settings(deadline=None)
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


@settings(deadline=None)
@given(logit_lists, st.floats(0.05, 1.0), st.integers(0, 5))
def test_a_sequence_is_sampled_as_if_it_were_alone(logits, top_p, top_k):
    params = SamplingParams(temperature=0.9, top_p=top_p, top_k=top_k)
    row = torch.tensor([logits])
    both = next_probabilities(torch.cat([row.flip(1), row]), params=params)
    assert torch.equal(both[1:], next_probabilities(row, params=params))


def test_logits_that_are_not_numbers_are_refused():
    with pytest.raises(CheckpointError, match="not numbers"):
        sample(torch.tensor([[0.0, math.nan]]), params=SamplingParams(), generator=seeded_generator(0))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"temperature": -0.1}, "temperature = -0.1"),
        ({"temperature": math.nan}, "temperature = nan"),
        ({"temperature": math.inf}, "temperature = inf"),
        ({"top_p": 0.0}, "top_p = 0.0; it must be greater than 0"),
        ({"top_p": 1.01}, "top_p = 1.01"),
        ({"top_k": -1}, "top_k = -1"),
        ({"seed": -1}, "seed = -1"),
        ({"seed": 2**63}, "seed = 9223372036854775808"),
        ({"max_tokens": 0}, "max_tokens = 0"),
        ({"stop": ("a", "")}, "empty stop string"),
    ],
)
def test_a_setting_that_cannot_be_obeyed_is_refused(wrong, message):
    with pytest.raises(ConfigError, match=message):
        SamplingParams(**wrong)
