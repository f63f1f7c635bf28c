"""From the processes that torchrun has started to ranks that can talk."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch.distributed as dist

from dsv3.config import ModelConfig, ParallelConfig
from dsv3.errors import ConfigError
from dsv3.parallel.ranks import Alone, Ranks
from dsv3.runtime.log import ROOT, get_logger
from dsv3.runtime.rank import is_main_rank, num_ranks, num_restarts


@contextmanager
def open_ranks(config: ParallelConfig, *, model: ModelConfig, sequence_length: int) -> Iterator[Alone]:
    """Join the ranks that torchrun has started, and leave them at the end; without torchrun there is one.

    They talk over gloo. All but the first say only what is wrong.

    Raises:
        ConfigError: the settings want more ranks than there are, or others.
    """
    size = num_ranks()
    if size == 1:
        wanted = config.pipeline * config.expert
        if wanted > 1:
            asked = " x ".join(
                f"parallel.{name} = {size}"
                for name, size in (("pipeline", config.pipeline), ("expert", config.expert))
                if size > 1
            )
            raise ConfigError(
                f"{asked} needs {wanted} ranks, or a multiple, and there is one; start it as torchrun "
                f"--nproc-per-node {wanted} --no-python -- dsv3 pretrain ..."
            )
        if config.zero:
            raise ConfigError("parallel.zero shares the optimizer's state among ranks, and there is one; use torchrun")
        yield Alone()
        return
    if not is_main_rank():
        get_logger(ROOT).setLevel(logging.WARNING)
    timeout = timedelta(seconds=config.timeout_seconds)
    store, rank, size = next(dist.rendezvous("env://", timeout=timeout))  # type: ignore[attr-defined]
    # torchrun keeps its store over a restart (2.13), and with it the addresses of processes that are gone.
    store = dist.PrefixStore(f"attempt-{num_restarts()}", store)  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timeout)
    try:
        yield Ranks(config, model=model, sequence_length=sequence_length)
    finally:
        dist.destroy_process_group()
