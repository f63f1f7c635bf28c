"""Which implementation of FP8 arithmetic serves a device; said in the log."""

import torch

from dsv3 import native
from dsv3.fp8.cpu import CpuKernels
from dsv3.fp8.kernels import Kernels, PlainKernels
from dsv3.runtime.log import say_once


def kernels_for(device: torch.device) -> Kernels:
    """Return the fastest implementation for tensors on a device; the plain one where there is none."""
    kernels: Kernels = PlainKernels()
    if device.type == "cpu" and native.choice_allows():
        kernels = CpuKernels()
    elif device.type == "cuda":
        from dsv3.fp8.gpu import GpuKernels

        kernels = GpuKernels()
    say_once(f"FP8 arithmetic on {device.type}: {kernels.name}")
    return kernels
