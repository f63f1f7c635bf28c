"""Where to compute, in which number type, on how many threads. Each choice is said in the log."""

import os
from pathlib import Path

import torch

from dsv3.errors import ConfigError
from dsv3.runtime.cores import available_cores
from dsv3.runtime.log import say_once

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


def choose_device(name: str) -> torch.device:
    """Return the device that `runtime.device` asks for; 'auto' is CUDA where there is one, else the CPU.

    Raises:
        ConfigError: no such device here, or no such kind of device at all.
    """
    if name == "auto":
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        say_once(f"device: {_describe(device)}")
        return device
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (":" in name and not (kind == "cuda" and index.isdecimal())):
        raise ConfigError(f"runtime.device = '{name}'; choose 'auto', 'cpu', 'cuda' or 'cuda:N'")
    if kind == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if int(index or 0) >= count:
            found = f"there are {count} CUDA devices here" if count else "there is no CUDA device here"
            raise ConfigError(f"runtime.device = '{name}', but {found}; 'auto' takes what there is")
    device = torch.device(name)
    say_once(f"device: {_describe(device)}")
    return device


def choose_dtype(name: str, *, device: torch.device) -> torch.dtype:
    """Return the compute type that `runtime.dtype` asks for; 'auto' is BF16 on CUDA and FP32 on a CPU.

    FP32 on a CPU because few of them multiply BF16 at speed, and the plain paths are then exact enough to compare.
    """
    if name == "auto":
        fast = device.type == "cuda" and torch.cuda.is_bf16_supported()
        say_once(f"compute type: {'bfloat16' if fast else 'float32'} (the default on this device)")
        return torch.bfloat16 if fast else torch.float32
    if name not in DTYPES:
        raise ConfigError(f"runtime.dtype = '{name}'; choose 'auto', {' or '.join(repr(known) for known in DTYPES)}")
    return DTYPES[name]


def set_threads(count: int) -> int:
    """Give torch `count` CPU threads, or with 0 one for each core this process may use; return how many.

    The cores of the machine are the wrong number inside a container or under taskset.
    """
    if count < 0:
        raise ConfigError(f"runtime.threads = {count}; use 0 for all cores, or a positive number")
    used = count or available_cores()
    torch.set_num_threads(used)
    return used


def available_memory(device: torch.device) -> int:
    """Return the bytes of a device's memory that new allocations may take without pushing others out."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):  # no Linux: half of all there is
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _describe(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
