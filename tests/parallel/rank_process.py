"""One rank: python rank_process.py FILE FUNCTION FOLDER SIZE RANK."""

import pickle
import sys
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from types import ModuleType

import torch
import torch.distributed as dist


def main() -> None:
    file, name, folder, size, rank = sys.argv[1:]
    package = ModuleType("ranks")  # so that one test module may import from another beside it
    package.__path__ = [str(Path(file).parent)]
    sys.modules["ranks"] = package
    module = import_module(f"ranks.{Path(file).stem}")
    torch.set_num_threads(1)
    if int(size) > 1:
        store = f"file://{folder}/store"
        dist.init_process_group(
            "gloo", init_method=store, rank=int(rank), world_size=int(size), timeout=timedelta(seconds=60)
        )
    arguments = pickle.loads((Path(folder) / "arguments.pickle").read_bytes())
    torch.save(getattr(module, name)(**arguments), Path(folder) / f"{rank}.pt")
    if int(size) > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
