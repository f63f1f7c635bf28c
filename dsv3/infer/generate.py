"""Tokens one at a time: the prompt in expanded form, then absorbed decoding over the latent cache (report 2.1.1)."""

import time
from collections.abc import Iterator
from enum import StrEnum

import torch
from jaxtyping import Float
from torch import Tensor

from dsv3.batch import TokenBatch
from dsv3.errors import ConfigError
from dsv3.infer.cache import DenseLatentCache
from dsv3.infer.sampler import SamplingParams, sample, seeded_generator
from dsv3.model.transformer import Transformer


class FinishReason(StrEnum):
    """Why generation ended."""

    END_OF_TEXT = "end_of_text"
    """The model wrote its end token."""
    STOP_STRING = "stop_string"
    MAX_TOKENS = "max_tokens"
    CONTEXT_LIMIT = "context_limit"
    """Prompt and answer fill `max_position_embeddings`."""


class CachedTokens:
    """The tokens of one growing text with their cache, so that the next turn computes only what is new."""

    def __init__(self, model: Transformer) -> None:
        weight = model.embed_tokens.weight
        self.cache = DenseLatentCache(
            model.config,
            num_sequences=1,
            capacity=model.config.max_position_embeddings,
            dtype=weight.dtype,
            device=weight.device,
        )
        self.ids: list[int] = []
        """Tokens whose entries are in the cache."""

    def missing(self, ids: list[int]) -> list[int]:
        """Return the end of `ids` that must be computed, at least one token, and forget what `ids` does not share."""
        shared = 0
        while shared < min(len(self.ids), len(ids) - 1) and self.ids[shared] == ids[shared]:
            shared += 1
        self.cache.truncate(0, length=shared)
        self.ids = self.ids[:shared]
        return ids[shared:]


class TokenStream:
    """Iterator over generated token ids; the end token is not among them.

    `finish_reason` is None until the stream has ended. A stream can be dropped at any token.
    """

    def __init__(
        self,
        model: Transformer,
        *,
        prompt_ids: list[int],
        params: SamplingParams,
        vocab_size: int,
        eos_id: int,
        cached: CachedTokens,
    ) -> None:
        self.finish_reason: FinishReason | None = None
        self.num_generated = 0
        self.prompt_seconds = 0.0
        """Spent on the prompt and the first token."""
        self.decode_seconds = 0.0
        """Spent on the tokens after the first."""
        self._model = model
        self._precision = model.stored_precision()
        self._params = params
        self._vocab_size = vocab_size
        self._eos_id = eos_id
        self._cached = cached
        self._generator = seeded_generator(params.seed)
        self._pending = cached.missing(prompt_ids)

    def __iter__(self) -> Iterator[int]:
        return self

    def __next__(self) -> int:
        self._check_limits()
        if self.finish_reason is not None:
            raise StopIteration
        began, is_first = time.perf_counter(), self.num_generated == 0
        logits = self._forward()
        chosen = sample(logits, params=self._params, generator=self._generator, vocab_size=self._vocab_size)
        token = int(chosen)
        if token == self._eos_id:
            self.finish_reason = FinishReason.END_OF_TEXT
            raise StopIteration
        if is_first:
            self.prompt_seconds = time.perf_counter() - began
        else:
            self.decode_seconds += time.perf_counter() - began
        self._pending = [token]
        self.num_generated += 1
        return token

    def _check_limits(self) -> None:
        if self.finish_reason is not None:
            return
        if self._params.max_tokens is not None and self.num_generated >= self._params.max_tokens:
            self.finish_reason = FinishReason.MAX_TOKENS
        elif len(self._cached.ids) + len(self._pending) >= self._model.config.max_position_embeddings:
            self.finish_reason = FinishReason.CONTEXT_LIMIT

    @torch.inference_mode()
    def _forward(self) -> Float[Tensor, "one vocab"]:
        """Run the tokens that are not cached yet, and return the logits after the last of them alone."""
        start, tokens = len(self._cached.ids), torch.tensor(self._pending)
        batch = TokenBatch(
            tokens=tokens,
            positions=torch.arange(start, start + len(tokens)),
            starts=torch.tensor([0, len(tokens)]),
        ).to(self._model.embed_tokens.weight.device)
        output = self._model(batch, cache=self._cached.cache, precision=self._precision)
        self._cached.ids.extend(self._pending)
        self._pending = []
        return self._model.logits(output.hidden[-1:])


def stream(
    model: Transformer,
    *,
    prompt_ids: list[int],
    params: SamplingParams,
    vocab_size: int,
    eos_id: int,
    cached: CachedTokens | None = None,
) -> TokenStream:
    """Start generating after `prompt_ids`; nothing is computed before the first token is asked for.

    `vocab_size` is the tokenizer's: rows of the output head from there on are never drawn. With `cached`, tokens it
    already holds are not computed again; it is moved along as the stream is read.

    Raises:
        ConfigError: the prompt is empty, holds ids outside the vocabulary, or leaves no room in the context.
    """
    limit = model.config.max_position_embeddings
    if not prompt_ids:
        raise ConfigError("the prompt has no tokens; give at least one, such as the model's bos_token_id")
    check_ids(prompt_ids, vocab_size=model.config.vocab_size)
    if len(prompt_ids) >= limit:
        raise ConfigError(
            f"the prompt has {len(prompt_ids)} tokens, and the model's context is {limit} tokens, prompt and answer "
            f"together; shorten the prompt to at most {limit - 1}"
        )
    return TokenStream(
        model,
        prompt_ids=prompt_ids,
        params=params,
        vocab_size=vocab_size,
        eos_id=eos_id,
        cached=CachedTokens(model) if cached is None else cached,
    )


def check_ids(ids: list[int], *, vocab_size: int) -> None:
    """Raise ConfigError unless every id is one of `vocab_size`; names the first that is not, and its place."""
    for place, token in enumerate(ids):
        if not 0 <= token < vocab_size:
            raise ConfigError(
                f"token id {token} at place {place} is outside the model's vocabulary of {vocab_size} "
                f"(0 to {vocab_size - 1})"
            )
