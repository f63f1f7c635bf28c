"""One rank: python -m distributed_ranks.rank WORK FOLDER SIZE RANK; prints one line of JSON.

WORK is a JSON object: "work" is 'train' (time training steps), 'wire' (count what dispatch and combine of one layer of
the published width move), 'weave' (time steps of a pipeline under a network made slow) or
'memory' (count what a rank holds); "parallel" has settings of
`ParallelConfig`, "latency" seconds that every message takes more, "trace" a file for what ranks did when.
"""

import json
import os
import sys
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from distributed_ranks.memory import held_bytes
from training_peers.ours import same_work
from training_peers.sizes import SIZES

from dsv3.batch import TokenBatch
from dsv3.config import ModelConfig, ParallelConfig, PretrainConfig
from dsv3.model.router import Router
from dsv3.parallel.link import Link
from dsv3.parallel.ranks import Alone, Ranks
from dsv3.parallel.trace import write_trace
from dsv3.train.resume import new_state
from dsv3.train.step import train_step

SIZE = SIZES["8m-256"]
STEPS = 6
TOKENS = 128
"""Of each rank, through one layer of the published width."""
MICRO_BATCHES = 8
"""Of a pipeline in a step, a row each; the report's pipelines have 120."""


def main() -> None:
    text, folder, size, rank = sys.argv[1:]
    work = json.loads(text)
    torch.set_num_threads(1)
    if int(size) > 1:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/store",
            rank=int(rank),
            world_size=int(size),
            timeout=timedelta(seconds=300),
        )
    works = {"train": seconds_of_steps, "wire": moved, "weave": seconds_of_woven_steps, "memory": held_bytes}
    found = works[work.pop("work")](**work)
    if int(size) > 1:
        dist.barrier()
        dist.destroy_process_group()
    print(json.dumps(found))


def ranks_of(config: PretrainConfig, *, parallel: dict[str, Any], link: Link | None = None) -> Alone:
    if not dist.is_initialized():
        return Alone()
    length = config.batch.sequence_length
    return Ranks(ParallelConfig(**parallel), model=config.model, sequence_length=length, link=link)


def seconds_of_steps(parallel: dict[str, Any]) -> dict[str, list[float]]:
    """Time steps in which every rank has as many tokens as one rank alone would have."""
    config = same_work(SIZE)
    ranks = ranks_of(config, parallel=parallel)
    state = new_state(config, ranks=ranks)
    generator = torch.Generator().manual_seed(ranks.rank)
    seconds = []
    for _ in range(STEPS + 1):
        shape = (SIZE.rows, SIZE.sequence_length + 1)
        rows = torch.randint(SIZE.model.vocab_size, shape, generator=generator)
        began = time.perf_counter()
        train_step(state, batches=[TokenBatch.from_rows(rows)])
        seconds.append(time.perf_counter() - began)
    return {"seconds": seconds[1:]}


def seconds_of_woven_steps(parallel: dict[str, Any], latency: float, trace: str = "") -> dict[str, Any]:
    """Time steps of micro-batches of one row; also say what of it the rank has spent waiting."""
    config = replace(same_work(SIZE), parallel=ParallelConfig(**parallel))
    link = Link(latency_seconds=latency)
    ranks = ranks_of(config, parallel=parallel, link=link)
    state = new_state(config, ranks=ranks)
    generator = torch.Generator().manual_seed(ranks.row_rank)
    seconds, waited = [], []
    for number in range(3):
        rows = torch.randint(SIZE.model.vocab_size, (MICRO_BATCHES, SIZE.sequence_length + 1), generator=generator)
        ranks.trace.is_on = bool(trace) and number == 2
        before, began = link.waited_seconds, time.perf_counter()
        train_step(state, batches=[TokenBatch.from_rows(row[None]) for row in rows])
        seconds.append(time.perf_counter() - began)
        waited.append(link.waited_seconds - before)
    if trace:
        events = dict(enumerate(ranks.gather(ranks.trace.events)))
        if ranks.rank == 0:
            write_trace(events, path=Path(trace))
    return {"seconds": seconds[1:], "waited": waited[1:]}


def moved(parallel: dict[str, Any]) -> dict[str, object]:
    """Send tokens of the published width through the published router's choices; return copies and bytes by hop."""
    rank, size = dist.get_rank(), dist.get_world_size()
    config = ModelConfig()
    ranks = Ranks(ParallelConfig(**parallel), model=config, sequence_length=TOKENS)
    router = Router(config)
    generator = torch.Generator().manual_seed(0)
    router.weight.data.normal_(0.0, 0.006, generator=generator)
    tokens = torch.randn(TOKENS, config.hidden_size, generator=torch.Generator().manual_seed(1 + rank))
    through = ranks.dispatch
    with torch.no_grad():
        routing = router(tokens)
        arrived = through.receive(through.send(through.announce(tokens, routing=routing)))
        through.receive_back(through.send_back(arrived.rows, dispatched=arrived))
    per_node = parallel["ranks_per_node"]
    behind = [max(1, per_node) if place == 0 and len(ranks.hops) == 2 else 1 for place in range(len(ranks.hops))]
    chosen = [sorted(row) for row in routing.experts.tolist()]
    return {
        "hops": [vars(hop.traffic) for hop in ranks.hops],
        # By hand, of the first hop: one copy to each other node, or rank, that has any of the token's experts.
        "expected": sum(
            len({expert // (256 // size * behind[0]) for expert in row} - {rank // behind[0]}) for row in chosen
        ),
    }


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
