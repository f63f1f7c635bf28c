r"""Judges: strict votes are read, others are none and counted, and known votes give known scores."""

import json
from dataclasses import replace

import pytest

from dsv3.config.override import apply_overrides
from dsv3.config.teaching import RUBRIC, GrpoConfig, JudgeConfig
from dsv3.errors import ConfigError
from dsv3.posttrain import judge as judges
from dsv3.posttrain.judge import Judge, open_judge, question_of, verdict, vote_in
from dsv3.posttrain.problem import Problem
from dsv3.posttrain.rewards import rewards_named
from dsv3.posttrain.teacher import Candidate

from .test_distill import serving

ASKED = Problem(messages=({"role": "user", "content": "What is 3 + 4?"},), answer="7", name="sum")


@pytest.mark.parametrize(
    ("text", "vote"),
    [
        ("Right.\n\\boxed{10}", 10),
        ("\\boxed{0}.\n", 0),
        ("<think>\\boxed{2}?</think>Well: \\boxed{7}", 7),
        ("It says \\boxed{7}, and is worth \\boxed{3}", 3),
        ("\\boxed{11}", None),
        ("\\boxed{-1}", None),
        ("\\boxed{7.5}", None),
        ("\\boxed{07}", None),
        ("\\boxed{seven}", None),
        ("\\boxed{7} or so", None),
        ("<think>never ends \\boxed{7}", None),
        ("7", None),
        ("", None),
    ],
)
def test_a_vote_is_a_boxed_number_at_the_very_end(text, vote):
    assert vote_in(text) == vote


@pytest.mark.parametrize(
    ("votes", "majority", "mean"),
    [([8], 8, 8), ([1, 9, 9], 9, 19 / 3), ([2, 2, 10, 10, 5], 6, 5.8), ([0, 0, 0, 10], 0, 2.5), ([], 0, 0)],
)
def test_known_votes_give_known_scores(votes, majority, mean):
    assert verdict(votes, aggregate="majority") == pytest.approx(majority)
    assert verdict(votes, aggregate="mean") == pytest.approx(mean)


class Scripted:
    """A teacher whose votes are known, and told in another order than asked."""

    identity: dict[str, str] = {}  # noqa: RUF012

    def __init__(self, votes):
        self.votes, self.questions = votes, []

    def answers(self, questions, *, stopping):
        self.questions += questions
        for question in reversed(questions):
            said = next(votes for text, votes in self.votes.items() if text in question.messages[1]["content"])
            yield (
                question,
                [
                    Candidate(number=number, seed=number, text=vote, num_tokens=1, finished=True)
                    for number, vote in enumerate(said)
                ],
            )


def test_answers_are_judged_once_each_and_votes_that_cannot_be_read_are_counted():
    teacher = Scripted(
        {"seven": ["\\boxed{10}", "\\boxed{10}", "\\boxed{4}"], "nine": ["\\boxed{1}", "no", "so \\boxed{2} or 3"]}
    )
    judge = Judge(teacher, config=JudgeConfig(votes=3))
    assert judge.score([ASKED] * 3, ["seven", "nine", "seven"]) == [1.0, 0.1, 1.0]
    assert (judge.asked, judge.unread, len(teacher.questions)) == (6, 2, 2)
    means = Judge(teacher, config=JudgeConfig(votes=3, aggregate="mean"))
    assert means.score([ASKED], ["seven"]) == [pytest.approx(0.8)]


def test_a_judge_sees_question_reference_and_answer_and_no_thought():
    system, user = question_of(ASKED, answer="<think>secret</think>It is 7", rubric="Judge.")
    assert system == {"role": "system", "content": "Judge."}
    for part in ("What is 3 + 4?", "[reference answer]\n7\n", "[answer to be judged]\nIt is 7\n"):
        assert part in user["content"]
    assert "secret" not in user["content"]
    assert "reference" not in question_of(replace(ASKED, answer=""), answer="7", rubric="")[1]["content"]
    assert "\\boxed{number}" in RUBRIC


def test_an_endpoint_judges_by_the_settings_of_the_lesson():
    def answer(body, number):
        said = "\\boxed{8}" if number % 3 else "I would rather not"
        message = {"choices": [{"message": {"content": said}, "finish_reason": "stop"}]}
        return 200, json.dumps(message | {"usage": {"completion_tokens": 3}})

    lesson = apply_overrides(
        GrpoConfig(), assignments=["judge.model=m", "judge.votes=3", "judge.rubric=Be kind.", "judge.temperature=0.5"]
    )
    with serving(answer) as (url, asked):
        [reward] = rewards_named([f"judge:{url}=2"], judge=lesson.judge)
        assert (reward.name, reward.weight) == (f"judge:{url}", 2.0)
        assert reward.score(ASKED, "7") == pytest.approx(0.8)
    bodies = [body for _, body, _ in asked]
    assert len(bodies) == 3
    assert {(body["model"], body["temperature"], body["messages"][0]["content"]) for body in bodies} == {
        ("m", 0.5, "Be kind.")
    }
    assert len({body["seed"] for body in bodies}) == 3


def test_a_model_of_ours_may_judge_and_the_same_answer_gets_the_same_votes(taught, monkeypatch):
    """One of 24,000 weights has room for a short question, and ends in no score: that is told, and worth nothing."""
    short = {one: ({"role": "user", "content": one},) for one in ("1 and 2", "3 and 4")}
    monkeypatch.setattr(judges, "question_of", lambda problem, *, answer, rubric: short[answer])
    judge = open_judge(str(taught), config=JudgeConfig(votes=2, max_answer_tokens=4))
    assert judge.score([ASKED] * 2, list(short)) == [0.0, 0.0]
    assert (judge.asked, judge.unread) == (4, 4)
    seen = []
    monkeypatch.setattr(judges, "vote_in", lambda text: seen.append(text) or 5)
    assert judge.score([ASKED] * 2, list(short)) == [0.5, 0.5]
    assert judge.score([ASKED], ["3 and 4"]) == [0.5]
    assert seen[2:4] == seen[4:]


def test_judges_that_cannot_be_asked_are_refused():
    for wanted, told in (
        ("judge:http://localhost/v1=1", "judge.model"),
        ("judge:=1", "no reward 'judge:'"),
        ("judge:nowhere", "no such folder"),
    ):
        with pytest.raises(Exception, match=told):
            rewards_named([wanted])
    with pytest.raises(ConfigError, match="aggregate"):
        JudgeConfig(aggregate="median")
