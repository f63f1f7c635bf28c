"""How one request wants its tokens drawn, and when it ends."""

import math
from dataclasses import dataclass

from dsv3.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """What one request asks of the sampler, and when it ends."""

    temperature: float = 0.8
    """Divides the logits; 0 always takes the likeliest token."""
    top_p: float = 0.95
    """Only the likeliest tokens that together reach this probability are drawn from; 1 leaves all in."""
    top_k: int = 0
    """Only this many of the likeliest tokens are drawn from, before `top_p` looks at them; 0 leaves all in."""
    min_p: float = 0.0
    """Only tokens at least this share as likely as the likeliest one are drawn from; 0 leaves all in."""
    presence_penalty: float = 0.0
    """Taken from the logit of every token that the answer has already."""
    frequency_penalty: float = 0.0
    """Taken from a token's logit once for each time that the answer has it."""
    repetition_penalty: float = 1.0
    """Divides the logits above 0 of tokens that prompt or answer have already, and multiplies those below."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token, what is added to its logit)."""
    seed: int | None = None
    """The same seed, prompt and settings give the same text; None draws a fresh seed."""
    stop: tuple[str, ...] = ()
    """Text at which generation ends; it is not part of the answer."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end the answer as the model's end token does."""
    ignore_end: bool = False
    """Go on past the model's end token, as benchmarks want it; what a grammar ends is ended all the same."""
    max_tokens: int | None = 256
    """Tokens generated at most; None goes on to the end of the text or of the context."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ConfigError(f"temperature = {self.temperature}; use 0 for the likeliest token, or a positive number")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p = {self.top_p}; it must be greater than 0 and at most 1")
        if self.top_k < 0:
            raise ConfigError(f"top_k = {self.top_k}; use 0 for all tokens, or a positive number")
        if not 0 <= self.min_p <= 1:
            raise ConfigError(f"min_p = {self.min_p}; it must be from 0 to 1")
        for name in ("presence_penalty", "frequency_penalty"):
            if not math.isfinite(getattr(self, name)):
                raise ConfigError(f"{name} = {getattr(self, name)}; use 0 for none, or a finite number")
        if not 0.01 <= self.repetition_penalty <= 100:  # Further out, logits are divided into infinity.
            raise ConfigError(f"repetition_penalty = {self.repetition_penalty}; use 1 for none, and 0.01 to 100")
        if any(token < 0 or math.isnan(bias) or bias == math.inf for token, bias in self.logit_bias):
            raise ConfigError(
                f"logit_bias = {self.logit_bias}; it needs token ids from 0 on, and finite numbers (or -inf to forbid)"
            )
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed = {self.seed}; it must be 0 or more and less than 2**63")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ConfigError(f"max_tokens = {self.max_tokens}; it must be 1 or more")
        if "" in self.stop:
            raise ConfigError("an empty stop string would stop before the first word; leave it out")
