import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dsv3.batch import TokenBatch
from dsv3.config import BalanceConfig, LearningRateConfig, PretrainConfig
from dsv3.errors import NonFiniteError
from dsv3.train.balance import max_violation
from dsv3.train.optimizer import AdamW
from dsv3.train.resume import new_state
from dsv3.train.step import TrainState, train_step

METHODS = ["bias", "sequence_loss", "batch_loss", "v2_losses", "none"]


def rows_of(config: PretrainConfig, *, seed: int = 0, count: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, config.model.vocab_size, (count, config.batch.sequence_length + 1), generator=generator)


def micro_batches(rows: Tensor, *, size: int) -> list[TokenBatch]:
    return [TokenBatch.from_rows(part) for part in rows.split(size)]


def biases(state: TrainState) -> list[Tensor]:
    return [router.e_score_correction_bias for router in state.model.routers()]


def gradients_seen_by(optimizer: AdamW) -> dict[str, Tensor]:
    """Record what a step is taken with. Weights after a step tell little: AdamW turns a tiny gradient into its sign."""
    seen: dict[str, Tensor] = {}
    take_step = optimizer.step

    def record(**settings: float) -> None:
        seen.update({name: gradient.clone() for name, gradient in optimizer.gradients.items()})
        take_step(**settings)

    optimizer.step = record
    return seen


@pytest.mark.parametrize("method", METHODS)
def test_micro_batches_change_memory_and_not_results(small_run: PretrainConfig, method: str):
    config = replace(small_run, balance=replace(small_run.balance, method=method, auxiliary_loss_weight=0.1))
    whole, cut = new_state(config), new_state(config)
    seen = [gradients_seen_by(state.optimizer) for state in (whole, cut)]
    metrics = [
        train_step(state, batches=micro_batches(rows_of(config), size=size)) for state, size in ((whole, 4), (cut, 1))
    ]
    assert seen[0].keys() == seen[1].keys() == whole.optimizer.parameters.keys()
    for name, gradient in seen[0].items():
        assert torch.allclose(gradient, seen[1][name], rtol=1e-3, atol=1e-5 * gradient.abs().max().item()), name
    for ours, theirs in zip(biases(whole), biases(cut), strict=True):
        assert torch.equal(ours, theirs)
    assert metrics[0].loss == pytest.approx(metrics[1].loss, rel=1e-5)
    assert metrics[0].balance_loss == pytest.approx(metrics[1].balance_loss, rel=1e-5)
    assert metrics[0].mtp_loss == pytest.approx(metrics[1].mtp_loss, rel=1e-5)
    assert metrics[0].gradient_norm == pytest.approx(metrics[1].gradient_norm, rel=1e-4)
    assert [load.tolist() for load in metrics[0].load] == [load.tolist() for load in metrics[1].load]


def test_the_bias_of_every_router_moves_by_gamma_after_the_step_the_mtp_modules_too(small_run: PretrainConfig):
    state = new_state(small_run)
    metrics = train_step(state, batches=micro_batches(rows_of(small_run), size=2))
    assert len(metrics.load) == len(biases(state)) == 2
    for load, bias in zip(metrics.load, biases(state), strict=True):
        mean = load.double().mean()
        expected = [0.01 * ((mean > count).double() - (mean < count).double()).item() for count in load.double()]
        assert bias.tolist() == pytest.approx(expected)
        assert bias.abs().sum() > 0
    tokens, chosen = 4 * 32, small_run.model.num_experts_per_tok
    assert metrics.load[0].sum() == tokens * chosen
    assert metrics.load[1].sum() == (tokens - 4) * chosen  # an MTP module sees one token a row fewer


@pytest.mark.parametrize("method", METHODS[1:])
def test_other_methods_leave_the_bias_at_zero(small_run: PretrainConfig, method: str):
    config = replace(small_run, balance=BalanceConfig(method=method))
    state = new_state(config)
    train_step(state, batches=micro_batches(rows_of(config), size=4))
    assert all(not bias.any() for bias in biases(state))


def test_balance_by_bias_ends_more_even_than_none(small_run: PretrainConfig):
    model = replace(small_run.model, n_routed_experts=8, n_group=1, topk_group=1)
    optim = replace(small_run.optim, learning_rate=LearningRateConfig(peak=2e-3, warmup_steps=2))
    generator = torch.Generator().manual_seed(0)
    often_and_rarely = 1 / torch.arange(1, 318, dtype=torch.float64)  # tokens as frequent as words are
    rows = torch.multinomial(often_and_rarely, 8 * 4 * 33, replacement=True, generator=generator).view(8, 4, 33) + 3
    ends = {}
    for method in ("bias", "none"):
        balance = BalanceConfig(method=method, bias_update_speed=0.01)
        state = new_state(replace(small_run, model=model, optim=optim, balance=balance))
        violations = []
        for step in range(60):
            metrics = train_step(state, batches=micro_batches(rows[step % 8], size=4))
            violations.append(max_violation(metrics.load[0]))
        ends[method] = sum(violations[-10:]) / 10
    assert ends["bias"] < 0.6 * ends["none"]  # 1.15 and 2.93 when this was written


