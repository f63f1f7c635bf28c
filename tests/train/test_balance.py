from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dsv3.batch import TokenBatch
from dsv3.config import BalanceConfig, ModelConfig
from dsv3.model.interfaces import ModelOutput, Routing
from dsv3.model.router import Router, choose_experts
from dsv3.train.balance import (
    balance_loss,
    batch_loss,
    max_violation,
    plain_top_k_counts,
    sequence_loss,
    update_router_biases,
    v2_losses,
)

EIGHT_EXPERTS = ModelConfig(
    vocab_size=32,
    hidden_size=8,
    num_hidden_layers=2,
    first_k_dense_replace=0,
    n_routed_experts=8,
    num_experts_per_tok=3,
    n_group=4,
    topk_group=2,
)


def batch_of(lengths: list[int]) -> TokenBatch:
    return TokenBatch.from_sequences([[0] * length for length in lengths])


def random_routing(num_tokens: int, *, seed: int, config: ModelConfig = EIGHT_EXPERTS) -> Routing:
    generator = torch.Generator().manual_seed(seed)
    affinity = torch.rand(num_tokens, config.n_routed_experts, generator=generator, dtype=torch.float64)
    bias = torch.randn(config.n_routed_experts, generator=generator)
    return choose_experts(affinity.requires_grad_(), bias=bias, config=config)


def cut(routing: Routing, tokens: slice) -> Routing:
    experts = routing.experts[tokens]
    load = torch.bincount(experts.flatten(), minlength=routing.load.shape[0])
    return Routing(experts=experts, gates=routing.gates[tokens], affinity=routing.affinity[tokens], load=load)


def output_of(routings: list[Routing], batches: list[TokenBatch]) -> ModelOutput:
    nothing = torch.zeros(1, 1)
    return ModelOutput(
        hidden=nothing, before_norm=nothing, mtp=(), routings=tuple(routings), routed_batches=tuple(batches)
    )


def equation_17(affinity: Tensor, *, top_k: int) -> float:
    """sum_i f_i P_i of one sequence, symbol by symbol."""
    T, N = affinity.shape
    total = 0.0
    for i in range(N):
        f = sum(i in affinity[t].topk(top_k).indices.tolist() for t in range(T)) * N / (top_k * T)
        P = sum((affinity[t, i] / affinity[t].sum()).item() for t in range(T)) / T
        total += f * P
    return total


@settings(max_examples=15, deadline=None)
@given(lengths=st.lists(st.integers(1, 6), min_size=1, max_size=4), seed=st.integers(0, 1000))
def test_the_sequence_wise_loss_is_equation_17_averaged_over_sequences(lengths: list[int], seed: int):
    routing = random_routing(sum(lengths), seed=seed)
    rows = routing.affinity.detach().split(lengths)
    expected = sum(equation_17(row, top_k=3) for row in rows) / len(lengths)
    loss = sequence_loss(routing, batch=batch_of(lengths), num_sequences=len(lengths))
    assert loss.item() == pytest.approx(expected, rel=1e-6)


def test_an_even_load_gives_alpha_for_each_layer():
    # Token t scores highest on experts t, t+1, t+2 (mod 8), so that over 8 tokens every expert is used alike.
    affinity = torch.stack([torch.tensor([0.9, 0.8, 0.7] + [0.1] * 5).roll(t) for t in range(8)])
    routing = choose_experts(affinity, bias=None, config=replace(EIGHT_EXPERTS, topk_method="greedy"))
    output = output_of([routing] * 5, [batch_of([8])] * 5)
    loss = balance_loss(output, config=BalanceConfig(), model_config=EIGHT_EXPERTS, num_sequences=1)
    assert loss.item() == pytest.approx(5 * 1e-4, rel=1e-5)


def test_the_frequencies_ignore_bias_and_groups():
    routing = random_routing(12, seed=3)
    elsewhere = replace(routing, experts=(routing.experts + 1) % 8)
    losses = [sequence_loss(one, batch=batch_of([12]), num_sequences=1) for one in (routing, elsewhere)]
    assert losses[0].item() == losses[1].item()


