"""Scores of texts by a loaded model, cut into tokens as lm-evaluation-harness cuts them, and greedy answers.

Source of the rules: lm-eval 0.4.13, `TemplateLM._encode_pair` and the `hf` model; docs/evaluation.md says where ours
differ.
"""

import math
from collections.abc import Sequence

from dsv3.errors import ConfigError, DataError
from dsv3.evals.answerer import Continuation
from dsv3.evals.token_scores import TOKENS_AT_ONCE, ScoredText, TextScore, score_texts
from dsv3.infer.loaded import LoadedModel
from dsv3.infer.params import SamplingParams
from dsv3.infer.text import TextStream

TEXTS_AT_ONCE = 4096
"""Texts that lie in memory as tokens; what they share is read once for so many."""
PASSES_AHEAD = 4
"""Passes whose tokens there is room for beside the longest text."""


class EngineAnswerer:
    """An `Answerer` over a model of ours. Every text begins with the model's begin token."""

    def __init__(self, model: LoadedModel, *, context: int | None = None) -> None:
        limit = model.config.max_position_embeddings
        if context is not None and not 2 <= context <= limit:
            raise ConfigError(f"context = {context}; {model.source} reads 2 to {limit} tokens")
        self._model = model
        self._bos = model.config.bos_token_id
        self._bos_text = model.tokenizer.decode([self._bos])
        self.context = limit if context is None else context
        """Tokens that the model sees at once, at most."""

    def continuations(self, pairs: Sequence[tuple[str, str]]) -> list[Continuation]:
        """Score (context, continuation) pairs; an empty context stands for the beginning of a text.

        Spaces that end a context are taken to begin the continuation. What does not fit is cut off the context's
        beginning.

        Raises:
            DataError: a continuation has no tokens of its own, or more than the context holds.
        """
        blocks = [pairs[begin : begin + TEXTS_AT_ONCE] for begin in range(0, len(pairs), TEXTS_AT_ONCE)]
        return [found for block in blocks for found in self._continuations(block)]

    def rolling(self, texts: Sequence[str]) -> list[float]:
        """Return the log-probability of whole texts, the begin token before them not counted.

        A text longer than the context is scored in windows that each see one token of the window before; the last
        one sees as much as fits.
        """
        windows: list[ScoredText] = []
        owners: list[int] = []
        for owner, tokens in enumerate(self._model.tokenizer.encode_batch(list(texts))):
            mine = rolling_windows([self._bos, *tokens], context=self.context)
            windows += mine
            owners += [owner] * len(mine)
        parts: list[list[float]] = [[] for _ in texts]
        for owner, score in zip(owners, self._score(windows), strict=True):
            parts[owner] += score.logprobs
        return [math.fsum(part) for part in parts]

    def generate(
        self, prompts: Sequence[str], *, stops: Sequence[Sequence[str]], max_tokens: Sequence[int]
    ) -> list[str]:
        """Return greedy answers, each up to its first stop, which is not part of it.

        What does not fit beside an answer of `max_tokens` is cut off the prompt's beginning.

        Raises:
            ConfigError: the context has no room for an answer of `max_tokens`.
        """
        ids = self._encode(list(prompts))
        params = [
            SamplingParams(temperature=0.0, stop=tuple(stop), max_tokens=most)
            for stop, most in zip(stops, max_tokens, strict=True)
        ]
        for most in max_tokens:
            if most >= self.context:
                raise ConfigError(f"an answer of {most} tokens leaves no room in a context of {self.context}")
        answers = [""] * len(prompts)
        # Prompts that begin alike follow each other, so that the cache still has what they share.
        todo = sorted(range(len(ids)), key=ids.__getitem__, reverse=True)
        running: dict[int, TextStream] = {}
        most_at_once = self._model.streams.engine.config.max_sequences
        while todo or running:
            while todo and len(running) < most_at_once:
                place = todo.pop()
                fitting = ids[place][-(self.context - max_tokens[place]) :]
                running[place] = self._model.stream_ids(fitting, params=params[place])
            # One piece each, so that none runs far beyond its stop unread.
            for place, stream in list(running.items()):
                piece = next(stream, None)
                if piece is None:
                    del running[place]
                else:
                    answers[place] += piece
        return answers

    def _continuations(self, pairs: Sequence[tuple[str, str]]) -> list[Continuation]:
        encoded = self._encode_pairs(pairs)
        scores = self._score([self._cut(context, continuation) for context, continuation in encoded])
        return [
            Continuation(
                logprob=math.fsum(score.logprobs),
                is_greedy=score.is_greedy,
                num_tokens=len(continuation),
                num_cut=max(0, len(context) + len(continuation) - self.context - 1),
            )
            for (context, continuation), score in zip(encoded, scores, strict=True)
        ]

    def _encode(self, texts: list[str]) -> list[list[int]]:
        """Return the tokens of texts after the begin token, which is not put before one that spells it out."""
        return [
            ids if text.startswith(self._bos_text) else [self._bos, *ids]
            for text, ids in zip(texts, self._model.tokenizer.encode_batch(texts), strict=True)
        ]

    def _encode_pairs(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[list[int], list[int]]]:
        """Return the tokens of contexts and continuations; a continuation is what the two together have more."""
        contexts = [context.rstrip() for context, _ in pairs]
        distinct = list(dict.fromkeys(contexts))
        known = dict(zip(distinct, self._encode(distinct), strict=True))
        wholes = self._encode([context + continuation for context, continuation in pairs])
        encoded = []
        for (context, continuation), stripped, whole in zip(pairs, contexts, wholes, strict=True):
            before = known[stripped]
            after = whole[len(before) :]
            if not after:
                raise DataError(
                    f"the continuation {continuation!r} has no token of its own after {context[-40:]!r}: it is empty, "
                    "or one token spans both; let it begin where a word does"
                )
            if len(after) > self.context:
                raise DataError(
                    f"the continuation {continuation[:40]!r}... has {len(after)} tokens, and the model's context is "
                    f"{self.context}; score so long a text by rolling()"
                )
            encoded.append((before, after))
        return encoded

    def _cut(self, context: list[int], continuation: list[int]) -> ScoredText:
        """Return the end of both that fits: the last token is predicted, and never read."""
        return ScoredText(tokens=[*context, *continuation][-(self.context + 1) :], num_scored=len(continuation))

    def _score(self, texts: Sequence[ScoredText]) -> list[TextScore]:
        engine = self._model.streams.engine
        longest = max((len(text.tokens) - 1 for text in texts), default=0)
        with engine.lend_pages(longest, most_tokens=longest + PASSES_AHEAD * TOKENS_AT_ONCE) as pages:
            return score_texts(self._model.runner, texts=texts, pages=pages, page_tokens=engine.config.page_tokens)


def rolling_windows(tokens: list[int], *, context: int) -> list[ScoredText]:
    """Cut a text into windows in which each of its tokens but the first is scored once."""
    windows = []
    for end in range(context + 1, len(tokens) + context, context):
        end, begin = min(end, len(tokens)), end - context
        windows.append(ScoredText(tokens=tokens[max(0, end - context - 1) : end], num_scored=end - begin))
    return windows
