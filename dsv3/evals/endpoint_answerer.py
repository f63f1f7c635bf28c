"""A model behind the OpenAI API as an answerer."""

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Event
from typing import Any, TypeVar

from dsv3.errors import DataError
from dsv3.evals.answerer import Continuation
from dsv3.evals.endpoint import Endpoint, GivenUpError, RefusedError
from dsv3.evals.running import CannotAnswerError

MOST_STOPS = 4
"""Stop texts that the API takes; answers are cut at the others here."""
NO_ECHO = "the server gives no log-probabilities of a prompt (echo and logprobs of completions), which are needed here"
NO_FIRST = "the server gives no log-probability of a text's first token, so that a whole text cannot be scored"

Asked = TypeVar("Asked")
Got = TypeVar("Got")


class EndpointAnswerer:
    """Asks a server: generation by completions or, with `chat`, by conversations; likelihood by echoed prompts."""

    def __init__(self, endpoint: Endpoint, *, model: str, chat: bool = False, concurrency: int = 8) -> None:
        self._endpoint, self._model, self._chat, self._concurrency = endpoint, model, chat, concurrency

    def continuations(self, pairs: Sequence[tuple[str, str]]) -> list[Continuation]:
        """Score continuations by their tokens within the whole; those of a context are counted by asking for it alone.

        White space at the end of a context is scored with the continuation, whose first token it begins.

        Raises:
            CannotAnswerError: the server does not tell log-probabilities of prompts.
        """
        moved = [_with_space(*pair) for pair in pairs]
        contexts = list(dict.fromkeys(context for context, _ in moved))
        begun = dict(zip(contexts, self._all(self._num_tokens, contexts), strict=True))
        return self._all(partial(self._continuation, begun=begun), moved)

    def rolling(self, texts: Sequence[str]) -> list[float]:
        """Return the log-probability of texts that fit the server's context.

        Raises:
            CannotAnswerError: the server does not tell log-probabilities of prompts, or puts no token before a text.
        """
        return [found.logprob for found in self.continuations([("", text) for text in texts])]

    def generate(
        self, prompts: Sequence[str], *, stops: Sequence[Sequence[str]], max_tokens: Sequence[int]
    ) -> list[str]:
        """Return greedy answers."""
        return self._all(self._answer, list(zip(prompts, stops, max_tokens, strict=True)))

    def _all(self, ask: Callable[[Asked, Event], Got], asked: Sequence[Asked]) -> list[Got]:
        """Ask several at once; where one fails for good the others are not asked again, and its failure is raised."""
        failed = Event()

        def one(item: Asked) -> Got:
            try:
                return ask(item, failed)
            except BaseException:
                failed.set()
                raise

        with ThreadPoolExecutor(self._concurrency) as threads:
            futures = [threads.submit(one, item) for item in asked]
        errors = [error for future in futures if (error := future.exception()) is not None]
        for error in errors:
            if not isinstance(error, GivenUpError):
                raise error
        return [future.result() for future in futures]

    def _answer(self, asked: tuple[str, Sequence[str], int], failed: Event) -> str:
        prompt, stops, max_tokens = asked
        body: dict[str, Any] = {"max_tokens": max_tokens, "temperature": 0}
        if stops:
            body["stop"] = list(stops[:MOST_STOPS])
        if self._chat:
            body["messages"] = [{"role": "user", "content": prompt}]
            text = self._ask("chat/completions", body, read=_message, prompt=prompt, failed=failed)
        else:
            text = self._ask("completions", body | {"prompt": prompt}, read=_text, prompt=prompt, failed=failed)
        return text[: min((place for stop in stops if (place := text.find(stop)) >= 0), default=len(text))]

    def _num_tokens(self, context: str, failed: Event) -> int:
        if not context:
            return 0
        body = {"prompt": context, "max_tokens": 1, "temperature": 0}
        return self._ask("completions", body, read=_prompt_tokens, prompt=context, failed=failed)

    def _continuation(self, asked: tuple[str, str], failed: Event, *, begun: dict[str, int]) -> Continuation:
        context, continuation = asked
        prompt = context + continuation
        body = {"prompt": prompt, "max_tokens": 1, "temperature": 0, "echo": True, "logprobs": 1}
        listed = self._ask("completions", body, read=_echoed, prompt=prompt, failed=failed)
        first = begun[context]
        if not context:
            if listed[0][0] and prompt.startswith(listed[0][0]):
                raise CannotAnswerError(NO_FIRST)
            first = 1  # the token that begins every text
        scored = listed[first:]
        if any(logprob is None for _, logprob, _ in scored):
            raise CannotAnswerError(NO_ECHO)
        return Continuation(
            logprob=math.fsum(logprob for _, logprob, _ in scored if logprob is not None),
            is_greedy=all(logprob is not None and logprob >= best for _, logprob, best in scored),
            num_tokens=len(scored),
            num_cut=0,
        )

    def _ask(self, path: str, body: dict[str, Any], *, read: Callable[[Any], Got], prompt: str, failed: Event) -> Got:
        about = f"the prompt that begins with {prompt[:40]!r}"
        check = "the address, --endpoint-model, --key-variable and the length of the prompt"
        try:
            return self._endpoint.ask(
                path, {"model": self._model} | body, read=read, about=about, check=check, stopped=failed
            )
        except RefusedError as error:
            if (
                body.get("echo")
                and error.status in (400, 404, 422)
                and any(word in str(error).lower() for word in ("echo", "logprobs"))
            ):
                raise CannotAnswerError(f"{NO_ECHO}: {error}") from error
            if error.status in (400, 413, 422):
                raise DataError(str(error)) from error
            raise


def _with_space(context: str, continuation: str) -> tuple[str, str]:
    kept = context.rstrip()
    return kept, context[len(kept) :] + continuation


def _text(answer: Any) -> str:
    [choice] = answer["choices"]
    return _checked(choice["text"])


def _message(answer: Any) -> str:
    [choice] = answer["choices"]
    return _checked(choice["message"].get("content") or "")


def _checked(text: Any) -> str:
    if not isinstance(text, str):
        raise TypeError("an answer is to be text")
    return text


def _prompt_tokens(answer: Any) -> int:
    num = (answer.get("usage") or {}).get("prompt_tokens")
    if not isinstance(num, int):
        raise CannotAnswerError("the server does not count the tokens of a prompt (usage), which this protocol needs")
    return num


def _echoed(answer: Any) -> list[tuple[str, float | None, float]]:
    """Return the tokens of a prompt, each with its log-probability and that of the likeliest in its place."""
    [choice] = answer["choices"]
    logprobs, num = choice.get("logprobs"), _prompt_tokens(answer)
    if not logprobs or len(logprobs.get("token_logprobs") or ()) < num:
        raise CannotAnswerError(NO_ECHO)
    values, tops = logprobs["token_logprobs"][:num], logprobs.get("top_logprobs") or [None] * num
    return list(zip(logprobs["tokens"][:num], values, map(_best, tops[:num]), strict=True))


def _best(top: dict[str, float] | None) -> float:
    return max(top.values()) if top else math.inf
