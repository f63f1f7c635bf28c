"""Real processes that talk over gloo."""

import inspect
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

RANK = Path(__file__).with_name("rank_process.py")
SECONDS = 120


def launch(function, *, folder, size, arguments):
    """Start a function on so many ranks, each with the same arguments; return the processes."""
    (folder / "arguments.pickle").write_bytes(pickle.dumps(arguments))
    command = [sys.executable, str(RANK), inspect.getfile(function), function.__name__, str(folder), str(size)]
    return [
        subprocess.Popen([*command, str(rank)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for rank in range(size)
    ]


def results_of(processes, *, folder):
    """Return what each rank has returned."""
    said = [process.communicate(timeout=SECONDS)[0] for process in processes]
    broken = {
        rank: text for rank, (process, text) in enumerate(zip(processes, said, strict=True)) if process.returncode
    }
    assert not broken, "\n".join(f"rank {rank}:\n{text}" for rank, text in broken.items())
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(len(processes))]


def end(processes):
    """Let none of them be left."""
    for process in processes:
        process.kill()
        process.communicate()


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
