"""Bytes of weights and training state, by formula.

What the intermediate results of a forward pass take is not here: it hangs on the micro-batch and on what is
recomputed, and is not a matter of counting parameters.
"""

from dataclasses import dataclass

from dsv3.config import ModelConfig, PretrainConfig
from dsv3.errors import ConfigError
from dsv3.plan.counts import count_parameters
from dsv3.plan.published_tensors import checkpoint_size, quantised_size

WEIGHT_PRECISIONS = ("float32", "bfloat16", "fp8")


@dataclass(frozen=True, kw_only=True)
class TrainingMemory:
    """Bytes that training holds between steps, all ranks together, nothing held twice."""

    weights: int
    """What the model computes with; the FP8 copies of an FP8 recipe are among them."""
    master: int
    """FP32 weights that the optimiser steps, where the model computes with something else; 0 where with them."""
    gradients: int
    """FP32 sums over micro-batches, and beside them the gradient of one micro-batch where that has a narrower type."""
    moments: int
    """Both moments of AdamW."""
    average: int
    """The running average of the weights, in CPU memory whatever the device (report 3.2.3)."""

    @property
    def on_device(self) -> int:
        """Everything but the average."""
        return self.weights + self.master + self.gradients + self.moments


def training_memory(config: PretrainConfig, *, dtype: str) -> TrainingMemory:
    """Return the bytes of weights, gradients and optimiser state when computing in `dtype`: 'float32' or 'bfloat16'.

    MTP modules are trained and counted; embedding and head are shared with them and counted once. An FP8 recipe
    (`config.precision`) keeps its weights in FP32 and a copy of 1 byte each, for every dtype. Router biases have no
    gradient and no moments, and stay FP32. Activations are not in it.

    Source: report 3.3 (FP32 master weights and gradients, BF16 moments).
    """
    if dtype not in ("float32", "bfloat16"):
        raise ConfigError(f"training memory was asked for in '{dtype}'; choose 'float32' or 'bfloat16'")
    model = config.model
    learned = _stored(model) - _biases(model)
    recipe = config.precision.recipe
    size = quantised_size(model)
    in_fp8 = size.values if recipe != "original" else 0
    copies = in_fp8 and in_fp8 + 4 * (size.matrices if recipe == "fp8_per_tensor" else size.scales)
    rest = learned - in_fp8
    narrow = dtype == "bfloat16"
    return TrainingMemory(
        weights=4 * _biases(model) + rest * (2 if narrow else 4) + copies,
        master=4 * in_fp8 + (4 * rest if narrow else 0),
        # Gradients of quantised weights are FP32 from the start; the others have the type of their weight at first.
        gradients=4 * learned + (2 * rest if narrow else 0),
        moments=2 * learned * (2 if config.optim.bf16_moments else 4),
        average=4 * learned if config.optim.ema_decay > 0 else 0,
    )


def weight_bytes(model: ModelConfig, *, precision: str) -> int:
    """Return the bytes of all weights in memory, MTP modules included, embedding and head once.

    'fp8' is the published format: E4M3 with block scales where it has them and BF16 elsewhere. Router biases are FP32
    in all three.
    """
    if precision == "fp8":
        copies = (
            2 * model.num_nextn_predict_layers * model.vocab_size * model.hidden_size
        )  # in BF16, within MTP modules
        return checkpoint_size(model, fp8=True).num_bytes - 2 * copies
    if precision not in WEIGHT_PRECISIONS:
        raise ConfigError(f"weights were asked for in '{precision}'; choose one of {', '.join(WEIGHT_PRECISIONS)}")
    biases = _biases(model)
    return 4 * biases + (_stored(model) - biases) * (4 if precision == "float32" else 2)


def _stored(model: ModelConfig) -> int:
    counts = count_parameters(model)
    return counts.total + counts.mtp


def _biases(model: ModelConfig) -> int:
    layers = model.num_moe_layers + model.num_nextn_predict_layers
    return layers * model.n_routed_experts if model.has_router_bias else 0