def test_the_gradient_is_that_of_the_shares_alone():
    routing = random_routing(6, seed=1)
    sequence_loss(routing, batch=batch_of([6]), num_sequences=1).backward()
    # d/ds_j of sum_i f_i s_i / S is (f_j - sum_i f_i s_i / S) / S, divided by T.
    s = routing.affinity.detach()
    f = torch.zeros(8, dtype=torch.float64)
    for row in s:
        f[row.topk(3).indices] += 8 / (3 * 6)
    total = s.sum(1, keepdim=True)
    expected = (f - (s @ f)[:, None] / total) / total / 6
    assert torch.allclose(routing.affinity.grad, expected, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("method", ["bias", "sequence_loss", "batch_loss", "v2_losses"])
def test_micro_batches_add_up_to_the_whole_batch(method: str):
    config = BalanceConfig(method=method)
    lengths = [5, 5, 5, 3]
    layers = [random_routing(18, seed=seed) for seed in (1, 2)]

    def loss(tokens: slice, lengths: list[int]) -> Tensor:
        parts = [cut(layer, tokens) for layer in layers]
        return balance_loss(
            output_of(parts, [batch_of(lengths)] * 2),
            config=config,
            model_config=EIGHT_EXPERTS,
            num_sequences=4,
            whole_batch_counts=[plain_top_k_counts(layer) for layer in layers],
        )

    whole = loss(slice(0, 18), lengths)
    pieces = loss(slice(0, 5), [5]) + loss(slice(5, 15), [5, 5]) + loss(slice(15, 18), [3])
    assert whole.item() > 0
    assert pieces.item() == pytest.approx(whole.item(), rel=1e-6)


def test_the_batch_wise_loss_is_equation_17_with_all_tokens_as_one_sequence():
    routing = random_routing(14, seed=5)
    loss = batch_loss(routing, counts=plain_top_k_counts(routing))
    assert loss.item() == pytest.approx(equation_17(routing.affinity.detach(), top_k=3), rel=1e-6)


def test_the_v2_losses_are_their_three_equations():
    config = BalanceConfig(
        method="v2_losses", expert_loss_weight=3.0, device_loss_weight=5.0, communication_loss_weight=7.0
    )
    model = replace(EIGHT_EXPERTS, scoring_func="softmax", topk_method="group_limited_greedy")
    generator = torch.Generator().manual_seed(4)
    lengths = [4, 6]
    scores = torch.randn(10, 8, generator=generator, dtype=torch.float64).softmax(-1)
    routing = choose_experts(scores, bias=None, config=model)
    expected = 0.0
    for rows in (range(4), range(4, 10)):
        T, N, K, D, M = len(rows), 8, 3, 4, 2
        chosen = [set(routing.experts[t].tolist()) for t in rows]
        f = [N / (K * T) * sum(i in c for c in chosen) for i in range(N)]
        P = [sum(scores[t, i].item() for t in rows) / T for i in range(N)]
        devices = [(2 * d, 2 * d + 1) for d in range(D)]
        f_device = [sum(f[j] for j in device) / len(device) for device in devices]
        P_device = [sum(P[j] for j in device) for device in devices]
        f_sent = [D / (M * T) * sum(any(j in c for j in device) for c in chosen) for device in devices]
        expected += 3 * sum(a * b for a, b in zip(f, P, strict=True))
        expected += 5 * sum(a * b for a, b in zip(f_device, P_device, strict=True))
        expected += 7 * sum(a * b for a, b in zip(f_sent, P_device, strict=True))
    loss = v2_losses(routing, batch=batch_of(lengths), config=config, model_config=model, num_sequences=2)
    assert loss.item() == pytest.approx(expected / 2, rel=1e-6)


def test_the_method_none_has_no_loss():
    output = output_of([random_routing(4, seed=0)], [batch_of([4])])
    config = BalanceConfig(method="none")
    assert balance_loss(output, config=config, model_config=EIGHT_EXPERTS, num_sequences=1).item() == 0


def test_a_token_whose_scores_are_all_zero_has_a_finite_gradient():
    affinity = torch.zeros(2, 8, requires_grad=True)
    routing = choose_experts(affinity, bias=None, config=EIGHT_EXPERTS)
    sequence_loss(routing, batch=batch_of([2]), num_sequences=1).backward()
    assert affinity.grad is not None
    assert affinity.grad.isfinite().all()


def router_with(bias: list[float]) -> Router:
    router = Router(replace(EIGHT_EXPERTS, n_routed_experts=len(bias), n_group=1, topk_group=1, num_experts_per_tok=1))
    router.e_score_correction_bias = torch.tensor(bias)
    return router


def bias_of(router: Router) -> list[float]:
    assert router.e_score_correction_bias is not None
    return router.e_score_correction_bias.tolist()


def test_the_bias_rises_below_the_mean_load_falls_above_and_stays_on_it():
    router = router_with([0.0, 1.0, -1.0, 5.0])
    update_router_biases([router], loads=[torch.tensor([7, 5, 3, 5])], speed=0.25)
    assert bias_of(router) == [-0.25, 1.0, -0.75, 5.0]


def test_an_expert_on_a_mean_that_no_float_can_hold_is_left_alone():
    # The mean is 2^53 + 1, which doubles round to 2^53.
    mean = 2**53 + 1
    router = router_with([0.0, 0.0, 0.0])
    update_router_biases([router], loads=[torch.tensor([mean - 1, mean, mean + 1])], speed=1.0)
    assert bias_of(router) == [1.0, 0.0, -1.0]


def test_a_speed_of_zero_freezes_the_bias():
    router = router_with([0.5, -0.5])
    update_router_biases([router], loads=[torch.tensor([9, 1])], speed=0.0)
    assert bias_of(router) == [0.5, -0.5]


@pytest.mark.parametrize(
    ("load", "expected"), [([4, 4, 4, 4], 0.0), ([16, 0, 0, 0], 3.0), ([6, 2, 4, 4], 0.5), ([0, 0], 0.0)]
)
def test_max_violation_is_the_excess_of_the_fullest_expert(load: list[int], expected: float):
    assert max_violation(torch.tensor(load)) == pytest.approx(expected)


def test_the_bias_brings_a_skewed_stream_to_balance():
    generator = torch.Generator().manual_seed(0)
    skew = torch.linspace(-1.0, 1.0, 8)
    router = router_with([0.0] * 8)
    violations = []
    for _ in range(120):
        affinity = (torch.randn(512, 8, generator=generator) + skew).sigmoid()
        routing = choose_experts(affinity, bias=router.e_score_correction_bias, config=EIGHT_EXPERTS)
        violations.append(max_violation(routing.load))
        update_router_biases([router], loads=[routing.load], speed=0.01)
    assert violations[0] > 0.6
    assert max(violations[-20:]) < 0.25
