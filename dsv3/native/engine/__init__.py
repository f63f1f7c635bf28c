"""The engine's C++: weights laid out in panels, products with them, and a pass of tokens through all layers.

A library of its own, compiled when an engine first computes on a CPU. The records here are those of packed.h and
decoder.cpp, field by field.
"""

import ctypes
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import ClassVar

from torch import Tensor

from dsv3.errors import CompilerError
from dsv3.runtime.compiler import FLAGS, compiled_library
from dsv3.runtime.log import say_once

_NUMBER, _REAL, _ADDRESS = ctypes.c_int64, ctypes.c_float, ctypes.c_void_p


class Matrix(ctypes.Structure):
    """`groups` matrices of `columns` x `depth`, in panels."""

    _fields_: ClassVar[list[tuple[str, type]]] = [
        ("data", _ADDRESS),
        ("scales", _ADDRESS),
        ("format", _NUMBER),
        ("groups", _NUMBER),
        ("columns", _NUMBER),
        ("depth", _NUMBER),
    ]


class Layer(ctypes.Structure):
    """The weights of one layer."""

    _fields_: ClassVar[list[tuple[str, type]]] = [
        *((name, _ADDRESS) for name in ("input_norm", "query_norm", "latent_norm", "post_norm")),
        *((name, Matrix) for name in ("down", "query", "key_up", "value_up", "output", "router")),
        ("router_bias", _ADDRESS),
        *((name, Matrix) for name in ("gate_up", "experts_down", "shared_gate_up", "shared_down")),
        ("is_moe", _NUMBER),
    ]


class Model(ctypes.Structure):
    """Sizes and settings that all layers share, and where the layers are."""

    _fields_: ClassVar[list[tuple[str, type]]] = [
        *((name, _NUMBER) for name in ("hidden", "heads", "query_latent", "latent", "nope", "rope", "value")),
        *((name, _NUMBER) for name in ("experts", "chosen", "expert_groups", "groups_kept")),
        *((name, _NUMBER) for name in ("expert_width", "shared_width", "dense_width")),
        *((name, _NUMBER) for name in ("group_score", "softmax_scores", "normalise_gates")),
        *((name, _REAL) for name in ("gate_scale", "epsilon", "softmax_scale")),
        ("layers", _ADDRESS),
    ]


class Pass(ctypes.Structure):
    """The tokens of one pass, where they read and write."""

    _fields_: ClassVar[list[tuple[str, type]]] = [
        *((name, _NUMBER) for name in ("first_layer", "end_layer", "tokens", "sequences")),
        *((name, _ADDRESS) for name in ("hidden", "normed", "last_norm", "cos", "sin")),
        *((name, _ADDRESS) for name in ("positions", "starts", "page_starts", "pages", "cache")),
        ("num_pages", _NUMBER),
        ("page_tokens", _NUMBER),
        ("experts", _ADDRESS),
    ]


def open_library(*, flags: Sequence[str] = FLAGS) -> ctypes.CDLL:
    """Compile the library, unless it was before, and return it; its functions take addresses.

    Raises:
        CompilerError: it cannot be compiled, or not be loaded.
    """
    folder = Path(__file__).parent
    headers = [folder.parent / "vector.h"]
    path = compiled_library("engine", sources=sorted(folder.glob("*.cpp")), headers=headers, flags=flags)
    try:
        opened = ctypes.CDLL(str(path))
    except OSError as error:
        raise CompilerError(f"the engine's compiled library cannot be loaded: {error}") from error
    for name in ("matrix_bytes", "matrix_scales", "panel_columns", "pack_fp8"):
        getattr(opened, name).restype = _NUMBER
    opened.engine_new.restype = _ADDRESS
    opened.engine_delete.argtypes = [_ADDRESS]
    return opened


@cache
def library() -> ctypes.CDLL:
    """Return the library for this processor, opened once."""
    return open_library()


@cache
def available() -> bool:
    """Whether the library is there or can be made; if not, the log says why, once."""
    try:
        library()
    except CompilerError as error:
        say_once(f"engine: torch's kernels, which are slower; ours were not compiled: {error}")
        return False
    return True


def address(tensor: Tensor) -> ctypes.c_void_p:
    """Return where a tensor's numbers begin. Strides, and keeping it alive, are the caller's affair."""
    return ctypes.c_void_p(tensor.data_ptr())
