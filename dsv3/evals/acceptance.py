"""How often the token that MTP drafts is the one that the model then says, on each kind of text (report 5.4.3)."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dsv3.config import EngineConfig
from dsv3.errors import ConfigError, DataError, EngineError
from dsv3.infer.events import FinishReason
from dsv3.infer.loaded import LoadedModel
from dsv3.infer.params import SamplingParams
from dsv3.infer.request import Request

PROMPT_TOKENS, ANSWER_TOKENS = 32, 64
AT_ONCE = 16
"""Answers."""


@dataclass(frozen=True, kw_only=True)
class Acceptance:
    """Drafts of the second token, while a model went on with texts of one domain."""

    name: str
    drafted: tuple[int, ...]
    """In each answer."""
    accepted: tuple[int, ...]
    """Those of them that were right."""

    @property
    def rate(self) -> float:
        """Share of drafts that were right; not a number where none was made."""
        return sum(self.accepted) / sum(self.drafted) if any(self.drafted) else math.nan

    @property
    def error(self) -> float:
        """Standard error of the rate. Drafts of one answer depend on each other, so it is taken over answers."""
        count = len(self.drafted)
        if count < 2 or not any(self.drafted):
            return math.nan
        squares = sum((a - self.rate * d) ** 2 for a, d in zip(self.accepted, self.drafted, strict=True))
        return math.sqrt(count / (count - 1) * squares) / sum(self.drafted)

    def as_dict(self) -> dict[str, object]:
        """Return it for JSON; what is not a number is null."""
        rate, error = (value if math.isfinite(value) else None for value in (self.rate, self.error))
        return {
            "name": self.name,
            "answers": len(self.drafted),
            "drafted": sum(self.drafted),
            "accepted": sum(self.accepted),
            "rate": rate,
            "error": error,
        }


def draft_acceptance(
    model: LoadedModel,
    *,
    documents: Mapping[str, Sequence[list[int]]],
    answers: int,
    temperature: float = 0.8,
    seed: int = 0,
) -> tuple[Acceptance, ...]:
    """Let the model go on with beginnings of texts, up to `answers` of each domain, and count its drafts.

    One token is drafted ahead in every step, whether it pays or not. Models that are small fall into loops when they
    always say the likeliest token, and every draft of a loop is right: so answers are drawn, unless `temperature` is 0.

    Raises:
        ConfigError: the model has no MTP module, or its context is too short.
        DataError: a domain has no text as long as a prompt.
    """
    if not model.runner.num_mtp_modules:
        raise ConfigError(f"{model.source} has no MTP module, so nothing is drafted")
    length = PROMPT_TOKENS + ANSWER_TOKENS
    if length > model.config.max_position_embeddings:
        raise ConfigError(
            f"{length} tokens are read and said, and the context is {model.config.max_position_embeddings}"
        )
    engine = model.new_engine(
        EngineConfig(max_sequences=AT_ONCE, max_drafts=1, adaptive_drafts=False, prefix_caching=False),
        cache_tokens=AT_ONCE * (length + 64),
    )
    counts: dict[str, list[int]] = {}
    for name, texts in documents.items():
        prompts = [text[:PROMPT_TOKENS] for text in texts if len(text) >= PROMPT_TOKENS][:answers]
        if not prompts:
            raise DataError(f"{name} has no text of {PROMPT_TOKENS} tokens to go on with; give longer ones")
        for number, prompt in enumerate(prompts):
            # A seed for each, or answers would be drawn alike and tell less than their number says.
            params = SamplingParams(
                temperature=temperature, top_p=1.0, max_tokens=ANSWER_TOKENS, seed=seed + len(counts)
            )
            request = Request(id=f"{number} {name}", prompt_ids=prompt, params=params)
            counts[request.id] = [0, 0]
            engine.add(request)
    while engine.has_work:
        for event in engine.step():
            if event.finish_reason is FinishReason.FAILED:
                raise EngineError(event.error)
            counts[event.id][0] += event.num_drafted
            counts[event.id][1] += event.num_accepted
    return tuple(_of_domain(name, counts) for name in documents)


def _of_domain(name: str, counts: Mapping[str, Sequence[int]]) -> Acceptance:
    mine = [both for key, both in counts.items() if key.partition(" ")[2] == name]
    return Acceptance(name=name, drafted=tuple(d for d, _ in mine), accepted=tuple(a for _, a in mine))
