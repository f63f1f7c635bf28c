"""From processes that have been started, by torchrun or by a server, to ranks that can talk."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from itertools import count
from math import lcm
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dsv3.config import ModelConfig, ParallelConfig
from dsv3.errors import ConfigError, RankLostError
from dsv3.parallel.ranks import Alone, Ranks
from dsv3.runtime.device import choose_device
from dsv3.runtime.log import ROOT, get_logger
from dsv3.runtime.rank import is_main_rank, num_ranks, num_restarts, rank_on_this_machine, ranks_on_this_machine

TCP = "tcp://"
MEETINGS = count()
"""Of this process; every rank of a program has as many."""


@contextmanager
def open_ranks(
    config: ParallelConfig, *, model: ModelConfig, sequence_length: int, device: str = "cpu"
) -> Iterator[Alone]:
    """Join the ranks that torchrun has started, and leave them at the end; without torchrun there is one.

    They talk over gloo about what lies on the CPU, and over NCCL about what lies on GPUs, of which each takes the one
    with its number on the machine (never run: no GPU was at hand). All but the first say only what is wrong.

    Raises:
        ConfigError: the settings want more ranks than there are, or others.
    """
    size = num_ranks()
    if size == 1:
        wanted = config.pipeline * lcm(config.expert, config.context)
        if wanted > 1:
            asked = " and ".join(
                f"parallel.{name} = {size}"
                for name in ("pipeline", "expert", "context")
                if (size := getattr(config, name)) > 1
            )
            raise ConfigError(
                f"{asked} needs {wanted} ranks, or a multiple, and there is one; start it as torchrun "
                f"--nproc-per-node {wanted} --no-python -- dsv3 pretrain ..."
            )
        if config.zero:
            raise ConfigError("parallel.zero shares the optimizer's state among ranks, and there is one; use torchrun")
        if config.schedule == "dualpipe_v":
            raise ConfigError(
                "parallel.schedule = 'dualpipe_v' weaves what ranks wait for, and there is one; use torchrun, or leave "
                "the schedule out"
            )
        yield Alone()
        return
    if not is_main_rank():
        get_logger(ROOT).setLevel(logging.WARNING)
    timeout = timedelta(seconds=config.timeout_seconds)
    store, rank, size = next(dist.rendezvous("env://", timeout=timeout))  # type: ignore[attr-defined]
    # torchrun keeps its store over a restart (2.13) and over meetings, and with it addresses that are no more.
    store = dist.PrefixStore(f"attempt-{num_restarts()}-{next(MEETINGS)}", store)  # type: ignore[attr-defined]
    _connect(_backend(device), store=store, rank=rank, size=size, timeout=timeout)
    try:
        yield Ranks(config, model=model, sequence_length=sequence_length)
    finally:
        dist.destroy_process_group()


@contextmanager
def open_group(
    meeting: str, *, rank: int, size: int, begin_seconds: float, timeout_seconds: float
) -> Iterator[dist.ProcessGroup]:
    """Join ranks that are told the same place to meet, and leave them at the end.

    It is an empty folder of one machine, or tcp://HOST:PORT of `open_meeting`. They have `begin_seconds` to come, and
    then talk over gloo; what they wait for after that breaks with a RuntimeError when it takes longer than
    `timeout_seconds`.

    Raises:
        RankLostError: one of them has not come.
    """
    try:
        store = _store_of(meeting, size=size)
        store.set(f"rank-{rank}", "is here")
        store.wait([f"rank-{one}" for one in range(size)], timedelta(seconds=begin_seconds))
        _connect("gloo", store=store, rank=rank, size=size, timeout=timedelta(seconds=timeout_seconds))
    except RuntimeError as error:
        raise RankLostError(f"not all of the {size} ranks that share experts have come: {error}") from error
    try:
        assert dist.group.WORLD is not None
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()


@contextmanager
def open_meeting() -> Iterator[int]:
    """Keep a store for ranks of several machines to meet, as long as they begin; give its port.

    Whoever reaches the port can write to it: it needs a network that is trusted, as what the ranks then say does.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
    yield store.port


def _connect(backend: str, *, store: Any, rank: int, size: int, timeout: timedelta) -> None:
    """Join the ranks, and return when all of them have: one that left before would break the joining of the others."""
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    store.set(f"rank-{rank}-connected", "")
    store.wait([f"rank-{one}-connected" for one in range(size)], timeout)


def _store_of(meeting: str, *, size: int) -> Any:
    if not meeting.startswith(TCP):
        return dist.FileStore(str(Path(meeting) / "store"), size)  # type: ignore[attr-defined]
    host, _, port = meeting.removeprefix(TCP).rpartition(":")
    return dist.TCPStore(host, int(port), is_master=False)  # type: ignore[attr-defined]


def _backend(device: str) -> str:
    """Return what ranks talk over, having taken this rank's GPU where they compute on GPUs.

    Raises:
        ConfigError: the machine has fewer GPUs than ranks, or one was named, which all ranks would take.
    """
    wanted = choose_device(device)
    if wanted.type == "cpu":
        return "gloo"
    place, there = rank_on_this_machine(), torch.cuda.device_count()
    is_named = ":" in device
    if is_named or place >= there:
        found = f"runtime.device = '{device}'" if is_named else f"{there} GPUs"
        raise ConfigError(
            f"{ranks_on_this_machine()} ranks on this machine and {found}: each rank takes a GPU of its own; use "
            "runtime.device=cuda, and as many ranks as GPUs"
        )
    torch.cuda.set_device(place)
    return "cpu:gloo,cuda:nccl"
