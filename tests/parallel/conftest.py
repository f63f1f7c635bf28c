"""Real processes that talk over gloo."""

import inspect
import multiprocessing
import pickle
import sys
import time
from pathlib import Path

import pytest
import torch

HERE = str(Path(__file__).parent)
SECONDS = 120
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    [
        *("pytest", "hypothesis", "torch", "torch._dynamo"),  # what a first step of training would load
        *(
            "dsv3.parallel.ranks",
            "dsv3.train.resume",
            "dsv3.train.step",
            "dsv3.plan.training",
            "dsv3.infer.ranks_runner",
        ),
    ]
)
"""Ranks are forks of one process that has loaded all this, or most of their time would go into loading it."""


def launch(function, *, folder, size, arguments):
    """Start a function on so many ranks, each with the same arguments; return the processes."""
    (folder / "arguments.pickle").write_bytes(pickle.dumps(arguments))
    where = (inspect.getfile(function), function.__name__, folder, size)
    sys.path.insert(0, HERE)  # a process looks where its parent did
    try:
        from rank_process import run_rank

        processes = [FORKS.Process(target=run_rank, args=(*where, rank)) for rank in range(size)]
        for process in processes:
            process.start()
    finally:
        sys.path.remove(HERE)
    return processes


def results_of(processes, *, folder):
    """Return what each rank has returned."""
    end = time.monotonic() + SECONDS
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
    said = [f"rank {rank}:\n{(folder / f'{rank}.log').read_text()}" for rank in range(len(processes))]
    assert all(process.exitcode == 0 for process in processes), "\n".join(said)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(len(processes))]


def end(processes):
    """Let none of them be left."""
    for process in processes:
        process.kill()
        process.join()


@pytest.fixture
def start_ranks(tmp_path):
    """Start a module's function on so many ranks, each with the same arguments; return the processes."""
    started = []

    def start(function, *, size, **arguments):
        folder = tmp_path / f"ranks-{len(started)}"
        folder.mkdir()
        processes = launch(function, folder=folder, size=size, arguments=arguments)
        started.append(processes)
        return folder, processes

    yield start
    for processes in started:
        end(processes)


@pytest.fixture
def on_ranks(start_ranks):
    """Call a function as `start_ranks` does, and return what each rank has returned."""

    def run(function, *, size, **arguments):
        folder, processes = start_ranks(function, size=size, **arguments)
        return results_of(processes, folder=folder)

    return run
