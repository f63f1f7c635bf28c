"""From logits to the next token: penalties and bias, grammar, temperature, top-k, top-p, min-p, in this order.

Every draw is the largest of p / E, with a waiting time E for each token that is a function of (seed, place in the
answer, token). So a draw does not depend on neighbours, on restarts, or on which unlikely tokens were looked at; and a
draft that is drawn with the noise of the place it stands for tends to be the token that is drawn there.
"""

import math
import secrets
from collections import Counter
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dsv3.errors import CheckpointError, ConfigError
from dsv3.infer.params import SamplingParams

_STEP = np.uint64(0x9E3779B97F4A7C15)
DRAWN_AT_ONCE = 1 << 19
"""Logits for which noise is made at once; it takes 8 bytes for each, several times over."""


def next_probabilities(
    logits: Float[Tensor, "sequence vocab"], *, params: SamplingParams
) -> Float[Tensor, "sequence vocab"]:
    """Return the distribution that is drawn from: after temperature, then top-k, then top-p, then min-p.

    The plain form; `likely_tokens` gives the same without sorting all tokens. At temperature 0 all of it lies on the
    likeliest token.
    """
    if params.temperature == 0:
        return torch.nn.functional.one_hot(logits.argmax(dim=-1), logits.shape[-1]).to(logits.dtype)
    # The largest logit is taken away first: otherwise a tiny temperature would divide it into infinity.
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    scores = (wide - wide.amax(dim=-1, keepdim=True)) / params.temperature
    if 0 < params.top_k < scores.shape[-1]:
        scores = scores.masked_fill(~_top_k_mask(scores, count=params.top_k), -math.inf)
    probabilities = scores.softmax(dim=-1)
    if params.top_p < 1:
        kept = probabilities.masked_fill(~_top_p_mask(probabilities, share=params.top_p), 0.0)
        probabilities = kept / kept.sum(dim=-1, keepdim=True)
    if params.min_p > 0:
        least = params.min_p * probabilities.amax(dim=-1, keepdim=True)
        kept = probabilities.masked_fill(probabilities < least, 0.0)
        probabilities = kept / kept.sum(dim=-1, keepdim=True)
    return probabilities


