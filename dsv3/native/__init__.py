"""C++ kernels of the training step for CPUs, beside the plain forms in the modules of `ops/`.

They serve FP32 tensors on a CPU, and are compiled on the machine that runs them when first needed, which takes
seconds and a C++ compiler. Everything else (FP64, BF16, CUDA, no compiler) takes the plain form. Pieces of work and
the order of every sum are fixed, so results do not depend on the number of threads.
"""

import ctypes
from collections.abc import Iterable
from functools import cache
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor, nn

from dsv3.config.run import CPU_KERNELS
from dsv3.errors import CompilerError, ConfigError
from dsv3.runtime.compiler import compiled_library, processor
from dsv3.runtime.log import say_once

_choice = "auto"
"""For the whole process, as torch keeps its number of threads; nothing else in the package hangs on it."""


def choose_cpu_kernels(choice: str) -> None:
    """Say which CPU kernels this process computes with: 'auto' (ours if they compile), 'native' or 'torch'.

    Raises:
        ConfigError: another choice, or 'native' where they do not compile.
    """
    global _choice
    if choice not in CPU_KERNELS:
        raise ConfigError(f"runtime.cpu_kernels = '{choice}'; choose one of {', '.join(map(repr, CPU_KERNELS))}")
    if choice == "native":
        try:
            _load()
        except CompilerError as error:
            raise ConfigError(f"runtime.cpu_kernels = 'native', but {error}; 'auto' takes torch's instead") from error
    _choice = choice


def usable(*tensors: Tensor) -> bool:
    """Whether our kernels serve these tensors: FP32, on the CPU, real memory behind them, and the kernels at hand."""
    plain = all(
        type(tensor) in (Tensor, nn.Parameter) and tensor.dtype == torch.float32 and tensor.device.type == "cpu"
        for tensor in tensors
    )
    return plain and choice_allows()


def choice_allows() -> bool:
    """Whether our kernels compute in this process at all."""
    return _choice != "torch" and not torch.compiler.is_compiling() and _load_or_say_why() is not None


@cache
def multiplies_faster() -> bool:
    """Whether our products of experts beat the library behind torch.mm: measured on AMD's, never on Intel's own."""
    return "AuthenticAMD" in processor()


def starts_of(counts: Iterable[int]) -> Tensor:
    """Return where each of several pieces that lie end to end begins, and at the end their sum, as kernels read it."""
    return torch.tensor([0, *accumulate(counts)])


def call(function: str, *arguments: Tensor | int | float | None) -> None:
    """Call a kernel: tensors go as the address of their first number, None as a null pointer.

    Strides are the caller's affair: a kernel knows only what it is told.
    """
    getattr(_load(), function)(*map(_as_c, arguments))


def _as_c(argument: Tensor | int | float | None) -> object:
    if isinstance(argument, Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    if isinstance(argument, int):
        return ctypes.c_int64(argument)
    return ctypes.c_float(argument) if argument is not None else ctypes.c_void_p(None)


@cache
def _load() -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(compiled_library("cpu", sources=sorted(Path(__file__).parent.glob("*.cpp")))))
    except OSError as error:
        raise CompilerError(f"the compiled kernels cannot be loaded: {error}") from error


@cache
def _load_or_say_why() -> ctypes.CDLL | None:
    try:
        library = _load()
    except CompilerError as error:
        say_once(f"CPU kernels: torch's, which are slower; ours were not compiled: {error}")
        return None
    say_once("CPU kernels: ours, compiled for this processor")
    return library
