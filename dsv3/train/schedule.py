"""Every schedule of pre-training, as pure functions of the tokens seen and the step (report 4.2).

`step` is the number of the optimizer step about to be taken, counted from 1; `tokens` are those of all steps before it.
Nothing here remembers anything, so a resumed run cannot drift from its schedule.
"""

import math

from dsv3.config import BalanceConfig, BatchConfig, LearningRateConfig, MtpLossConfig, PretrainConfig


def learning_rate(config: LearningRateConfig, *, step: int, tokens: int) -> float:
    """Return the learning rate of step `step` (from 1), which follows `tokens` tokens.

    A linear rise over `warmup_steps`, so that step `warmup_steps` is the first at the peak; then constant, cosine,
    and two constants. The rise is counted in steps and everything else in tokens, as published.

    Source: report 4.2, 'Training Hyper-Parameters'.
    """
    rise = min(1.0, step / config.warmup_steps) if config.warmup_steps else 1.0
    return rise * _after_warmup(config, tokens=tokens)


def _after_warmup(config: LearningRateConfig, *, tokens: int) -> float:
    if tokens < config.constant_until_tokens:
        return config.peak
    if tokens < config.cosine_until_tokens:
        length = config.cosine_until_tokens - config.constant_until_tokens
        progress = (tokens - config.constant_until_tokens) / length
        return config.cosine_floor + (config.peak - config.cosine_floor) * (1 + math.cos(math.pi * progress)) / 2
    if tokens < config.hold_until_tokens:
        return config.cosine_floor
    return config.final


def batch_sequences(config: BatchConfig, *, tokens: int) -> int:
    """Return how many sequences the step after `tokens` tokens holds.

    Source: report 4.2: from 3072 to 15360 over the first 469B tokens. The shape of the ramp is unpublished; ours is
    linear in tokens, rounded down to `multiple_of`, and never below the start nor, once the ramp is over, off the end.
    """
    if tokens >= config.ramp_tokens:
        return config.final_sequences
    growth = config.final_sequences - config.start_sequences
    # Whole numbers throughout: the size of a batch must not hang on the rounding of a quotient.
    grown = config.start_sequences + growth * tokens // config.ramp_tokens
    return max(config.start_sequences, grown // config.multiple_of * config.multiple_of)


def mtp_loss_weight(config: MtpLossConfig, *, tokens: int) -> float:
    """Return lambda, the weight of the multi-token-prediction loss (report 4.2)."""
    return config.early_weight if tokens < config.switch_tokens else config.late_weight


def bias_update_speed(config: BalanceConfig, *, tokens: int) -> float:
    """Return gamma, the step of the router biases: 0 after `bias_freeze_tokens`, and under every method but 'bias'."""
    if config.method != "bias" or tokens >= config.bias_freeze_tokens:
        return 0.0
    return config.bias_update_speed


def total_steps(config: PretrainConfig) -> int:
    """Return the number of optimizer steps until `total_tokens` are reached; the last step may pass the mark."""
    return sum(steps for _, steps in batch_stretches(config))


def batch_stretches(config: PretrainConfig) -> list[tuple[int, int]]:
    """Return the sizes of batches in their order, in sequences, and how many steps have each."""
    found, tokens = [], 0
    while tokens < config.total_tokens:
        size = batch_sequences(config.batch, tokens=tokens)
        stretch = min(_next_growth(config.batch, tokens=tokens, size=size), config.total_tokens) - tokens
        steps = -(-stretch // (size * config.batch.sequence_length))
        found.append((size, steps))
        tokens += steps * size * config.batch.sequence_length
    return found


def _next_growth(config: BatchConfig, *, tokens: int, size: int) -> int:
    """Return the number of tokens, above `tokens`, before which the batch cannot have changed from `size`."""
    if tokens >= config.ramp_tokens:
        return 1 << 62
    growth = config.final_sequences - config.start_sequences
    larger = (size // config.multiple_of + 1) * config.multiple_of
    if larger > config.final_sequences or growth == 0:
        return config.ramp_tokens
    reached = -(-(larger - config.start_sequences) * config.ramp_tokens // growth)
    return max(tokens + 1, min(reached, config.ramp_tokens))
