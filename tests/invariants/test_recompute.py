"""Memory and speed are settings, results are not: what is made again, and whose kernels compute."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor

from dsv3 import native, recipes
from dsv3.batch import TokenBatch
from dsv3.config import KEEP_ALL, PretrainConfig, RecomputeConfig
from dsv3.model.linear import RMSNorm
from dsv3.train.loss import WholeBatch, pretraining_loss
from dsv3.train.resume import new_state
from dsv3.train.step import train_step

COMBINATIONS = [
    RecomputeConfig(norms=norms, up_projections=up, swiglu=swiglu)
    for norms, up, swiglu in product((False, True), repeat=3)
]


def small_config(**changes: object) -> PretrainConfig:
    tiny = recipes.tiny()
    rate = replace(tiny.optim.learning_rate, warmup_steps=0)
    return replace(
        tiny,
        model=replace(tiny.model, vocab_size=512, hidden_size=64, **changes),
        batch=replace(tiny.batch, sequence_length=64),
        optim=replace(tiny.optim, learning_rate=rate),
    )


def batches(config: PretrainConfig, *, steps: int) -> list[TokenBatch]:
    generator = torch.Generator().manual_seed(1)
    shape = (4, config.batch.sequence_length + 1)
    return [
        TokenBatch.from_rows(torch.randint(config.model.vocab_size, shape, generator=generator)) for _ in range(steps)
    ]


def gradients(config: PretrainConfig, *, recompute: RecomputeConfig) -> dict[str, Tensor]:
    state, (batch,) = new_state(config), batches(config, steps=1)
    output = state.model(batch, mtp=True, recompute=recompute)
    whole = WholeBatch.of([batch])
    loss = pretraining_loss(
        state.model, output=output, batch=batch, whole=whole, mtp_weight=0.3, balance=config.balance
    )
    loss.total.backward()
    return {name: parameter.grad for name, parameter in state.model.named_parameters()}


@pytest.mark.parametrize("kernels", ["auto", "torch"])
@pytest.mark.parametrize("q_lora_rank", [32, None])
def test_what_is_made_again_changes_no_gradient_by_a_bit(kernels, q_lora_rank):
    native.choose_cpu_kernels(kernels)
    config = small_config(q_lora_rank=q_lora_rank)
    expected = gradients(config, recompute=KEEP_ALL)
    for recompute in COMBINATIONS:
        found = gradients(config, recompute=recompute)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected), recompute


def test_a_training_step_follows_the_recompute_setting():
    """The setting reaches the model: with it, the backward pass runs every norm once more."""
    counts = {}
    for recompute in (KEEP_ALL, RecomputeConfig()):
        config = replace(small_config(), recompute=recompute)
        state, (batch,) = new_state(config), batches(config, steps=1)
        calls: list[object] = []
        for module in state.model.modules():
            if isinstance(module, RMSNorm):
                module.register_forward_hook(lambda module, *_, calls=calls: calls.append(module))
        train_step(state, batches=[batch])
        counts[recompute] = len(calls)
    assert counts[RecomputeConfig()] >= 1.8 * counts[KEEP_ALL]


def test_our_kernels_and_torchs_train_alike():
    """The whole V3 loss: one step to rounding, then ten, through which rounding grows by choices that tip over."""
    if not native.usable(torch.zeros(1)):
        pytest.skip("our kernels do not compile here")
    config, losses, loads = small_config(), {}, {}
    for kernels in ("native", "torch"):
        native.choose_cpu_kernels(kernels)
        state = new_state(config)
        steps = [train_step(state, batches=[batch]) for batch in batches(config, steps=10)]
        losses[kernels] = [(step.loss, *step.mtp_loss, step.balance_loss, step.gradient_norm) for step in steps]
        loads[kernels] = torch.stack([torch.stack(step.load) for step in steps])
    assert losses["native"][0] == pytest.approx(losses["torch"][0], rel=1e-5)
    assert torch.equal(loads["native"][0], loads["torch"][0])
    assert torch.allclose(torch.tensor(losses["native"]), torch.tensor(losses["torch"]), rtol=2e-3)
    assert (loads["native"] - loads["torch"]).abs().sum() < 0.01 * loads["torch"].sum()
