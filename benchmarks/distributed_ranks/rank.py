"""One rank: python -m distributed_ranks.rank WORK FOLDER SIZE RANK; prints one line of JSON.

WORK is 'train-EXPERT' (time training steps, experts shared by so many ranks) or 'wire-PER_NODE' (count what dispatch
and combine of one layer of the published width move, over nodes of so many ranks).
"""

import json
import os
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist
from training_peers.ours import same_work
from training_peers.sizes import SIZES

from dsv3.batch import TokenBatch
from dsv3.config import ModelConfig, ParallelConfig
from dsv3.model.router import Router
from dsv3.parallel.ranks import Alone, Ranks
from dsv3.train.resume import new_state
from dsv3.train.step import train_step

SIZE = SIZES["8m-256"]
STEPS = 6
TOKENS = 128
"""Of each rank, through one layer of the published width."""


def main() -> None:
    work, folder, size, rank = sys.argv[1:]
    torch.set_num_threads(1)
    if int(size) > 1:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/store",
            rank=int(rank),
            world_size=int(size),
            timeout=timedelta(seconds=300),
        )
    kind, number = work.split("-")
    found = seconds_of_steps(int(number)) if kind == "train" else moved(int(number))
    if int(size) > 1:
        dist.barrier()
        dist.destroy_process_group()
    print(json.dumps(found))


def seconds_of_steps(expert: int) -> dict[str, list[float]]:
    """Time steps in which every rank has as many tokens as one rank alone would have."""
    many = dist.is_initialized()
    ranks = Ranks(ParallelConfig(expert=expert), num_experts=SIZE.model.n_routed_experts) if many else Alone()
    state = new_state(same_work(SIZE), ranks=ranks)
    generator = torch.Generator().manual_seed(ranks.rank)
    seconds = []
    for _ in range(STEPS + 1):
        shape = (SIZE.rows, SIZE.sequence_length + 1)
        rows = torch.randint(SIZE.model.vocab_size, shape, generator=generator)
        began = time.perf_counter()
        train_step(state, batches=[TokenBatch.from_rows(rows)])
        seconds.append(time.perf_counter() - began)
    return {"seconds": seconds[1:]}


def moved(per_node: int) -> dict[str, object]:
    """Send tokens of the published width through the published router's choices; return copies and bytes by hop."""
    rank, size = dist.get_rank(), dist.get_world_size()
    config = ModelConfig()
    ranks = Ranks(ParallelConfig(expert=size, wire="fp8", ranks_per_node=per_node), num_experts=256)
    router = Router(config)
    generator = torch.Generator().manual_seed(0)
    router.weight.data.normal_(0.0, 0.006, generator=generator)
    tokens = torch.randn(TOKENS, config.hidden_size, generator=torch.Generator().manual_seed(1 + rank))
    with torch.no_grad():
        routing = router(tokens)
        sent = ranks.dispatch.dispatch(tokens, routing=routing)
        ranks.dispatch.combine(sent.rows, dispatched=sent)
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
