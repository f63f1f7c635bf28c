"""Optimiser and schedules of pre-training (report 4.2). Every schedule is written in tokens, as published."""

from dataclasses import dataclass, replace

from dsv3.config.check import require_fraction, require_not_negative, require_positive
from dsv3.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class LearningRateConfig:
    """Warm-up, plateau, cosine, two constants (report 4.2, 'Hyper-Parameters')."""

    peak: float = 2.2e-4
    warmup_steps: int = 2000
    """Optimizer steps of the linear rise from 0; the one schedule the report counts in steps."""
    constant_until_tokens: int = 10_000_000_000_000
    """The peak is held until here."""
    cosine_until_tokens: int = 14_300_000_000_000
    """Cosine from `peak` to `cosine_floor` until here."""
    cosine_floor: float = 2.2e-5
    hold_until_tokens: int = 14_633_000_000_000
    """`cosine_floor` is held until here; afterwards `final`."""
    final: float = 7.3e-6

    def __post_init__(self) -> None:
        require_positive(self, "peak", "cosine_floor", "final")
        require_not_negative(self, "warmup_steps")
        if not 0 <= self.constant_until_tokens <= self.cosine_until_tokens <= self.hold_until_tokens:
            raise ConfigError(
                "learning-rate phases must follow one another: constant_until_tokens = "
                f"{self.constant_until_tokens}, cosine_until_tokens = {self.cosine_until_tokens}, "
                f"hold_until_tokens = {self.hold_until_tokens}"
            )


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW with FP32 master weights and BF16 moments (report 3.3, 4.2)."""

    learning_rate: LearningRateConfig = LearningRateConfig()
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    """Unpublished; the customary value."""
    weight_decay: float = 0.1
    """Decoupled. Which parameters skip it is unpublished: one-dimensional ones (the norm gains) do here."""
    clip_gradient_norm: float = 1.0
    """Global norm above which gradients are scaled down."""
    bf16_moments: bool = True
    """Keep both AdamW moments in BF16 (report 3.3); False keeps them in FP32."""
    ema_decay: float = 0.999
    """Decay per step of the weight average kept in CPU memory; 0 keeps none. The report's value is unpublished."""

    def __post_init__(self) -> None:
        require_fraction(self, "beta1", "beta2", "ema_decay")
        require_positive(self, "epsilon", "clip_gradient_norm")
        require_not_negative(self, "weight_decay")


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """Sequence length and the growth of the batch (report 4.2). Shape of the ramp unpublished: linear in tokens."""

    sequence_length: int = 4096
    """T: tokens of one packed row."""
    start_sequences: int = 3072
    final_sequences: int = 15_360
    ramp_tokens: int = 469_000_000_000
    """Tokens over which the batch grows from start to final."""
    multiple_of: int = 480
    """The ramp rounds down to multiples of this many sequences (and never below the start)."""
    micro_batch_sequences: int = 1
    """Sequences of one forward and backward pass; gradients accumulate over the rest. Changes memory, not results (but
    for which tokens share a scale in FP8)."""
    long_documents_first: bool = False
    """Whether rows that one document fills are drawn before any of several short ones, in each epoch of a source."""

    def __post_init__(self) -> None:
        require_positive(
            self, "sequence_length", "start_sequences", "final_sequences", "multiple_of", "micro_batch_sequences"
        )
        require_not_negative(self, "ramp_tokens")
        if self.final_sequences < self.start_sequences:
            raise ConfigError(
                f"batch.final_sequences = {self.final_sequences} is less than start_sequences = {self.start_sequences}"
            )

    def steady(self, sequences: int) -> "BatchConfig":
        """Return it with so many sequences in every step."""
        return replace(self, start_sequences=sequences, final_sequences=sequences, ramp_tokens=0, multiple_of=sequences)


@dataclass(frozen=True, kw_only=True)
class RecomputeConfig:
    """What is made again in the backward pass instead of kept for it (report 3.2.3). Changes memory, not results."""

    norms: bool = True
    """Outputs of every RMSNorm."""
    up_projections: bool = True
    """Queries, keys and values of every head, from the latents."""
    swiglu: bool = True
    """Outputs of the SwiGLU of experts, shared experts and dense layers. An FP8 recipe that keeps the inputs of the
    experts' SwiGLU in FP8 makes theirs again in any case (report 3.3.3)."""


KEEP_ALL = RecomputeConfig(norms=False, up_projections=False, swiglu=False)
"""Nothing is made again: the fastest, where memory allows."""


@dataclass(frozen=True, kw_only=True)
class MtpLossConfig:
    """Weight of the multi-token-prediction loss over training (lambda, report 4.2)."""

    early_weight: float = 0.3
    late_weight: float = 0.1
    switch_tokens: int = 10_000_000_000_000
    """`early_weight` until here, `late_weight` afterwards."""

    def __post_init__(self) -> None:
        require_not_negative(self, "early_weight", "late_weight", "switch_tokens")
