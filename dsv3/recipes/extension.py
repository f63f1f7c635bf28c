"""Context extension: a finished run goes on over longer rows with YaRN, in two phases (report 4.3).

Published: 4K to 32K in 1,000 steps of 1,920 rows, then to 128K in 1,000 steps of 480, so that a step has as many tokens
as the last ones of pre-training; a learning rate of 7.3e-6 throughout, which is where pre-training ends; YaRN with
s = 40, alpha = 1, beta = 32 and sqrt(t) = 0.1 ln s + 1 in both phases. Whether the optimizer's moments are carried over
is not published: they begin anew here, with the first steps of each phase at a rising rate. Nor is the text of
both phases: here it is the run's own, rows that one document fills before all others.
"""

from collections.abc import Sequence
from dataclasses import replace

from dsv3.config import LearningRateConfig, PretrainConfig, YarnConfig
from dsv3.errors import ConfigError

FACTORS = (8, 32)
"""How many times as long as in pre-training the rows of each phase are."""
YARN_FACTOR = 40.0
STEPS = 1000
WARMUP_SHARE = 50
"""Of so many steps one has a rising rate."""


def extension(
    config: PretrainConfig, *, lengths: Sequence[int] = (), steps: int = STEPS, learning_rate: float = 0.0
) -> tuple[PretrainConfig, ...]:
    """Return the phases that lengthen the context of a run of `config`; each starts from the one before it.

    `lengths` are the rows of each phase, as published when left out, eight and 32 times the run's; YaRN's s is then 40,
    and 1.25 times the whole lengthening otherwise. The learning rate is the run's last one unless another is given.
    `start_from` is left for the caller, who knows the folders.

    Raises:
        ConfigError: the run has YaRN already, the lengths do not grow, or the model has no positions for them.
    """
    trained = config.batch.sequence_length
    lengths = tuple(lengths) or tuple(trained * factor for factor in FACTORS)
    if config.model.rope_scaling is not None:
        raise ConfigError("the run has been extended already (model.rope_scaling); extend the run that it began with")
    if list(lengths) != sorted({trained, *lengths})[1:]:
        raise ConfigError(
            f"rows of {trained} tokens are lengthened to {list(lengths)}; each must be longer than the last"
        )
    if steps < 1:
        raise ConfigError(f"{steps} steps a phase; it takes at least 1")
    rate = learning_rate or config.optim.learning_rate.final
    factor = YARN_FACTOR * lengths[-1] / (trained * FACTORS[-1])
    yarn = YarnConfig(factor=max(1.0, factor), original_max_position_embeddings=trained)
    model = replace(
        config.model,
        rope_scaling=yarn,
        max_position_embeddings=max(config.model.max_position_embeddings, round(trained * factor), lengths[-1]),
    )
    tokens_of_a_step = config.batch.final_sequences * trained
    return tuple(
        _phase(
            replace(config, model=model), length=length, rows=max(1, tokens_of_a_step // length), steps=steps, rate=rate
        )
        for length in lengths
    )


def _phase(config: PretrainConfig, *, length: int, rows: int, steps: int, rate: float) -> PretrainConfig:
    total = rows * length * steps
    constant = LearningRateConfig(
        peak=rate,
        warmup_steps=steps // WARMUP_SHARE,
        constant_until_tokens=total,
        cosine_until_tokens=total,
        cosine_floor=rate,
        hold_until_tokens=total,
        final=rate,
    )
    return replace(
        config,
        total_tokens=total,
        batch=replace(
            config.batch.steady(rows),
            sequence_length=length,
            long_documents_first=True,
            # As many tokens at a time as before, or one row.
            micro_batch_sequences=max(1, config.batch.micro_batch_sequences * config.batch.sequence_length // length),
        ),
        optim=replace(config.optim, learning_rate=constant),
        # What pre-training ends with: lambda at its late weight, and biases that stand still (report 4.2).
        mtp=replace(config.mtp, early_weight=config.mtp.late_weight),
        balance=replace(config.balance, bias_update_speed=0.0),
        snapshot=replace(config.snapshot, every_steps=min(config.snapshot.every_steps, max(1, steps // 4))),
        evaluation=replace(config.evaluation, every_steps=min(config.evaluation.every_steps, max(1, steps // 2))),
    )
