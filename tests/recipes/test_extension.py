"""Phases of the context extension, as published and for smaller runs."""

from dataclasses import replace

import pytest

from dsv3 import recipes
from dsv3.config import YarnConfig
from dsv3.errors import ConfigError
from dsv3.recipes.extension import extension
from dsv3.train.schedule import bias_update_speed, learning_rate, mtp_loss_weight, total_steps


def test_the_published_run_is_extended_as_published():
    """Report 4.3: 32K with 1,920 rows, 128K with 480, 1,000 steps each, 7.3e-6; s = 40, alpha = 1, beta = 32."""
    first, second = extension(recipes.v3_671b())
    assert [(phase.batch.sequence_length, phase.batch.final_sequences) for phase in (first, second)] == [
        (32_768, 1920),
        (131_072, 480),
    ]
    for phase in (first, second):
        assert total_steps(phase) == 1000
        assert phase.batch.start_sequences == phase.batch.final_sequences
        tokens = range(0, phase.total_tokens, phase.total_tokens // 7)
        assert {learning_rate(phase.optim.learning_rate, step=500, tokens=seen) for seen in tokens} == {7.3e-6}
        assert {mtp_loss_weight(phase.mtp, tokens=seen) for seen in tokens} == {0.1}
        assert {bias_update_speed(phase.balance, tokens=seen) for seen in tokens} == {0.0}
        assert phase.model.rope_scaling == YarnConfig(
            factor=40.0, original_max_position_embeddings=4096, beta_fast=32.0, beta_slow=1.0
        )
        assert phase.model.max_position_embeddings == 163_840  # 40 x 4,096, as in the published config.json


def test_a_small_run_is_extended_by_the_same_factors():
    config = recipes.tiny()
    trained = config.batch.sequence_length
    first, second = extension(config, steps=20)
    assert [phase.batch.sequence_length for phase in (first, second)] == [8 * trained, 32 * trained]
    assert second.model.rope_scaling.factor == 40
    for phase in (first, second):
        assert total_steps(phase) == 20
        assert phase.batch.final_sequences * phase.batch.sequence_length <= config.batch.final_sequences * trained + (
            phase.batch.sequence_length
        )
    (only,) = extension(config, lengths=(4 * trained,), steps=3, learning_rate=1e-3)
    assert only.model.rope_scaling.factor == 5  # 1.25 times the lengthening, as 40 is of 32
    assert learning_rate(only.optim.learning_rate, step=3, tokens=0) == 1e-3


def test_what_is_no_extension_is_refused():
    config = recipes.tiny()
    extended = replace(config, model=replace(config.model, rope_scaling=YarnConfig()))
    with pytest.raises(ConfigError, match="has been extended already"):
        extension(extended)
    for lengths in ((100,), (4096, 2048), (2048, 2048)):
        with pytest.raises(ConfigError, match="each must be longer than the last"):
            extension(config, lengths=lengths)
    with pytest.raises(ConfigError, match="0 steps a phase"):
        extension(config, steps=0)
