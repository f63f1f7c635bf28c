"""One system in one process of its own, told over stdin what to do and answering over stdout, a line of JSON each.

    python -m training_peers.worker SYSTEM MODE SIZE

{"threads": N} sets the number of threads and takes untimed steps, in which a compiled system compiles; it is answered
with {"num_trained", "first_loss"}. {"steps": N} takes so many steps and is answered with {"wall", "cpu", "idle_bytes",
"peak_bytes"}: seconds of each step, and resident memory after the imports and at its highest in these steps. Tokens are
random, new for each step and the same for every system; drawing them is not timed.
"""

import sys
import time
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from claims.answering import answer_orders
from torch import Tensor
from training_peers.sizes import SIZES, Size
from training_peers.system import System

MODULES = {
    "dsv3": "training_peers.ours",
    "transformers": "training_peers.transformers_model",
    "torchtitan": "training_peers.torchtitan_model",
    "sgemm": "training_peers.sgemm",
}
WARM_UP_STEPS = 2


def main() -> None:
    system_name, mode, size_name = sys.argv[1:]
    torch.manual_seed(0)
    size = SIZES[size_name]
    module = import_module(MODULES[system_name])
    idle = _memory("VmRSS")
    system: System = module.MODES[mode](size)
    batches = _random_rows(size)

    def answer(order: dict[str, Any]) -> dict[str, Any]:
        if "threads" in order:
            torch.set_num_threads(order["threads"])
            losses = [system.step(next(batches)) for _ in range(WARM_UP_STEPS)]
            return {"num_trained": system.num_trained, "first_loss": losses[0]}
        _reset_peak()
        measured = _measure(system, batches=batches, count=order["steps"])
        return measured | {"idle_bytes": idle, "peak_bytes": _memory("VmHWM")}

    answer_orders(answer)


def _measure(system: System, *, batches: Iterator[Tensor], count: int) -> dict[str, Any]:
    wall, cpu = [], []
    for _ in range(count):
        rows = next(batches)
        wall_before, cpu_before = time.perf_counter(), time.process_time()
        system.step(rows)
        wall.append(time.perf_counter() - wall_before)
        cpu.append(time.process_time() - cpu_before)
    return {"wall": wall, "cpu": cpu}


def _random_rows(size: Size) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(0)
    while True:
        shape = (size.rows, size.sequence_length + 1)
        yield torch.randint(size.model.vocab_size, shape, generator=generator)


def _memory(field: str) -> int:
    """Return a field of this process's memory status in bytes: VmRSS, resident now, or VmHWM, resident at most."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"/proc/self/status has no {field}")


def _reset_peak() -> None:
    """Let VmHWM start again from what is resident now, so that compiling does not count as training."""
    Path("/proc/self/clear_refs").write_text("5")


if __name__ == "__main__":
    main()
