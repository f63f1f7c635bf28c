"""A teacher behind the OpenAI API: asked over HTTP, several problems at once, again where that may help."""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from threading import Event
from typing import Any

from dsv3.config.teaching import DistillConfig
from dsv3.data.special_tokens import THINK_BEGIN, THINK_END
from dsv3.errors import ConfigError, EngineError, MissingExtraError
from dsv3.posttrain.rollout import answer_seed
from dsv3.posttrain.teacher import Candidate, Question

try:
    import httpx
except ImportError as error:
    raise MissingExtraError(package="httpx", extra="rl", purpose="a teacher behind an address") from error

FIRST_PAUSE_SECONDS = 1.0
LONGEST_PAUSE_SECONDS = 60.0
LOOK_SECONDS = 0.2
"""Between two looks at whether to stop."""


class _GivenUpError(Exception):
    """An answer was given up, because another has failed for good."""


class EndpointTeacher:
    """A model that others serve."""

    def __init__(self, config: DistillConfig) -> None:
        self.config = config
        key = os.environ.get(config.key_variable, "") if config.key_variable else ""
        if config.key_variable and not key:
            raise ConfigError(f"the environment variable {config.key_variable} is to hold the key, and is not set")
        self.url = f"{config.teacher.rstrip('/')}/chat/completions"
        self.identity = {"teacher": config.teacher, "model": config.teacher_model}
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}

    def answers(
        self, questions: Sequence[Question], *, stopping: Callable[[], bool]
    ) -> Iterator[tuple[Question, list[Candidate]]]:
        """Ask `concurrency` questions at once.

        Where one fails for good, no other is begun, those that others were answered meanwhile are yielded, and then it
        is told.

        Raises:
            ConfigError: the endpoint refuses what is asked.
            EngineError: it could not be reached, or answered nonsense, as often as it was tried.
        """
        config, failed = self.config, Event()
        left = iter(questions)
        under_way: dict[Future[list[Candidate]], Question] = {}
        failure: BaseException | None = None
        client = httpx.Client(headers=self._headers, timeout=config.timeout_seconds)
        with client, ThreadPoolExecutor(config.concurrency) as threads:
            try:
                while True:
                    while len(under_way) < config.concurrency and failure is None and not stopping():
                        if (question := next(left, None)) is None:
                            break
                        under_way[threads.submit(self._candidates, client, question, failed)] = question
                    if not under_way:
                        break
                    done, _ = wait(under_way, timeout=LOOK_SECONDS, return_when=FIRST_COMPLETED)
                    for future in done:
                        question = under_way.pop(future)
                        error = future.exception()
                        if error is None:
                            yield question, future.result()
                        elif not isinstance(error, _GivenUpError):
                            failure = failure or error
                            failed.set()
            finally:
                failed.set()
        if failure is not None:
            raise failure

    def _candidates(self, client: httpx.Client, question: Question, failed: Event) -> list[Candidate]:
        return [
            self._candidate(client, question=question, number=number, failed=failed)
            for number in range(self.config.candidates)
        ]

    def _candidate(self, client: httpx.Client, *, question: Question, number: int, failed: Event) -> Candidate:
        """Ask for one answer, again after pauses that double where the endpoint is busy, broken or slow."""
        config = self.config
        # 31 bits: some endpoints take no more.
        seed = answer_seed(config.seed, place=question.place, number=number) >> 32
        body = {
            "model": config.teacher_model,
            "messages": list(question.messages),
            "temperature": config.temperature,
            "max_tokens": config.max_answer_tokens,
            "seed": seed,
        }
        found = ""
        for attempt in range(config.retries + 1):
            if failed.is_set():
                raise _GivenUpError
            pause = FIRST_PAUSE_SECONDS * 2**attempt
            try:
                response = client.post(self.url, json=body)
            except httpx.TimeoutException:
                found = f"no answer within {config.timeout_seconds:g} s"
            except httpx.TransportError as error:
                found = f"{type(error).__name__}: {error}"
            except httpx.InvalidURL as error:
                raise ConfigError(f"{self.url} is no address ({error}); write it as http://HOST:PORT/v1") from error
            else:
                status = response.status_code
                if status == 200:
                    try:
                        return _read(response, number=number, seed=seed)
                    except (ValueError, LookupError, TypeError) as error:
                        found = f"no answer of a chat ({error!r}): {response.text[:200]}"
                elif status == 429 or status >= 500:
                    found = f"{status}: {response.text[:200]}"
                    pause = _wished_pause(response) or pause
                else:
                    raise ConfigError(
                        f"{self.url} refuses the problem {question.problem.name!r} with {status}: "
                        f"{response.text[:300]}; check teacher, teacher_model, key_variable and max_answer_tokens"
                    )
            if attempt < config.retries:
                failed.wait(min(pause, LONGEST_PAUSE_SECONDS))
        raise EngineError(
            f"{self.url} failed {config.retries + 1} times on the problem {question.problem.name!r}, at last with "
            f"{found}; what was answered is kept, and the same command goes on"
        )


def _read(response: httpx.Response, *, number: int, seed: int) -> Candidate:
    """Read the answer of a chat; reasoning that comes apart is put back between its tags, before the answer."""
    answer = response.json()
    [choice] = answer["choices"]
    message: dict[str, Any] = choice["message"]
    text, num_tokens = message.get("content") or "", answer["usage"]["completion_tokens"]
    thought = message.get("reasoning_content") or message.get("reasoning")
    if not isinstance(text, str) or not isinstance(num_tokens, int):
        raise TypeError("content is to be text, completion_tokens a number")
    if thought:
        text = f"{THINK_BEGIN}{thought}{THINK_END}{text}"
    return Candidate(
        number=number, seed=seed, text=text, num_tokens=num_tokens, finished=choice["finish_reason"] == "stop"
    )


def _wished_pause(response: httpx.Response) -> float | None:
    """Return the seconds that an endpoint asks to be left alone, where it says so in seconds."""
    wished = response.headers.get("retry-after", "")
    return float(wished) if wished.isdecimal() else None
