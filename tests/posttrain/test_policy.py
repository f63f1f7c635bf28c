"""The policy loss: its gradient is that of the formula, its clip and its distance are as published."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsv3.batch import IGNORE
from dsv3.config import BalanceConfig
from dsv3.config.teaching import GrpoConfig
from dsv3.errors import ConfigError
from dsv3.model.transformer import Transformer
from dsv3.posttrain.grpo import Judged, judge, policy_batch
from dsv3.posttrain.policy import PolicyLoss, advantages_of, policy_terms
from dsv3.posttrain.problem import Problem
from dsv3.posttrain.rewards import Reward
from dsv3.posttrain.rollout import Answer
from dsv3.train.loss import WholeBatch

from .test_sft import MODEL

LESSON = GrpoConfig(kl_weight=0.1, group_size=4)
PROBLEM = Problem(messages=({"role": "user", "content": "?"},), answer="1")


def judged_answers(count=6, *, seed=0, vocab=50):
    generator = torch.Generator().manual_seed(seed)

    def numbers(size):
        return torch.randn(size, generator=generator)

    found = []
    for number in range(count):
        prompt, length = 2 + number % 3, 1 + 2 * number
        ids = torch.randint(vocab, (prompt + length,), generator=generator).tolist()
        answer = Answer(
            problem=PROBLEM,
            prompt_ids=ids[:prompt],
            ids=ids[prompt:],
            logprobs=(-4 + numbers(length) * 0.3).tolist(),
            text="",
            finished=True,
        )
        found.append(Judged(answer=answer, reward=0.0, scores={}, advantage=numbers(1).item()))
    return found


def batch_of(judged, *, lesson=LESSON):
    tokens = sum(len(one.answer.ids) for one in judged)
    batch = policy_batch(judged, lesson=lesson, num_answers=len(judged), num_tokens=tokens)
    reference = torch.where(batch.shares > 0, batch.old_logprobs + 0.2, 0.0)
    return replace(batch, reference_logprobs=reference)


def test_every_token_of_an_answer_is_trained_where_it_is_predicted():
    judged = judged_answers()
    batch = batch_of(judged)
    trained = batch.targets != IGNORE
    assert batch.targets[trained].tolist() == [token for one in judged for token in one.answer.ids]
    assert torch.equal(trained, batch.shares > 0)
    assert batch.shares.sum().item() == pytest.approx(1)
    assert batch.old_logprobs[trained].tolist() == pytest.approx([x for one in judged for x in one.answer.logprobs])
    ends = batch.starts[1:] - 1
    assert batch.targets[ends].tolist() == [one.answer.ids[-1] for one in judged]


def test_means_are_over_answers_or_over_tokens():
    judged = judged_answers()
    by_answer = batch_of(judged)
    totals = [
        by_answer.shares[start:end].sum().item()
        for start, end in zip(by_answer.starts, by_answer.starts[1:], strict=False)
    ]
    assert totals == pytest.approx([1 / 6] * 6)
    by_token = batch_of(judged, lesson=replace(LESSON, loss_mean="token"))
    assert len(set(by_token.shares.tolist())) == 2  # prompts, and all others


@pytest.mark.parametrize("kl_weight", [0.0, 0.1])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_gradient_is_that_of_the_formula(kl_weight, temperature):
    """Against autograd through the formula written out, with all logits in memory, in FP64."""
    lesson = replace(LESSON, kl_weight=kl_weight, temperature=temperature, old_logprobs="trainer")
    model = Transformer(MODEL)
    model.init_weights(generator=torch.Generator().manual_seed(0))
    model = model.double()
    batch = batch_of(judged_answers())
    balance = BalanceConfig(method="none", sequence_loss_weight=0.0)
    loss = PolicyLoss(lesson=lesson, vocab_size=45)
    batch = replace(batch, targets=torch.where(batch.targets == IGNORE, IGNORE, batch.targets % 45))
    options = {"batch": batch, "whole": WholeBatch.of([batch]), "mtp_weight": 0.0, "balance": balance}
    ours = loss(model, output=model(batch), **options).total
    ours.backward()
    gradients = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad()
    logits = model(batch).hidden @ model.lm_head.weight[:45].T / temperature
    chosen = (logits.log_softmax(-1)).gather(1, batch.targets.clamp(min=0)[:, None]).squeeze(1)
    ratio, away = (chosen - batch.old_logprobs).exp(), batch.reference_logprobs - chosen
    gain = torch.minimum(ratio * batch.advantages, ratio.clamp(0.8, 1.2) * batch.advantages)
    exact = ((-gain + kl_weight * (away.exp() - away - 1)) * batch.shares).sum()
    exact.backward()
    assert ours.item() == pytest.approx(exact.item(), rel=1e-6)
    for name, weight in model.named_parameters():
        if weight.grad is not None and weight.grad.norm() > 0:
            assert torch.allclose(gradients[name], weight.grad, rtol=1e-5, atol=1e-9), name


def test_micro_batches_add_up_to_the_whole():
    judged = judged_answers()
    tokens = sum(len(one.answer.ids) for one in judged)
    parts = [policy_batch(part, lesson=LESSON, num_answers=6, num_tokens=tokens) for part in (judged[:2], judged[2:])]
    whole = policy_batch(judged, lesson=LESSON, num_answers=6, num_tokens=tokens)
    assert torch.equal(torch.cat([part.shares for part in parts]), whole.shares)
    assert torch.equal(torch.cat([part.tokens for part in parts]), whole.tokens)


@given(advantage=st.floats(-3, 3).filter(lambda a: abs(a) > 1e-3), away=st.floats(-2, 2))
def test_a_clipped_ratio_has_no_slope_and_any_other_has(advantage, away):
    [one] = judged_answers(1)
    batch = batch_of([replace_advantage(one, advantage)], lesson=replace(LESSON, kl_weight=0.0))
    logprobs = batch.old_logprobs + away * (batch.shares > 0)
    _, slopes, seen = policy_terms(logprobs, batch=batch, lesson=replace(LESSON, kl_weight=0.0))
    ratio = math.exp(away)
    too_far = (advantage > 0 and ratio > 1.2) or (advantage < 0 and ratio < 0.8)
    assert (slopes[batch.shares > 0] == 0).all() == too_far
    assert seen["clipped"] == pytest.approx(float(too_far))


def replace_advantage(one, advantage):
    return Judged(answer=one.answer, reward=0.0, scores={}, advantage=advantage)


@given(away=st.floats(-5, 5))
def test_the_distance_is_never_negative_and_zero_only_where_both_agree(away):
    [one] = judged_answers(1)
    batch = batch_of([one])
    logprobs = batch.reference_logprobs - away * (batch.shares > 0)
    _, _, seen = policy_terms(logprobs, batch=batch, lesson=LESSON)
    assert seen["kl"] >= -1e-6
    assert seen["kl"] == pytest.approx(math.exp(away) - away - 1, rel=1e-3, abs=1e-5)


@given(rewards=st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=2, max_size=16))
def test_advantages_have_mean_zero_and_deviation_one(rewards):
    found = advantages_of(rewards, scale_by_deviation=True)
    if len(set(rewards)) == 1:
        assert found is None
        return
    assert sum(found) == pytest.approx(0, abs=1e-9)
    assert sum(a * a for a in found) / len(found) == pytest.approx(1)
    plain = advantages_of(rewards, scale_by_deviation=False)
    assert [a - b for a, b in pairwise(plain)] == pytest.approx([a - b for a, b in pairwise(rewards)])


def test_groups_are_judged_by_themselves_and_what_was_cut_off_pays():
    def answer(text, *, finished=True):
        return Answer(problem=PROBLEM, prompt_ids=[1], ids=[1], logprobs=[0.0], text=text, finished=finished)

    rule = Reward(name="right", weight=2.0, score=lambda problem, text: float(text == problem.answer))
    lesson = GrpoConfig(group_size=2, length_penalty=0.5, scale_by_deviation=False)
    answers = [answer("1"), answer("2"), answer("1"), answer("1"), answer("1"), answer("1", finished=False)]
    judged = judge(answers, rewards=[rule], lesson=lesson)
    assert [one.reward for one in judged] == [2, 0, 2, 2, 2, 1.5]
    assert [one.advantage for one in judged] == [1, -1, None, None, 0.25, -0.25]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"group_size": 1}, "needs 2 answers"),
        ({"updates_per_rollout": 7}, "does not divide the 512 answers"),
        ({"temperature": 0.5}, "old_logprobs = 'trainer'"),
        ({"loss_mean": "mean"}, "loss_mean"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes, told):
    with pytest.raises(ConfigError, match=told):
        GrpoConfig(**changes)
