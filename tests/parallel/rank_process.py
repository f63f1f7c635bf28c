"""One rank: what runs in its process."""

import os
import pickle
import sys
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from types import ModuleType

import torch
import torch.distributed as dist


def run_rank(file: str, name: str, folder: Path, size: int, rank: int) -> None:
    """Call a function of a module, and leave in the folder what it returns (RANK.pt) and what was said (RANK.log)."""
    log = os.open(folder / f"{rank}.log", os.O_CREAT | os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(log, stream)
    package = ModuleType("ranks")  # so that one test module may import from another beside it
    package.__path__ = [str(Path(file).parent)]
    sys.modules["ranks"] = package
    module = import_module(f"ranks.{Path(file).stem}")
    torch.set_num_threads(1)
    if size > 1:
        store = f"file://{folder}/store"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size, timeout=timedelta(seconds=60))
        dist.barrier()  # who ends before all have connected breaks the joining of the others
    arguments = pickle.loads((folder / "arguments.pickle").read_bytes())
    torch.save(getattr(module, name)(**arguments), folder / f"{rank}.pt")
    if size > 1:
        dist.destroy_process_group()
