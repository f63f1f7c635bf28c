"""Triton kernels run here without a GPU, in Triton's interpreter.

Whether a kernel is interpreted is decided when it is defined, for Triton's own functions when Triton is first imported.
So that happens here, before any test has imported it.
"""

import os
from collections.abc import Iterator
from types import ModuleType

import numpy as np
import pytest
import torch

os.environ["TRITON_INTERPRET"] = "1"
try:
    import triton.language
    from triton.runtime import interpreter
except ImportError:
    interpreter = None


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Lend Triton's interpreter torch's conversions.

    Its own (3.7 to 3.9) do not round to FP8 and BF16 as a GPU does, and read E4M3's NaN as 480. For FP8 a GPU
    has one instruction for each direction; test_triton_compile.py sees to it that these are what kernels become.
    """
    if interpreter is None:
        pytest.skip("needs Triton")
    if not isinstance(triton.language.standard.max, interpreter.InterpretedFunction):
        pytest.skip("Triton was imported before TRITON_INTERPRET was set")
    language = triton.language
    types = {
        language.float8e4nv: (torch.float8_e4m3fn, torch.uint8),
        language.float8e5: (torch.float8_e5m2, torch.uint8),
        language.float16: (torch.float16, torch.int16),
        language.bfloat16: (torch.bfloat16, torch.int16),
        language.float32: (torch.float32, torch.int32),
    }
    own = interpreter._convert_float

    def convert(data: np.ndarray, source: object, target: object, rounding: object) -> np.ndarray:
        if source not in types or target not in types:
            return own(data, source, target, rounding)
        bits = torch.from_numpy(np.ascontiguousarray(data)).view(types[source][0]).to(types[target][0])
        return bits.view(types[target][1]).numpy().view(f"uint{8 * bits.itemsize}")

    monkeypatch.setattr(interpreter, "_convert_float", convert)
    with np.errstate(all="ignore"):  # numpy warns where tiles hold NaN and infinities
        yield


@pytest.fixture
def launch(interpreted: None) -> ModuleType:
    """dsv3/fp8/triton_launch.py, whose kernels are interpreted."""
    from dsv3.fp8 import triton_launch

    return triton_launch


@pytest.fixture
def same_bits():
    """Whether two tensors hold the same numbers, signs of zeros included; one NaN is as good as another."""

    def compare(a: torch.Tensor, b: torch.Tensor) -> bool:
        a, b = a.to(torch.float32), b.to(torch.float32)
        either_nan = a.isnan() | b.isnan()
        same = torch.equal(a.isnan(), b.isnan())
        return same and torch.equal(*(x.masked_fill(either_nan, 0).view(torch.int32) for x in (a, b)))

    return compare


@pytest.fixture
def hard_numbers():
    """Matrices with tiles of every size, and in the first rows all that could go wrong in a tile."""

    def make(rows: int, columns: int, *, seed: int = 0) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(rows, columns, generator=generator)
        exponents = torch.randint(-40, 40, (rows, -(-columns // 128)), generator=generator)
        x *= torch.exp2(exponents.float()).repeat_interleave(128, dim=1)[:, :columns]
        strange = [0.0, -0.0, 1e-45, -1e-40, 2.0**-120, 3.3e38, float("nan"), float("inf"), -float("inf"), 448.0]
        for index, number in enumerate(strange):
            x[index % rows, 7 * index % columns] = number
        if rows > 12:
            x[10], x[11], x[12] = 0.0, x[11] * 1e-38 * 2.0**-20, -0.0
        return x

    return make
