from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3 import recipes
from dsv3.recipes.milestones import PUBLISHED_TOKENS, learning_rate, milestones


def test_the_published_length_gives_the_published_schedule():
    published = recipes.v3_671b()
    assert published.total_tokens == PUBLISHED_TOKENS
    rate = learning_rate(2.2e-4, total_tokens=PUBLISHED_TOKENS, warmup_steps=2000)
    assert rate == published.optim.learning_rate
    scaled = milestones(PUBLISHED_TOKENS)
    assert scaled.ramp_tokens == published.batch.ramp_tokens
    assert scaled.mtp_switch_tokens == published.mtp.switch_tokens
    assert scaled.bias_freeze_tokens == published.balance.bias_freeze_tokens


@given(total=st.integers(1, 10**15))
def test_milestones_lie_at_their_published_fractions_of_the_run(total):
    scaled = milestones(total)
    for tokens, fraction in [
        (scaled.ramp_tokens, Fraction(469, 14_800)),
        (scaled.constant_until_tokens, Fraction(100, 148)),
        (scaled.mtp_switch_tokens, Fraction(100, 148)),
        (scaled.cosine_until_tokens, Fraction(143, 148)),
        (scaled.bias_freeze_tokens, Fraction(143, 148)),
        (scaled.hold_until_tokens, Fraction(14_633, 14_800)),
    ]:
        assert 0 <= total * fraction - tokens < 1


@pytest.mark.parametrize("name", ["tiny", "small"])
def test_small_recipes_follow_the_published_schedule(name):
    config = recipes.by_name(name)
    scaled = milestones(config.total_tokens)
    assert config.batch.ramp_tokens == scaled.ramp_tokens
    assert config.optim.learning_rate.cosine_until_tokens == scaled.cosine_until_tokens
    assert config.optim.learning_rate.hold_until_tokens == scaled.hold_until_tokens
    assert config.mtp.switch_tokens == scaled.mtp_switch_tokens
    assert config.balance.bias_freeze_tokens == scaled.bias_freeze_tokens
    assert config.optim.learning_rate.final / config.optim.learning_rate.peak == pytest.approx(7.3e-6 / 2.2e-4)
    assert config.batch.final_sequences == 5 * config.batch.start_sequences
