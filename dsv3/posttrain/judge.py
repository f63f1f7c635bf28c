r"""A judge (report 5.4.2): a model that reasons about an answer, ends in a score, and is asked several times.

rubric, question, answer  ->  votes, each ending in \boxed{0..10}  ->  majority or mean  ->  0..1
"""

import re
from collections import Counter
from collections.abc import Sequence
from statistics import fmean

from dsv3.config.teaching import ENDPOINTS, DistillConfig, JudgeConfig
from dsv3.data.chance import hash_parts
from dsv3.data.special_tokens import THINK_BEGIN
from dsv3.errors import ConfigError
from dsv3.evals.final_answer import after_thought
from dsv3.posttrain.problem import Message, Problem
from dsv3.posttrain.teacher import ModelTeacher, Question, Teacher
from dsv3.runtime.log import get_logger

VOTE = re.compile(r"\\boxed\{(10|[0-9])\}\.?\s*\Z")
BEST = 10


class Judge:
    """A model of ours or of an endpoint, and what became of the votes it was asked for."""

    def __init__(self, teacher: Teacher, *, config: JudgeConfig) -> None:
        self.teacher, self.config = teacher, config
        self.asked = 0
        """Votes asked for."""
        self.unread = 0
        """Of these, such as did not end in a score."""

    def score(self, problems: Sequence[Problem], answers: Sequence[str]) -> list[float]:
        """Return what answers are worth, from 0 to 1; 0 where no vote could be read.

        Chance in a vote hangs on the question, the answer and the seed, and not on what else is asked.

        Raises:
            ConfigError, EngineError, CheckpointError: the judge cannot be asked; as their texts say.
        """
        asked = [
            question_of(problem, answer=answer, rubric=self.config.rubric)
            for problem, answer in zip(problems, answers, strict=True)
        ]
        places = [hash_parts(*(message["content"] for message in messages)) for messages in asked]
        questions = {
            place: Question(place=place, problem=problem, messages=messages)
            for place, problem, messages in zip(places, problems, asked, strict=True)
        }
        votes: dict[int, list[int]] = {}
        unread = 0
        for question, candidates in self.teacher.answers(list(questions.values()), stopping=lambda: False):
            read = [vote_in(one.text) for one in candidates]
            votes[question.place] = [vote for vote in read if vote is not None]
            self.asked += len(read)
            unread += read.count(None)
        self.unread += unread
        if unread:
            get_logger(__name__).info("the judge has ended %d of %d votes without a score", self.unread, self.asked)
        return [verdict(votes[place], aggregate=self.config.aggregate) / BEST for place in places]


def open_judge(model: str, *, config: JudgeConfig) -> Judge:
    """Return the judge in a folder, or at the address of an OpenAI API.

    Raises:
        CheckpointError, TokenizerError: there is no model in the folder.
        ConfigError: settings do not fit; its key is missing.
        MissingExtraError: it is asked over HTTP, and httpx is not installed.
    """
    if model.startswith(ENDPOINTS) and not config.model:
        raise ConfigError(f"{model} may serve several models; say which judges with judge.model")
    asking = DistillConfig(
        teacher=model,
        teacher_model=config.model,
        candidates=config.votes,
        temperature=config.temperature,
        max_answer_tokens=config.max_answer_tokens,
        seed=config.seed,
        concurrency=config.concurrency,
        timeout_seconds=config.timeout_seconds,
        retries=config.retries,
        key_variable=config.key_variable,
    )
    if not model.startswith(ENDPOINTS):
        return Judge(ModelTeacher(asking), config=config)
    from dsv3.posttrain.endpoint import EndpointTeacher

    return Judge(EndpointTeacher(asking), config=config)


def question_of(problem: Problem, *, answer: str, rubric: str) -> tuple[Message, ...]:
    """Return what the judge is asked about an answer, of which it is not shown the thought."""
    asked = "\n\n".join(f"{message['role']}: {message['content']}" for message in problem.messages)
    parts = [("question", asked), ("reference answer", problem.answer), ("answer to be judged", after_thought(answer))]
    told = "\n\n".join(f"[{name}]\n{text.strip()}\n[end of {name}]" for name, text in parts if text.strip())
    return ({"role": "system", "content": rubric}, {"role": "user", "content": told})


def vote_in(text: str) -> int | None:
    r"""Return the score that a judgement ends in, as \boxed{0} to \boxed{10}; None for any other end."""
    said = after_thought(text)
    if said.lstrip().startswith(THINK_BEGIN):  # A thought that has not ended.
        return None
    found = VOTE.search(said)
    return int(found[1]) if found else None


def verdict(votes: Sequence[int], *, aggregate: str) -> float:
    """Return the score given most often, or the mean of several such; with 'mean', that of all. 0 without votes."""
    if not votes:
        return 0.0
    if aggregate == "mean":
        return fmean(votes)
    counts = Counter(votes)
    return fmean(vote for vote, count in counts.items() if count == max(counts.values()))