def likely_tokens(
    logits: Float[Tensor, " vocab"], *, params: SamplingParams
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Return the tokens that may be drawn and their probabilities, as `next_probabilities` has them.

    In order of id; of equals at an edge those with the lowest ids are in. The temperature must not be 0.
    """
    # numpy rather than torch: its threads cost more than they bring for one row of logits.
    row = logits.detach().cpu().numpy()
    with np.errstate(over="ignore"):  # A tiny temperature sends all but the likeliest to minus infinity.
        scaled = (row.astype(np.float64) - row.max()) / params.temperature
    tokens, weights = np.arange(len(row)), np.exp(scaled)  # 1 for the likeliest
    if 0 < params.top_k < len(row):
        tokens = _highest(scaled, count=params.top_k)
        weights = weights[tokens]
    if params.top_p < 1:
        inside = _that_reach(weights, share=params.top_p)
        tokens, weights = tokens[inside], weights[inside]
    if params.min_p > 0:
        inside = np.flatnonzero(weights >= params.min_p)
        tokens, weights = tokens[inside], weights[inside]
    return tokens, weights / weights.sum()


def waiting_times(seed: int, *, place: int, tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Return an exponentially distributed number for each token, a function of (seed, place, token) alone.

    The bits are those of SplitMix64 (Steele, Lea and Flood, 2014), once over the seed and place, once over the token.
    Tokens counted from 1 keep it from its fixed point 0, and 52 bits and a half from a number that rounds to 1.
    """
    return _waiting_times(_starts([seed], places=[place]), tokens=tokens.astype(np.uint64))


def _starts(seeds: Sequence[int], *, places: Sequence[int]) -> npt.NDArray[np.uint64]:
    return _mixed(np.array(seeds, dtype=np.uint64) + np.array(places, dtype=np.uint64) * _STEP)


def _waiting_times(starts: npt.NDArray[np.uint64], *, tokens: npt.NDArray[np.uint64]) -> npt.NDArray[np.float64]:
    bits = _mixed(_mixed((tokens + np.uint64(1)) * _STEP + starts) ^ starts)
    uniform = ((bits >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52
    return -np.log(uniform)


def draw_freely(
    logits: Float[Tensor, "row vocab"], *, seeds: Sequence[int], places: Sequence[int], temperatures: Sequence[float]
) -> list[int]:
    """Return a token for each row, drawn from all that there are: what `TokenSampler.choose` draws, for many at once.

    The largest p / E is where log p - log E is largest, and there no row needs its sum. Temperatures must not be 0.
    """
    drawn: list[int] = []
    at_once = max(1, DRAWN_AT_ONCE // logits.shape[1])
    tokens = np.arange(logits.shape[1], dtype=np.uint64)
    for first in range(0, logits.shape[0], at_once):
        part = slice(first, first + at_once)
        rows = logits[part].detach().cpu().numpy().astype(np.float64)
        with np.errstate(over="ignore"):  # A tiny temperature sends all but the likeliest to minus infinity.
            rows = (rows - rows.max(axis=1, keepdims=True)) / np.array(temperatures[part])[:, None]
        starts = _starts(seeds[part], places=places[part])[:, None]
        drawn += np.argmax(rows - np.log(_waiting_times(starts, tokens=tokens)), axis=1).tolist()
    return drawn


class TokenSampler:
    """Draws the tokens of one answer, place by place. Drafts are drawn as if those before them had been accepted."""

    def __init__(self, params: SamplingParams, *, prompt_ids: Sequence[int], vocab_size: int) -> None:
        self.params = params
        self.seed = secrets.randbits(63) if params.seed is None else params.seed
        self._vocab_size = vocab_size
        self._answer: Counter[int] = Counter()
        # A prompt may have ids beyond those that are drawn from.
        is_asked = params.repetition_penalty != 1
        self._prompt = {token for token in prompt_ids if token < vocab_size} if is_asked else set()
        self._bias = dict(params.logit_bias)
        self._counts = params.presence_penalty != 0 or params.frequency_penalty != 0 or params.repetition_penalty != 1

    @property
    def is_plain(self) -> bool:
        """Whether a draw is simply the likeliest token, unless a grammar forbids it."""
        return self.params.temperature == 0 and not self._counts and not self._bias

    @property
    def is_free(self) -> bool:
        """Whether a draw is one from all tokens as the model has them, so that many can be drawn at once."""
        params = self.params
        cut = params.top_k > 0 or params.top_p < 1 or params.min_p > 0
        return params.temperature > 0 and not (cut or self._counts or self._bias)

    def add(self, token: int) -> None:
        """Take a token into the answer."""
        if self._counts:
            self._answer[token] += 1

    def choose(
        self,
        logits: Float[Tensor, " row"],
        *,
        place: int,
        drafts: Sequence[int] = (),
        allowed: Bool[np.ndarray, " vocab"] | None = None,
    ) -> int:
        """Return the token at a place of the answer. `drafts` stand between what was added and this place.

        `allowed` is of `vocab_size` tokens. Ids from `vocab_size` on are never drawn: the published embedding has
        129,280 rows for 128,815 tokens, and what the unused rows score means nothing.

        Raises:
            CheckpointError: the logits are not numbers.
            ConfigError: every token is forbidden.
        """
        scores = self._adjusted(logits[: self._vocab_size], drafts=drafts)
        if allowed is not None:
            scores = scores.masked_fill(torch.from_numpy(~allowed[: self._vocab_size]), -math.inf)
        best = float(scores.max())
        if best == -math.inf:
            raise ConfigError("no token may come next: the grammar and logit_bias forbid them all; loosen one of them")
        if not math.isfinite(best):
            raise CheckpointError(NOT_NUMBERS)
        if self.params.temperature == 0:
            return int(scores.argmax())
        if self.is_free:
            temperature = self.params.temperature
            return draw_freely(scores[None], seeds=[self.seed], places=[place], temperatures=[temperature])[0]
        tokens, probabilities = likely_tokens(scores, params=self.params)
        waits = waiting_times(self.seed, place=place, tokens=tokens)
        return int(tokens[np.argmax(probabilities / waits)])

    def _adjusted(self, logits: Float[Tensor, " vocab"], *, drafts: Sequence[int]) -> Float[Tensor, " vocab"]:
        """Return logits after repetition, frequency and presence penalties, then bias."""
        if not self._counts and not self._bias:
            return logits
        scores = logits.clone()
        if self._counts:
            answer = self._answer + Counter(drafts)
            if self.params.repetition_penalty != 1:
                seen = torch.tensor(sorted(self._prompt | answer.keys()), dtype=torch.long)
                here = scores[seen]
                factor = self.params.repetition_penalty
                scores[seen] = torch.where(here > 0, here / factor, here * factor)
            if answer:
                tokens, counts = torch.tensor(list(answer)), torch.tensor(list(answer.values()), dtype=scores.dtype)
                scores[tokens] -= self.params.frequency_penalty * counts + self.params.presence_penalty
        if self._bias:
            scores[torch.tensor(list(self._bias))] += torch.tensor(list(self._bias.values()), dtype=scores.dtype)
        return scores


NOT_NUMBERS = (
    "the model's logits are not numbers (NaN or infinity): its weights are damaged, or overflow in this type; "
    "try weights 'fp32'"
)


def _highest(scores: npt.NDArray[np.float64], *, count: int) -> npt.NDArray[np.int64]:
    """Return the tokens of the `count` highest scores, in order of id; of equal ones the lowest ids."""
    least = np.partition(scores, len(scores) - count)[len(scores) - count]
    inside = scores > least
    equals = np.flatnonzero(scores == least)
    inside[equals[: count - int(inside.sum())]] = True
    return np.flatnonzero(inside)


def _that_reach(weights: npt.NDArray[np.float64], *, share: float) -> npt.NDArray[np.int64]:
    """Return the places of the shortest list of largest weights that has `share` of them all, in order of place."""
    total = weights.sum()
    # Whatever weighs less than this need not be sorted: all of it together is less than what may be left out.
    likely = np.flatnonzero(weights >= (1 - share) * total / len(weights))
    ordered = np.sort(weights[likely])[::-1]
    count = int((np.cumsum(ordered) - ordered < share * total).sum())
    return likely[_highest(weights[likely], count=count)]


def _mixed(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    y = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    y = (y ^ (y >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return y ^ (y >> np.uint64(31))


def _top_k_mask(scores: Float[Tensor, "sequence vocab"], *, count: int) -> Bool[Tensor, "sequence vocab"]:
    """Mark the `count` highest scores of each row; of equal ones exactly as many as there is room for."""
    mask = torch.zeros_like(scores, dtype=torch.bool)
    return mask.scatter(-1, scores.topk(count, dim=-1).indices, torch.ones_like(mask))


def _top_p_mask(probabilities: Float[Tensor, "sequence vocab"], *, share: float) -> Bool[Tensor, "sequence vocab"]:
    """Mark the shortest list of likeliest tokens that reaches `share`; never fewer than one."""
    ordered = probabilities.sort(dim=-1, descending=True, stable=True)
    before = ordered.values.cumsum(dim=-1) - ordered.values
    return torch.zeros_like(probabilities, dtype=torch.bool).scatter(-1, ordered.indices, before < share)
