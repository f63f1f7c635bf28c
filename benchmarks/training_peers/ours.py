"""This repository's training step: the peers' work, and the whole loss of V3."""

from dataclasses import replace

from torch import Tensor
from training_peers.sizes import Size
from training_peers.system import BETAS, CLIP_GRADIENT_NORM, EPSILON, LEARNING_RATE, WEIGHT_DECAY

from dsv3.batch import TokenBatch
from dsv3.config import (
    KEEP_ALL,
    BalanceConfig,
    BatchConfig,
    LearningRateConfig,
    MtpLossConfig,
    OptimConfig,
    PrecisionConfig,
    PretrainConfig,
)
from dsv3.train.resume import new_state
from dsv3.train.step import train_step


class OurSystem:
    """`train_step` on one micro-batch that holds all rows."""

    def __init__(self, config: PretrainConfig) -> None:
        self.state = new_state(config)
        self.num_trained = sum(parameter.numel() for parameter in self.state.optimizer.parameters.values())

    def step(self, rows: Tensor) -> float:
        return train_step(self.state, batches=[TokenBatch.from_rows(rows)]).loss


def same_work(size: Size) -> PretrainConfig:
    """Return the settings under which a step does what a peer's does: next-token loss, clipping and AdamW alone.

    No MTP, no balancing, no weight average, a constant learning rate, nothing recomputed. Moments stay BF16, as is our
    default.
    """
    return PretrainConfig(
        model=size.model,
        batch=BatchConfig(sequence_length=size.sequence_length, micro_batch_sequences=size.rows).steady(size.rows),
        optim=OptimConfig(
            learning_rate=LearningRateConfig(peak=LEARNING_RATE, warmup_steps=0),
            beta1=BETAS[0],
            beta2=BETAS[1],
            epsilon=EPSILON,
            weight_decay=WEIGHT_DECAY,
            clip_gradient_norm=CLIP_GRADIENT_NORM,
            ema_decay=0.0,
        ),
        precision=PrecisionConfig(recipe="original"),
        recompute=KEEP_ALL,
        balance=BalanceConfig(method="none"),
    )


def whole_loss(size: Size) -> PretrainConfig:
    """Return the same with V3's whole loss: one MTP module at 0.3, the balance loss at 1e-4, biases moved by 1e-3."""
    return replace(
        same_work(size),
        model=replace(size.model, num_nextn_predict_layers=1),
        mtp=MtpLossConfig(early_weight=0.3),
        balance=BalanceConfig(method="bias", sequence_loss_weight=1e-4, bias_update_speed=1e-3),
    )


MODES = {
    "same work": lambda size: OurSystem(same_work(size)),
    "whole V3 loss": lambda size: OurSystem(whole_loss(size)),
}
