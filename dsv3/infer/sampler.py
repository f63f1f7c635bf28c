"""From logits to the next token: greedy, temperature, top-k and top-p."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from dsv3.errors import CheckpointError, ConfigError


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
    """Go on past the model's end token, as benchmarks want it."""
    max_tokens: int | None = 256
    """Tokens generated at most; None goes on to the end of the text or of the context."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ConfigError(f"temperature = {self.temperature}; use 0 for the likeliest token, or a positive number")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p = {self.top_p}; it must be greater than 0 and at most 1")
        if self.top_k < 0:
            raise ConfigError(f"top_k = {self.top_k}; use 0 for all tokens, or a positive number")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed = {self.seed}; it must be 0 or more and less than 2**63")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ConfigError(f"max_tokens = {self.max_tokens}; it must be 1 or more")
        if "" in self.stop:
            raise ConfigError("an empty stop string would stop before the first word; leave it out")


def seeded_generator(seed: int | None) -> torch.Generator:
    """Return a random source for one request, on the CPU, so that a seed means the same on every device."""
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    return generator


def sample(
    logits: Float[Tensor, "sequence vocab"],
    *,
    params: SamplingParams,
    generator: torch.Generator,
    vocab_size: int | None = None,
) -> Int[Tensor, " sequence"]:
    """Draw the next token of each sequence.

    Ids from `vocab_size` on are never drawn: the published embedding has 129,280 rows for 128,815 tokens, and what
    the unused rows score means nothing.
    """
    scores = logits[:, :vocab_size].float()
    if scores.isnan().any():
        raise CheckpointError(
            "the model's logits are not numbers (NaN): its weights are damaged, or overflow in this dtype; "
            "try dtype='float32'"
        )
    if params.temperature == 0:
        return scores.argmax(dim=-1)
    return draw(next_probabilities(scores, params=params), generator=generator)


def next_probabilities(
    logits: Float[Tensor, "sequence vocab"], *, params: SamplingParams
) -> Float[Tensor, "sequence vocab"]:
    """Return the distribution that is drawn from: after temperature, then top-k, then top-p.

    At temperature 0 all of it lies on the likeliest token.
    """
    if params.temperature == 0:
        return torch.nn.functional.one_hot(logits.argmax(dim=-1), logits.shape[-1]).float()
    # The largest logit is taken away first: otherwise a tiny temperature would divide it into infinity.
    scores = (logits.float() - logits.float().amax(dim=-1, keepdim=True)) / params.temperature
    if 0 < params.top_k < scores.shape[-1]:
        scores = scores.masked_fill(~_top_k_mask(scores, count=params.top_k), -math.inf)
    probabilities = scores.softmax(dim=-1)
    if params.top_p < 1:
        kept = probabilities.masked_fill(~_top_p_mask(probabilities, share=params.top_p), 0.0)
        probabilities = kept / kept.sum(dim=-1, keepdim=True)
    return probabilities


def draw(probabilities: Float[Tensor, "sequence vocab"], *, generator: torch.Generator) -> Int[Tensor, " sequence"]:
    """Draw one index a row.

    Each index waits an exponential time at the rate of its probability, and the first one wins. Unlike a search in
    the running sum this can never return an index of probability zero.
    """
    noise = torch.empty(probabilities.shape, device=generator.device).exponential_(generator=generator)
    # float32 noise can round to 0, and 0 / 0 is not a number.
    waiting = noise.clamp_min(torch.finfo(torch.float32).tiny).to(probabilities.device)
    return (probabilities / waiting).argmax(dim=-1)


def _top_k_mask(scores: Float[Tensor, "sequence vocab"], *, count: int) -> Bool[Tensor, "sequence vocab"]:
    """Mark the `count` highest scores of each row; of equal ones exactly as many as there is room for."""
    mask = torch.zeros_like(scores, dtype=torch.bool)
    return mask.scatter(-1, scores.topk(count, dim=-1).indices, torch.ones_like(mask))


def _top_p_mask(probabilities: Float[Tensor, "sequence vocab"], *, share: float) -> Bool[Tensor, "sequence vocab"]:
    """Mark the shortest list of likeliest tokens that reaches `share`; never fewer than one."""
    ordered = probabilities.sort(dim=-1, descending=True, stable=True)
    before = ordered.values.cumsum(dim=-1) - ordered.values
    return torch.zeros_like(probabilities, dtype=torch.bool).scatter(-1, ordered.indices, before < share)
