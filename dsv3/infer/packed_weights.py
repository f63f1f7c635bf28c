"""Weights laid out for the engine's C++, in the format they are kept in memory.

    fp32   as they are                            bf16   rounded to BF16
    fp8    E4M3 in blocks of 128 x 128, byte for byte as published; else rounded to it (report 3.3)
    int8   a scale for each output and 128 inputs  int4   a scale for each output and 64 inputs

Products with fp32, bf16 and fp8 are FP32 sums of exact products; those with int8 and int4 round activations to 8 bits
in tiles of 1 x 128, as the report's FP8 recipe does, and sum in integers. What the formats leave alone: router, norms
and embedding in all; output head and eh_proj are BF16 beside fp8, as published, and int8 beside int4. The two halves of
kv_b_proj stay in FP32 beside fp8: transposed, as absorbed attention reads one, its blocks would be cut.
"""

import ctypes
from dataclasses import dataclass
from enum import IntEnum

import torch
from jaxtyping import Float
from torch import Tensor

from dsv3.errors import CheckpointError, ConfigError
from dsv3.fp8.formats import is_fp8
from dsv3.fp8.quantise import BLOCKS, Quantised, dequantise
from dsv3.model.precision import quantise_weight
from dsv3.native import engine

FORMATS = ("fp32", "bf16", "fp8", "int8", "int4")
"""What `--weights` may ask for, besides 'auto'."""


class Storage(IntEnum):
    """One matrix's format; the numbers are those of packed.h."""

    FP32 = 0
    BF16 = 1
    FP8 = 2
    INT8 = 3
    INT4 = 4


@dataclass(frozen=True, kw_only=True)
class Formats:
    """Which storage each kind of matrix gets."""

    layers: Storage
    up_projections: Storage
    """The halves of kv_b_proj."""
    head: Storage
    """Output head and eh_proj."""


BY_NAME = {
    "fp32": Formats(layers=Storage.FP32, up_projections=Storage.FP32, head=Storage.FP32),
    "bf16": Formats(layers=Storage.BF16, up_projections=Storage.BF16, head=Storage.BF16),
    "fp8": Formats(layers=Storage.FP8, up_projections=Storage.FP32, head=Storage.BF16),
    "int8": Formats(layers=Storage.INT8, up_projections=Storage.INT8, head=Storage.INT8),
    "int4": Formats(layers=Storage.INT4, up_projections=Storage.INT8, head=Storage.INT8),
}


def formats_named(name: str) -> Formats:
    """Return what a format means for each kind of matrix.

    Raises:
        ConfigError: there is no such format.
    """
    if name not in BY_NAME:
        raise ConfigError(f"weights = {name!r}; choose one of {', '.join(map(repr, FORMATS))}")
    return BY_NAME[name]


def panel_columns() -> int:
    """Return how many outputs one panel has here: twice the floats of a vector register."""
    return int(engine.library().panel_columns())


class PackedMatrix:
    """`groups` matrices of equal shape, each made of parts one above the other; every part starts at a panel."""

    def __init__(self, storage: Storage, *, part_columns: tuple[int, ...], depth: int, groups: int = 1) -> None:
        panel = panel_columns()
        self._firsts = [0]
        for columns in part_columns:
            self._firsts.append(self._firsts[-1] + -(-columns // panel))
        self._part_columns = part_columns
        self.record = engine.Matrix(
            format=int(storage), groups=groups, columns=self._firsts[-2] * panel + part_columns[-1], depth=depth
        )
        library = engine.library()
        self._data = torch.empty(library.matrix_bytes(ctypes.byref(self.record)), dtype=torch.uint8)
        self._scales = torch.empty(library.matrix_scales(ctypes.byref(self.record)), dtype=torch.float32)
        library.in_large_pages(engine.address(self._data), ctypes.c_int64(self._data.nbytes))
        self.record.data, self.record.scales = self._data.data_ptr(), self._scales.data_ptr()
        self._unfilled = groups * len(part_columns)

    @property
    def columns(self) -> int:
        """Outputs, those that pad a part to whole panels counted in."""
        return int(self.record.columns)

    @property
    def num_bytes(self) -> int:
        """Memory taken, scales included."""
        return self._data.nbytes + self._scales.nbytes

    @property
    def is_filled(self) -> bool:
        """Whether every part of every group has its numbers."""
        return self._unfilled == 0

    def fill(self, weight: Tensor | Quantised, *, name: str, part: int = 0, group: int = 0) -> None:
        """Take the numbers of one part, out x in, rounded to this format.

        Raises:
            CheckpointError: they are to be kept in FP8 and are not all finite.
        """
        columns, first = self._part_columns[part], self._firsts[part]
        if self.record.format == Storage.FP8:
            self._fill_fp8(weight, name=name, group=group, first=first, columns=columns)
        else:
            wide = dequantise(weight) if isinstance(weight, Quantised) else weight
            wide = wide if wide.dtype in (torch.float32, torch.bfloat16) else wide.float()
            wide = wide if wide.stride(1) == 1 else wide.contiguous()
            engine.library().pack_matrix(
                ctypes.byref(self.record),
                ctypes.c_int64(group),
                ctypes.c_int64(first),
                engine.address(wide),
                ctypes.c_int64(wide.dtype == torch.bfloat16),
                ctypes.c_int64(wide.stride(0)),
                ctypes.c_int64(columns),
            )
        self._unfilled -= 1

    def _fill_fp8(self, weight: Tensor | Quantised, *, name: str, group: int, first: int, columns: int) -> None:
        if not isinstance(weight, Quantised):
            weight = quantise_weight(weight.float(), parts=1, form=BLOCKS)[0]
        elif weight.tile != BLOCKS.tile:
            weight = quantise_weight(dequantise(weight), parts=1, form=BLOCKS)[0]
        assert is_fp8(weight.values)
        values, scales = weight.values.contiguous(), weight.scales.float().contiguous()
        not_numbers = engine.library().pack_fp8(
            ctypes.byref(self.record),
            ctypes.c_int64(group),
            ctypes.c_int64(first),
            engine.address(values),
            ctypes.c_int64(values.stride(0)),
            engine.address(scales),
            ctypes.c_int64(columns),
        )
        if not_numbers:
            raise CheckpointError(f"{name} has {not_numbers:,} weights that are no numbers (NaN); copy it again")

    def __call__(self, x: Float[Tensor, "row in"]) -> Float[Tensor, "row out"]:
        """Return `x @ weight.T` for a matrix without groups."""
        panel = panel_columns()
        output = x.new_empty(x.shape[0], -(-self.columns // panel) * panel)
        engine.library().packed_linear(
            ctypes.byref(self.record),
            ctypes.c_int64(0),
            engine.address(x),
            ctypes.c_int64(x.stride(0)),
            ctypes.c_int64(x.shape[0]),
            engine.address(output),
            ctypes.c_int64(output.stride(0)),
        )
        return output[:, : self.columns]
