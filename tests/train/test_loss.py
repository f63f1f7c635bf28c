from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from dsv3.batch import IGNORE, TokenBatch
from dsv3.config import BalanceConfig, ModelConfig, PretrainConfig
from dsv3.model.transformer import Transformer
from dsv3.train.loss import WholeBatch, pretraining_loss

NO_BALANCE = BalanceConfig(method="none")


def model_of(config: ModelConfig) -> Transformer:
    model = Transformer(config)
    model.init_weights(generator=torch.Generator().manual_seed(0))
    return model


def rows_of(config: ModelConfig, *, count: int, length: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, config.vocab_size, (count, length + 1), generator=generator)


@pytest.mark.parametrize("depths", [1, 2])
def test_the_loss_is_next_token_plus_lambda_over_d_of_sums_divided_by_t(small_run: PretrainConfig, depths: int):
    model = model_of(replace(small_run.model, num_nextn_predict_layers=depths))
    rows = rows_of(model.config, count=3, length=9)
    batch = TokenBatch.from_rows(rows)
    output = model(batch, mtp=True)
    parts = pretraining_loss(
        model, output=output, batch=batch, whole=WholeBatch.of([batch]), mtp_weight=0.3, balance=NO_BALANCE
    )
    T = 9
    main = F.cross_entropy(model.logits(output.hidden), rows[:, 1:].reshape(-1))
    assert parts.next_token.item() == pytest.approx(main.item(), rel=1e-5)
    for k in range(1, depths + 1):
        # Eq. 24: position i of module k predicts t_{i+k+1}; T - k terms a row, divided by T.
        logits = model.logits(output.mtp[k - 1].hidden).unflatten(0, (3, T - k))
        nll = F.cross_entropy(logits.flatten(0, 1), rows[:, 1 + k :].reshape(-1), reduction="sum") / (3 * T)
        assert parts.mtp[k - 1].item() == pytest.approx(nll.item(), rel=1e-5)
    total = main + 0.3 / depths * sum(parts.mtp)
    assert parts.total.item() == pytest.approx(total.item(), rel=1e-5)


def test_targets_to_be_ignored_count_neither_above_nor_below_the_line(small_run: PretrainConfig):
    model = model_of(small_run.model)
    rows = rows_of(model.config, count=2, length=8)
    batch = TokenBatch.from_rows(rows)
    assert batch.targets is not None
    masked = batch.targets.clone()
    masked[5:8] = IGNORE
    batch = replace(batch, targets=masked)
    output = model(batch, mtp=True)
    parts = pretraining_loss(
        model, output=output, batch=batch, whole=WholeBatch.of([batch]), mtp_weight=0.3, balance=NO_BALANCE
    )
    expected = F.cross_entropy(model.logits(output.hidden), masked, ignore_index=IGNORE)
    assert parts.next_token.item() == pytest.approx(expected.item(), rel=1e-5)
    ahead = F.cross_entropy(
        model.logits(output.mtp[0].hidden), output.mtp[0].batch.targets, ignore_index=IGNORE, reduction="sum"
    )
    assert parts.mtp[0].item() == pytest.approx(ahead.item() / 13, rel=1e-5)  # 16 targets less 3


def test_the_balance_loss_is_part_of_the_total_and_counts_the_router_of_the_mtp_module(small_run: PretrainConfig):
    model = model_of(small_run.model)
    batch = TokenBatch.from_rows(rows_of(model.config, count=2, length=8))
    output = model(batch, mtp=True)
    parts = pretraining_loss(
        model,
        output=output,
        batch=batch,
        whole=WholeBatch.of([batch]),
        mtp_weight=0.0,
        balance=BalanceConfig(sequence_loss_weight=1.0),
    )
    parts.balance.backward()
    assert parts.total.item() == pytest.approx(parts.next_token.item() + parts.balance.item())
    assert len(model.routers()) == 2  # one MoE layer and one MTP module
    assert all(router.weight.grad is not None and router.weight.grad.abs().sum() > 0 for router in model.routers())


def test_embedding_and_head_learn_from_the_mtp_module_too(small_run: PretrainConfig):
    model = model_of(small_run.model)
    batch = TokenBatch.from_rows(rows_of(model.config, count=2, length=8))
    output = model(batch, mtp=True)
    parts = pretraining_loss(
        model, output=output, batch=batch, whole=WholeBatch.of([batch]), mtp_weight=1.0, balance=NO_BALANCE
    )
    (of_head, of_table) = torch.autograd.grad(parts.mtp[0], [model.lm_head.weight, model.embed_tokens.weight])
    assert of_head.abs().sum() > 0
    assert of_table.abs().sum() > 0
