"""One training step on one row: `python -m long_context_parts.training TOKENS` prints what it took.

Resident memory at most above that of the state, wall-clock seconds of a step, and of its attention kernels alone.
"""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch

from dsv3.batch import TokenBatch
from dsv3.config import BatchConfig, PretrainConfig, RecomputeConfig
from dsv3.ops.attention import expanded_attention
from dsv3.ops.rope import rope_amplitude, rope_frequencies, rotation_at
from dsv3.recipes import tiny
from dsv3.train.resume import new_state
from dsv3.train.step import train_step

REPEATS = 3


def config_of(tokens: int) -> PretrainConfig:
    """Return recipe `tiny` with the published recomputation, on rows of so many tokens."""
    base = tiny()
    return replace(
        base,
        model=replace(base.model, max_position_embeddings=tokens),
        batch=BatchConfig(sequence_length=tokens).steady(1),
        optim=replace(base.optim, ema_decay=0.0),
        recompute=RecomputeConfig(),
    )


def measured(tokens: int) -> dict[str, float]:
    """Take a few steps."""
    config = config_of(tokens)
    state = new_state(config)
    rows = torch.randint(config.model.vocab_size, (1, tokens + 1), generator=torch.Generator().manual_seed(0))
    train_step(state, batches=[TokenBatch.from_rows(rows[:, :129])])  # what stays, such as moments
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    seconds = timed(lambda: train_step(state, batches=[TokenBatch.from_rows(rows)]))
    return {
        "peak_bytes": resident("VmHWM") - before,
        "seconds": seconds,
        "attention_seconds": attention_seconds(config, tokens=tokens),
    }


def attention_seconds(config: PretrainConfig, *, tokens: int) -> float:
    """Return how long the attention of all layers and MTP modules takes in a step, forward and backward."""
    model = config.model
    layers = model.num_hidden_layers + model.num_nextn_predict_layers
    query = torch.randn(tokens, model.num_attention_heads, model.qk_head_dim, requires_grad=True)
    width = model.qk_nope_head_dim + model.v_head_dim
    key_value = torch.randn(tokens, model.num_attention_heads, width, requires_grad=True)
    rope_key = torch.randn(tokens, model.qk_rope_head_dim, requires_grad=True)
    rotation = rotation_at(torch.arange(tokens), frequencies=rope_frequencies(model), amplitude=rope_amplitude(model))

    def once() -> None:
        output = expanded_attention(
            query, key_value=key_value, rope_key=rope_key, rotation=rotation, lengths=[tokens], scale=0.1
        )
        output.sum().backward()

    return layers * timed(once)


def timed(work: Callable[[], object]) -> float:
    """Return the median seconds of some calls, after one that is not counted."""
    work()
    times = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return median(times)


def resident(field: str) -> int:
    """Return a field of this process's memory status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


if __name__ == "__main__":
    print(json.dumps(measured(int(sys.argv[1]))))
