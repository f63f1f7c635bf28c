"""A teacher behind the OpenAI API: several problems are asked at once."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import closing
from functools import partial
from threading import Event
from typing import Any

from dsv3.config.teaching import DistillConfig
from dsv3.data.special_tokens import THINK_BEGIN, THINK_END
from dsv3.evals.endpoint import Endpoint, GivenUpError
from dsv3.posttrain.rollout import answer_seed
from dsv3.posttrain.teacher import Candidate, Question

LOOK_SECONDS = 0.2
"""Between two looks at whether to stop."""


class EndpointTeacher:
    """A model that others serve."""

    def __init__(self, config: DistillConfig) -> None:
        self.config = config
        self._endpoint = Endpoint(
            config.teacher,
            key_variable=config.key_variable,
            timeout_seconds=config.timeout_seconds,
            retries=config.retries,
        )
        self.identity = {"teacher": config.teacher, "model": config.teacher_model}

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
        with closing(self._endpoint), ThreadPoolExecutor(config.concurrency) as threads:
            try:
                while True:
                    while len(under_way) < config.concurrency and failure is None and not stopping():
                        if (question := next(left, None)) is None:
                            break
                        under_way[threads.submit(self._candidates, question, failed)] = question
                    if not under_way:
                        break
                    done, _ = wait(under_way, timeout=LOOK_SECONDS, return_when=FIRST_COMPLETED)
                    for future in done:
                        question = under_way.pop(future)
                        error = future.exception()
                        if error is None:
                            yield question, future.result()
                        elif not isinstance(error, GivenUpError):
                            failure = failure or error
                            failed.set()
            finally:
                failed.set()
        if failure is not None:
            raise failure

    def _candidates(self, question: Question, failed: Event) -> list[Candidate]:
        return [
            self._candidate(question=question, number=number, failed=failed) for number in range(self.config.candidates)
        ]

    def _candidate(self, *, question: Question, number: int, failed: Event) -> Candidate:
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
        return self._endpoint.ask(
            "chat/completions",
            body,
            read=partial(_read, number=number, seed=seed),
            about=f"the problem {question.problem.name!r}",
            check="teacher, teacher_model, key_variable and max_answer_tokens",
            stopped=failed,
        )


def _read(answer: Any, *, number: int, seed: int) -> Candidate:
    """Read the answer of a chat; reasoning that comes apart is put back between its tags, before the answer."""
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
