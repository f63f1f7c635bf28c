"""What one rank holds: tensors by kind, and the most that the allocator had given out after any part of a chunk."""

import ctypes
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch._dynamo  # A first step loads it, and its 15 MB are none of the plan's.
import torch.distributed as dist
from torch import Tensor

from dsv3 import recipes
from dsv3.batch import TokenBatch
from dsv3.config import ParallelConfig, PretrainConfig
from dsv3.parallel.ranks import Alone, Ranks
from dsv3.parallel.trace import COMPUTE, Trace
from dsv3.train.resume import new_state
from dsv3.train.step import train_step

MICRO_BATCHES = 4
FIELDS = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
"""Of glibc's record of allocations, in its order and words."""


class _Mallinfo2(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_size_t) for name in FIELDS)


class Watch(Trace):
    """Looks at the allocator after every part of every chunk of work."""

    most = 0

    @contextmanager
    def span(self, *words: str, track: str = COMPUTE) -> Iterator[list[str]]:
        del track
        yield list(words)
        self.most = max(self.most, allocated_bytes())


def allocated_bytes() -> int:
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = _Mallinfo2
    counts = mallinfo2()
    return counts.uordblks + counts.hblkhd


def run_of(parallel: dict[str, Any], *, size: int) -> PretrainConfig:
    """Return the run that is measured and planned: `tiny` with twice the width, four rows of 512 to a pipeline."""
    base = recipes.tiny()
    layout = ParallelConfig(**parallel)
    return replace(
        base,
        model=replace(base.model, hidden_size=256, num_hidden_layers=4, vocab_size=512),
        batch=replace(
            base.batch,
            sequence_length=512,
            micro_batch_sequences=1,
            start_sequences=1,
            final_sequences=MICRO_BATCHES * (size // layout.pipeline),
        ),
        optim=replace(base.optim, ema_decay=0.0),
        parallel=layout,
        runtime=replace(base.runtime, dtype="float32"),
    )


def held_bytes(parallel: dict[str, Any]) -> dict[str, int]:
    """Take two steps and return what this rank holds."""
    config = run_of(parallel, size=dist.get_world_size() if dist.is_initialized() else 1)
    length = config.batch.sequence_length
    resident, before = _resident(), allocated_bytes()
    ranks = Ranks(config.parallel, model=config.model, sequence_length=length) if dist.is_initialized() else Alone()
    state = new_state(config, ranks=ranks)
    gradient_bytes: list[int] = []
    reduce = ranks.reduce_gradients

    def note_gradients(gradients: dict[str, Tensor]) -> None:
        gradient_bytes.append(sum(gradient.nbytes for gradient in gradients.values()))
        reduce(gradients)

    ranks.reduce_gradients = note_gradients  # type: ignore[method-assign, assignment]
    watch = Watch()
    for _ in range(2):
        ranks.trace = watch = Watch()
        rows = torch.randint(config.model.vocab_size, (MICRO_BATCHES, length + 1))
        train_step(state, batches=[TokenBatch.from_rows(row[None]) for row in rows])
    first, second = state.optimizer.moments()
    return {
        "place": ranks.layout.pipeline_rank if isinstance(ranks, Ranks) else 0,
        "weights": sum(weight.nbytes for weight in (*state.model.parameters(), *state.model.buffers())),
        "gradients": gradient_bytes[-1],
        "moments": sum(moment.nbytes for moment in (*first.values(), *second.values())),
        "all": watch.most - before,
        "resident": _resident() - resident,
    }


def _resident() -> int:
    """Return the most memory this process has had, in bytes."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
