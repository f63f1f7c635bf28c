"""One system in one process of its own, told over stdin what to do and answering over stdout, a line of JSON each.

    OMP_NUM_THREADS=N python -m inference_peers.worker SYSTEM MODE FOLDER

{"task": NAME} has the task done once and is answered with {"wall", "cpu"}: seconds of what it times. The first of a
task should not be counted.
"""

import os
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from claims.answering import answer_orders
from inference_peers.system import System
from inference_peers.tasks import TASKS

MODULES = {
    "dsv3": "inference_peers.ours",
    "llama.cpp": "inference_peers.llama_system",
    "transformers": "inference_peers.transformers_system",
    "memory": "inference_peers.memory",
}


def main() -> None:
    system_name, mode, work = sys.argv[1:]
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    system: System = import_module(MODULES[system_name]).MODES[mode](Path(work))

    def answer(order: dict[str, Any]) -> dict[str, Any]:
        task = TASKS[order["task"]]
        system.ready(task)
        wall, cpu = time.perf_counter(), time.process_time()
        system.go(task)
        return {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}

    answer_orders(answer)


if __name__ == "__main__":
    main()
