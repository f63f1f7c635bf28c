"""The published schedule on a shorter run: every milestone at the same fraction of the training tokens."""

from dataclasses import dataclass

from dsv3.config import LearningRateConfig

PUBLISHED_TOKENS = 14_800_000_000_000
"""Tokens of the published pre-training (report 4.1); the fractions below are of these."""


@dataclass(frozen=True, kw_only=True)
class Milestones:
    """Where in a run the schedules of report 4.2 change, in tokens."""

    ramp_tokens: int
    """The batch grows until here: 469B of 14.8T."""
    constant_until_tokens: int
    """The learning rate stays at its peak until here: 10T of 14.8T."""
    mtp_switch_tokens: int
    """lambda falls from 0.3 to 0.1 here: 10T of 14.8T."""
    cosine_until_tokens: int
    """The cosine ends here: 14.3T of 14.8T."""
    bias_freeze_tokens: int
    """gamma becomes 0 here: 14.3T of 14.8T."""
    hold_until_tokens: int
    """The last constant begins here: 14.633T of 14.8T."""


def milestones(total_tokens: int) -> Milestones:
    """Return the published milestones scaled to a run of `total_tokens`, rounded down to whole tokens.

    `total_tokens = PUBLISHED_TOKENS` gives the published numbers themselves.

    Source: report 4.2, 'Training Hyper-Parameters'.
    """

    def at(published: int) -> int:
        return total_tokens * published // PUBLISHED_TOKENS

    return Milestones(
        ramp_tokens=at(469_000_000_000),
        constant_until_tokens=at(10_000_000_000_000),
        mtp_switch_tokens=at(10_000_000_000_000),
        cosine_until_tokens=at(14_300_000_000_000),
        bias_freeze_tokens=at(14_300_000_000_000),
        hold_until_tokens=at(14_633_000_000_000),
    )


def learning_rate(peak: float, *, total_tokens: int, warmup_steps: int) -> LearningRateConfig:
    """Return the published course of the learning rate for another peak and length.

    The two constants keep their published ratio to the peak (2.2e-5 and 7.3e-6 to 2.2e-4), rounded to
    twelve decimals so that they can be read. `warmup_steps` is given
    apart, since the report counts it in optimizer steps.
    """
    scaled = milestones(total_tokens)
    return LearningRateConfig(
        peak=peak,
        warmup_steps=warmup_steps,
        constant_until_tokens=scaled.constant_until_tokens,
        cosine_until_tokens=scaled.cosine_until_tokens,
        cosine_floor=round(peak * 22 / 220, 12),
        hold_until_tokens=scaled.hold_until_tokens,
        final=round(peak * 7.3 / 220, 12),
    )
