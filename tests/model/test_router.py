"""Golden test 5 of the fact sheet: who is chosen, and with what weight."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsv3.config import ModelConfig
from dsv3.errors import ConfigError
from dsv3.model.router import Router, choose_experts

ONE_GROUP = ModelConfig(n_routed_experts=3, n_group=1, topk_group=1, num_experts_per_tok=2, routed_scaling_factor=1.0)
FOUR_GROUPS = ModelConfig(n_routed_experts=8, n_group=4, topk_group=2, num_experts_per_tok=3)


def test_bias_changes_the_choice_but_not_the_gate():
    affinity = torch.tensor([[0.9, 0.8, 0.1]])
    routing = choose_experts(affinity, bias=torch.tensor([0.0, 0.0, 1.0]), config=ONE_GROUP)
    assert routing.experts.tolist() == [[2, 0]]  # 1.1 and 0.9 beat 0.8
    assert routing.gates[0].tolist() == pytest.approx([0.1, 0.9])  # 0.1 and 0.9, without the bias


def test_experts_of_dropped_groups_stay_out_when_all_biased_scores_are_negative():
    """With 0 as the mask instead of -inf, experts 4-7 of the dropped groups would win here."""
    affinity = torch.tensor([[0.5, 0.4, 0.45, 0.35, 0.1, 0.1, 0.1, 0.1]])
    routing = choose_experts(affinity, bias=torch.full((8,), -5.0), config=FOUR_GROUPS)
    assert routing.experts.tolist() == [[0, 2, 1]]


def test_a_group_scores_as_the_sum_of_its_two_best_biased_scores():
    #                          group 0      group 1      group 2      group 3
    affinity = torch.tensor([[0.90, 0.00, 0.50, 0.50, 0.10, 0.10, 0.45, 0.40]])
    config = replace(FOUR_GROUPS, topk_group=2, num_experts_per_tok=2)
    routing = choose_experts(affinity, bias=torch.zeros(8), config=config)
    assert routing.experts.tolist() == [[0, 2]]  # groups 1 (1.0) and 0 (0.9) are kept
    routing = choose_experts(affinity, bias=torch.tensor([0.0] * 6 + [0.1, 0.1]), config=config)
    assert routing.experts.tolist() == [[6, 2]]  # group 3 now scores 1.05, and group 0 with its 0.9 is out


def test_v2_scores_a_group_by_its_best_expert_and_does_not_renormalise():
    config = replace(
        FOUR_GROUPS,
        topk_method="group_limited_greedy",
        scoring_func="softmax",
        norm_topk_prob=False,
        routed_scaling_factor=16.0,
        topk_group=1,
        num_experts_per_tok=2,
    )
    affinity = torch.tensor([[0.30, 0.01, 0.20, 0.20, 0.09, 0.10, 0.05, 0.05]])
    routing = choose_experts(affinity, bias=None, config=config)
    assert routing.experts.tolist() == [[0, 1]]
    assert routing.gates[0].tolist() == pytest.approx([16 * 0.30, 16 * 0.01])


def test_equal_scores_go_to_the_lowest_index():
    routing = choose_experts(torch.full((1, 8), 0.5), bias=torch.zeros(8), config=FOUR_GROUPS)
    assert routing.experts.tolist() == [[0, 1, 2]]


@given(seed=st.integers(0, 10_000), low=st.floats(-3, 3))
def test_choices_respect_the_group_limit_and_gates_sum_to_the_scale(seed, low):
    generator = torch.Generator().manual_seed(seed)
    config = ModelConfig(n_routed_experts=32, n_group=8, topk_group=4, num_experts_per_tok=8)
    affinity = torch.rand(6, 32, generator=generator)
    bias = torch.rand(32, generator=generator) * 2 + low
    routing = choose_experts(affinity, bias=bias, config=config)

    for token in range(6):
        experts = routing.experts[token].tolist()
        assert len(set(experts)) == 8
        biased = [(affinity[token, e] + bias[e]).item() for e in range(32)]
        groups = sorted(range(8), key=lambda g: -sum(sorted(biased[4 * g : 4 * g + 4])[-2:]))[:4]
        allowed = [e for e in range(32) if e // 4 in groups]
        assert sorted(experts) == sorted(sorted(allowed, key=lambda e: -biased[e])[:8])
    assert torch.allclose(routing.gates.sum(-1), torch.full((6,), 2.5))
    assert routing.load.tolist() == [int((routing.experts == e).sum()) for e in range(32)]


def test_gradient_flows_through_the_gates_and_never_through_the_bias():
    affinity = torch.rand(4, 8, requires_grad=True)
    routing = choose_experts(affinity, bias=torch.zeros(8), config=FOUR_GROUPS)
    routing.gates[:, 0].sum().backward()
    chosen = torch.zeros(4, 8, dtype=torch.bool).scatter_(1, routing.experts, True)
    assert (affinity.grad[~chosen] == 0).all()
    assert (affinity.grad[chosen] != 0).all()
    assert "e_score_correction_bias" not in dict(Router(FOUR_GROUPS).named_parameters())


def test_the_bias_stays_fp32_when_the_model_becomes_bf16():
    router = Router(replace(FOUR_GROUPS, hidden_size=4))
    router.e_score_correction_bias.fill_(5.001)
    router.to(torch.bfloat16)
    assert router.weight.dtype == torch.bfloat16
    assert router.e_score_correction_bias.dtype == torch.float32
    assert router.e_score_correction_bias[0].item() == pytest.approx(5.001)


def test_experts_that_do_not_divide_into_groups_are_refused():
    with pytest.raises(ConfigError, match="10 routed experts do not divide into n_group = 4"):
        replace(FOUR_GROUPS, n_routed_experts=10)
