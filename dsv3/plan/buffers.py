"""Memory of a rank besides what it keeps for later: rows at experts, logits, and what the system takes."""

from dataclasses import dataclass

from dsv3.config import PretrainConfig
from dsv3.plan.traffic import is_woven

LOGITS_AT_ONCE = 1 << 27
"""Numbers of a chunk of logits on a GPU (ops/cross_entropy.py)."""
SYSTEM_GB = 3.0
"""Assumption: the context of CUDA, the buffers of NCCL, and gaps between allocations on a GPU."""


@dataclass(frozen=True, kw_only=True)
class Buffers:
    """Bytes."""

    experts: int
    """Rows at the experts and their outputs, of a forward and a backward pass that are under way at once."""
    logits: int
    system: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.experts + self.logits + self.system


def buffers(config: PretrainConfig, *, dtype: str) -> Buffers:
    """Return what a rank needs for a moment while it computes in `dtype`; 'float32' is a run on CPUs, without a GPU."""
    model, parallel = config.model, config.parallel
    size = 2 if dtype == "bfloat16" else 4
    tokens = config.batch.micro_batch_sequences * config.batch.sequence_length // parallel.context
    row = size * model.hidden_size
    copies = tokens * model.num_experts_per_tok if model.num_moe_layers else 0
    woven = is_woven(parallel)
    return Buffers(
        experts=2 * copies * row * (2 if woven else 1),
        logits=2 * 4 * min(tokens * model.vocab_size, LOGITS_AT_ONCE),
        system=round(SYSTEM_GB * 1e9) if dtype == "bfloat16" else 0,
    )