def test_schedules_are_read_at_the_tokens_before_the_step(small_run: PretrainConfig):
    state = new_state(small_run)
    seen = []
    for step in range(9):
        metrics = train_step(state, batches=micro_batches(rows_of(small_run, seed=step), size=4))
        seen.append((metrics.step, metrics.tokens, metrics.mtp_weight))
    assert seen[0] == (1, 128, 0.3)
    assert seen[7] == (8, 1024, 0.3)  # 896 tokens before it, of the 1000 with the early weight
    assert seen[8] == (9, 1152, 0.1)


def test_a_step_lowers_the_loss_on_its_own_batch(small_run: PretrainConfig):
    state = new_state(small_run)
    batches = micro_batches(rows_of(small_run), size=4)
    losses = [train_step(state, batches=batches).loss for _ in range(6)]
    assert losses[0] == pytest.approx(math.log(small_run.model.vocab_size), rel=0.05)
    assert losses[-1] < losses[0] - 0.5


def test_without_weight_on_mtp_its_modules_are_not_run_and_do_not_change(small_run: PretrainConfig):
    config = replace(small_run, mtp=replace(small_run.mtp, early_weight=0.0))
    state = new_state(config)
    before = copy.deepcopy(state.model.mtp.state_dict())
    metrics = train_step(state, batches=micro_batches(rows_of(config), size=4))
    assert metrics.mtp_loss == ()
    assert len(metrics.load) == 1
    for name, tensor in state.model.mtp.state_dict().items():
        assert torch.equal(tensor, before[name])


def everything(state: TrainState) -> list[Tensor]:
    first, second = state.optimizer.moments()
    average = [] if state.average is None else list(state.average.average.values())
    held = [*state.model.state_dict().values(), *first.values(), *second.values(), *average]
    return [tensor.clone() for tensor in held]


def test_a_loss_that_is_not_finite_changes_nothing_and_names_the_rows(small_run: PretrainConfig):
    state = new_state(small_run)
    state.describe_rows = lambda rows: f"documents of {list(rows)}"
    train_step(state, batches=micro_batches(rows_of(small_run), size=2))
    poison = 7
    with torch.no_grad():
        state.model.embed_tokens.weight[poison] = math.nan
    rows = rows_of(small_run, seed=1).clamp(min=10)
    rows[3, 20] = poison  # the second micro-batch of two: rows 2 and 3 of the step, 6 and 7 of the run
    before = everything(state)
    with pytest.raises(NonFiniteError, match=r"step 2 cannot be taken: the loss is nan, in rows 6 to 7 .*\[6, 7\]"):
        train_step(state, batches=micro_batches(rows, size=2))
    assert (state.step, state.tokens) == (1, 128)
    for now, then in zip(everything(state), before, strict=True):
        assert torch.equal(now, then) or (now.isnan() == then.isnan()).all()
    assert not state.optimizer.gradients


def test_a_gradient_that_is_not_finite_changes_nothing_and_names_rows_and_tensor(small_run: PretrainConfig):
    state = new_state(small_run)
    before = everything(state)

    def spoil(gradient: Tensor) -> Tensor:
        # Of the fourth row only: the gradient of an embedding row that no other micro-batch reads.
        spoiled = gradient.clone()
        spoiled[7][gradient[7] != 0] = math.inf
        return spoiled

    state.model.embed_tokens.weight.register_hook(spoil)
    rows = rows_of(small_run).clamp(min=10)
    rows[2, 4] = 7
    with pytest.raises(NonFiniteError, match=r"the gradient of embed_tokens.weight is not finite, in rows 2 to 2 of"):
        train_step(state, batches=micro_batches(rows, size=1))
    assert (state.step, state.tokens) == (0, 0)
    assert all(torch.equal(now, then) for now, then in zip(everything(state), before, strict=True))


def test_bf16_weights_train_with_fp32_masters(small_run: PretrainConfig):
    config = replace(small_run, runtime=replace(small_run.runtime, dtype="bfloat16"))
    state = new_state(config)
    assert state.model.lm_head.weight.dtype == torch.bfloat16
    batches = micro_batches(rows_of(config), size=2)
    losses = [train_step(state, batches=batches).loss for _ in range(6)]
    assert losses[-1] < losses[0] - 0.5
    assert all(bias.dtype == torch.float32 for bias in biases(state))
    assert all(master.dtype == torch.float32 for master in state.optimizer.master.values())
