"""Problems of reasoning-gym, by its own verdicts."""

import sys

import pytest

from dsv3.errors import ConfigError, MissingExtraError
from dsv3.posttrain import gym
from dsv3.posttrain.gym import gym_score
from dsv3.posttrain.problem import Problem
from dsv3.posttrain.tasks import task_named


@pytest.mark.parametrize("name", ["chain_sum", "word_sorting", "countdown"])
def test_the_reward_is_its_own_score(name, monkeypatch):
    pytest.importorskip("reasoning_gym")
    monkeypatch.setattr(gym, "NUM_PROBLEMS", 40)
    gym._dataset.cache_clear()
    from reasoning_gym import get_score_answer_fn

    task, theirs = task_named(f"gym:{name}"), get_score_answer_fn(name)
    assert task.name == f"gym:{name}"
    assert not {one.messages[0]["content"] for one in task.training} & {
        one.messages[0]["content"] for one in task.held_out
    }
    for problem, other in zip(task.training[:20], task.training[1:21], strict=True):
        record = problem.more["record"]
        for answer in (problem.answer, other.answer, "", "no"):
            own = float(theirs(answer, record))
            assert gym_score(problem, answer) == own
            assert gym_score(problem, f"<think>1 {other.answer}</think>\\boxed{{{answer}}}") == own
            assert gym_score(problem, f"So it is\n#### {answer}\n") == own
        assert gym_score(problem, problem.answer) == 1.0


def test_what_is_not_there_is_named(monkeypatch):
    with pytest.raises(ConfigError, match="'gym' is for --task gym:NAME"):
        gym_score(Problem(messages=(), name="sum"), "7")
    gym._dataset.cache_clear()
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(MissingExtraError, match="reasoning-gym"):
        task_named("gym:chain_sum")


def test_a_data_set_that_there_is_none_of_is_refused():
    pytest.importorskip("reasoning_gym")
    with pytest.raises(ConfigError, match="no data set 'poetry'"):
        task_named("gym:poetry")
