"""One rank: python rank_process.py FILE FUNCTION FOLDER SIZE RANK."""

import pickle
import sys
from datetime import timedelta
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import torch
import torch.distributed as dist


def main() -> None:
    file, name, folder, size, rank = sys.argv[1:]
    spec = spec_from_file_location(Path(file).stem, file)
    module = module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group(
        "gloo", init_method=store, rank=int(rank), world_size=int(size), timeout=timedelta(seconds=60)
    )
    arguments = pickle.loads((Path(folder) / "arguments.pickle").read_bytes())
    torch.save(getattr(module, name)(**arguments), Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
