import copy
import math

import pytest
import torch
from torch import nn

import dsv3.train.optimizer as optimizer_file
from dsv3.config import OptimConfig
from dsv3.parallel.ranks import Alone
from dsv3.train.optimizer import AdamW

FP32_MOMENTS = OptimConfig(bf16_moments=False, weight_decay=0.1)


class Small(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.table = nn.Parameter(torch.randn(37, 11, generator=generator))
        self.stack = nn.Parameter(torch.randn(3, 5, 7, generator=generator))
        self.gain = nn.Parameter(torch.randn(11, generator=generator))


def give_gradients(module: nn.Module, *, seed: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        gradient = torch.randn(parameter.shape, generator=generator) * scale
        parameter.grad = gradient.to(parameter.dtype)


def torchs_own(module: Small, *, config: OptimConfig) -> torch.optim.AdamW:
    groups = [
        {"params": [module.table, module.stack], "weight_decay": config.weight_decay},
        {"params": [module.gain], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, betas=(config.beta1, config.beta2), eps=config.epsilon, lr=1.0)


def take_step(optimizer: AdamW, *, learning_rate: float) -> float:
    norm = Alone().gradient_norm(optimizer.gradients)
    optimizer.step(learning_rate=learning_rate, gradient_norm=norm)
    return norm


@pytest.mark.parametrize("stretch", [1 << 20, 16], ids=["together", "cut into pieces"])
def test_with_fp32_moments_it_is_torchs_adamw_with_clipping(stretch: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(optimizer_file.STRETCH_ELEMENTS, "cpu", stretch)
    ours, theirs = Small(), Small()
    optimizer = AdamW(ours.named_parameters(), config=FP32_MOMENTS)
    peer = torchs_own(theirs, config=FP32_MOMENTS)
    for step in range(6):
        scale = 0.01 if step % 2 else 1.0  # norms of about 0.2 and 23: below and above the clip at 1
        give_gradients(ours, seed=step, scale=scale)
        give_gradients(theirs, seed=step, scale=scale)
        peer_norm = nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        for group in peer.param_groups:
            group["lr"] = 0.01 / (1 + step)
        peer.step()
        norm = take_step(optimizer, learning_rate=0.01 / (1 + step))
        assert norm == pytest.approx(peer_norm.item(), rel=1e-6)
        for name, parameter in ours.named_parameters():
            assert torch.allclose(parameter, getattr(theirs, name), rtol=1e-5, atol=1e-7), (step, name)


def test_gains_do_not_decay_and_matrices_do():
    module = Small()
    before = copy.deepcopy(module.state_dict())
    optimizer = AdamW(module.named_parameters(), config=FP32_MOMENTS)
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    take_step(optimizer, learning_rate=0.5)
    assert torch.equal(module.gain, before["gain"])
    assert torch.allclose(module.table, before["table"] * (1 - 0.5 * 0.1))
    assert torch.allclose(module.stack, before["stack"] * (1 - 0.5 * 0.1))


def test_bf16_moments_are_the_fp32_ones_rounded_after_every_step():
    module = Small()
    optimizer = AdamW(module.named_parameters(), config=OptimConfig(clip_gradient_norm=1e9))
    expected_first, expected_second = torch.zeros(37, 11), torch.zeros(37, 11)
    weight = module.table.detach().clone()
    for step in range(1, 5):
        give_gradients(module, seed=step)
        assert module.table.grad is not None
        gradient = module.table.grad.clone()
        take_step(optimizer, learning_rate=0.01)
        first = 0.9 * expected_first + 0.1 * gradient
        second = 0.95 * expected_second + 0.05 * gradient**2
        weight = weight * (1 - 0.01 * 0.1)
        weight -= 0.01 * (first / (1 - 0.9**step)) / ((second / (1 - 0.95**step)).sqrt() + 1e-8)
        expected_first, expected_second = first.bfloat16().float(), second.bfloat16().float()
        assert torch.allclose(module.table, weight, rtol=1e-4, atol=1e-6)
    kept_first, kept_second = optimizer.moments()
    assert kept_first["table"].dtype == kept_second["table"].dtype == torch.bfloat16
    # One unit in the last of 8 bits: sums made in another order may fall on the other side of a rounding edge.
    assert torch.allclose(kept_first["table"].float(), expected_first, rtol=2**-7, atol=1e-6)
    assert torch.allclose(kept_second["table"].float(), expected_second, rtol=2**-7, atol=1e-6)


def test_bf16_parameters_follow_an_fp32_master_that_keeps_what_bf16_would_lose():
    module = Small().bfloat16()
    module.table.data.fill_(1.0)
    optimizer = AdamW(module.named_parameters(), config=OptimConfig(weight_decay=0.0))
    seen = []
    for _ in range(30):
        for parameter in module.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.accumulate()
        take_step(optimizer, learning_rate=1e-4)
        optimizer.forget_gradients()
        seen.append(module.table[0, 0].item())
    # BF16 knows nothing between 1 and 1 - 2^-8, so it shows no single step; after 30 it shows their sum.
    assert seen[0] == 1.0
    assert seen[-1] == 1 - 2**-8
    assert torch.allclose(optimizer.master["table"], torch.full((37, 11), 1 - 30e-4), atol=5e-5)


def test_gradients_of_micro_batches_are_summed_in_fp32():
    module = Small().bfloat16()
    optimizer = AdamW(module.named_parameters(), config=OptimConfig())
    for value in [256.0] + [1.0] * 64:  # in BF16, 256 + 1 is 256
        module.gain.grad = torch.full_like(module.gain, value)
        optimizer.accumulate()
    assert optimizer.gradients["gain"].dtype == torch.float32
    assert torch.equal(optimizer.gradients["gain"], torch.full((11,), 320.0))


def test_the_norm_is_not_finite_when_one_gradient_is_not():
    module = Small()
    optimizer = AdamW(module.named_parameters(), config=OptimConfig())
    give_gradients(module, seed=0)
    assert module.gain.grad is not None
    module.gain.grad[3] = math.inf
    assert not math.isfinite(Alone().gradient_norm(optimizer.gradients))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loaded_optimizer_goes_on_as_if_it_had_never_stopped(dtype: torch.dtype):
    def run(module: nn.Module, optimizer: AdamW, steps: range) -> None:
        for step in steps:
            give_gradients(module, seed=step)
            optimizer.accumulate()
            take_step(optimizer, learning_rate=0.01)
            optimizer.forget_gradients()

    whole = Small().to(dtype)
    unbroken = AdamW(whole.named_parameters(), config=OptimConfig())
    run(whole, unbroken, range(7))

    first_half = Small().to(dtype)
    stopped = AdamW(first_half.named_parameters(), config=OptimConfig())
    run(first_half, stopped, range(3))
    first, second = stopped.moments()
    second_half = Small(seed=9).to(dtype)
    resumed = AdamW(second_half.named_parameters(), config=OptimConfig())
    resumed.load(steps=3, weights=stopped.master, first_moment=first, second_moment=second)
    run(second_half, resumed, range(3, 7))

    for name, parameter in whole.named_parameters():
        assert torch.equal(parameter, second_half.get_parameter(name))
        assert torch.equal(unbroken.master[name], resumed.master[name])
    for ours, theirs in zip(unbroken.moments(), resumed.moments(), strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_parameter_without_a_gradient_is_left_alone():
    module = Small()
    before = module.stack.detach().clone()
    optimizer = AdamW(module.named_parameters(), config=OptimConfig())
    give_gradients(module, seed=0)
    module.stack.grad = None
    take_step(optimizer, learning_rate=0.1)
    assert torch.equal(module.stack, before)
