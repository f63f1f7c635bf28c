"""Compiles what triton_launch.py would start on an H100 at the shapes of V3, without a GPU, and prints what came of it.

One line of JSON: for each kernel what it spills, the size of its code and its instructions. A process of its own, since
in that of the tests kernels are interpreted.
"""

import json
import re
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from dsv3.fp8 import triton_launch
from dsv3.fp8.gpu import as_operand
from dsv3.fp8.quantise import BLOCKS, TILES, Quantised
from dsv3.ops import on_gpu

NAMES = {
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.float8_e5m2: "*fp8e5",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.uint8: "*u8",
}
HOPPER = 90
TOKENS, HIDDEN, WIDTH, LATENT = 4096, 7168, 2048, 576
INSTRUCTIONS = (
    r"\b(?:wgmma\.mma_async|cp\.async\.bulk|cvt\.rn[\w.]*e[45]m[23]|cp\.async\.c[ag]|div\.(?:rn|full|approx))[\w.:]*"
)


def numbers(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def tiles(rows: int, columns: int, *, dtype: torch.dtype = torch.float8_e4m3fn) -> Quantised:
    scales = numbers(-(-columns // 128), rows, dtype=torch.float32).mT
    return Quantised(values=numbers(rows, columns, dtype=dtype), scales=scales, tile=(1, 128))


def blocks(matrices: int, rows: int, columns: int) -> Quantised:
    scales = numbers(matrices, -(-rows // 128), -(-columns // 128), dtype=torch.float32)
    values = numbers(matrices, rows, columns, dtype=torch.float8_e4m3fn)
    return Quantised(values=values, scales=scales, tile=(128, 128))


def product(rows: Quantised, weight: Quantised, groups: tuple[int, ...], dtype: torch.dtype = torch.float32) -> None:
    triton_launch.multiply(as_operand(rows), weight=as_operand(weight), rows_per_group=groups, dtype=dtype)


def gradients(groups: tuple[int, ...]) -> None:
    over = {"form": TILES, "rows_per_group": groups}
    slopes, rows = (triton_launch.quantise_over_tokens(numbers(TOKENS, n), **over) for n in (2 * WIDTH, HIDDEN))
    triton_launch.weight_gradients(slopes, rows=rows)


def between_products(dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """What ops/on_gpu.py starts."""

    def of(*shape: int) -> Tensor:
        return numbers(*shape, dtype=dtype)

    wide = {name: numbers(1 << 20, dtype=torch.float32) for name in ("gradient", "first_moment", "second_moment")}
    row = numbers(TOKENS, dtype=torch.float32)
    heads, nope, rope, value = 128, 128, 64, 128
    angles = numbers(TOKENS, rope // 2, dtype=torch.float32)
    query, key_value = of(TOKENS, heads, nope + rope), of(TOKENS, heads, nope + value)
    both, gate_up = of(TOKENS, 2 * WIDTH), of(TOKENS, 2 * WIDTH)
    parts = {"gate": gate_up[:, :WIDTH], "up": gate_up[:, WIDTH:], "factors": row}
    return {
        "rms_norm forward": lambda: on_gpu.rms_norm_forward(of(TOKENS, HIDDEN), weight=of(HIDDEN), eps=1e-6),
        "rms_norm backward": lambda: on_gpu.rms_norm_backward(
            of(TOKENS, HIDDEN), x=of(TOKENS, HIDDEN), weight=of(HIDDEN), inverse=row
        ),
        "swiglu forward": lambda: on_gpu.swiglu_forward(**parts),
        "swiglu backward": lambda: on_gpu.swiglu_backward(
            of(TOKENS, WIDTH), **parts, of_gate=both[:, :WIDTH], of_up=both[:, WIDTH:], of_factors=row
        ),
        "sum rows": lambda: on_gpu.sum_rows(
            of(8 * TOKENS, HIDDEN), origin=numbers(TOKENS, 8, dtype=torch.int64)
        ),
        "attention inputs": lambda: on_gpu.attention_inputs(query, key_value, of(TOKENS, rope), angles, angles),
        "attention inputs backward": lambda: on_gpu.attention_inputs_backward(
            query, of_key=query, of_value=of(TOKENS, heads, value), cos=angles, sin=angles
        ),
        "cross-entropy": lambda: on_gpu.cross_entropy_rows(
            of(TOKENS, 129_280), targets=numbers(TOKENS, dtype=torch.int64), coefficients=row, wants_slopes=True
        ),
        "adamw": lambda: on_gpu.adamw(
            wide["gradient"], **wide, scale=0.5, rate=1e-3, beta1=0.9, beta2=0.95, steps=3, epsilon=1e-8,
            weight_decay=0.1,
        ),
    }  # fmt: skip


CASES_BETWEEN = {
    f"{name}, {kind}": case
    for kind, dtype in (("BF16", torch.bfloat16), ("FP32", torch.float32))
    for name, case in between_products(dtype).items()
}
GROUPS = (1000, 0, 1500, 1596)
E5M2 = torch.float8_e5m2
CASES: dict[str, Callable[[], object]] = {
    "quantise rows": lambda: triton_launch.quantise_rows(numbers(TOKENS, HIDDEN), form=TILES),
    "quantise swiglu": lambda: triton_launch.quantise_swiglu(
        numbers(TOKENS, 2 * WIDTH), factors=numbers(TOKENS, dtype=torch.float32), form=TILES
    ),
    "quantise blocks": lambda: triton_launch.quantise_blocks(
        numbers(4, 2 * WIDTH, HIDDEN, dtype=torch.float32), form=BLOCKS
    ),
    "quantise over tokens": lambda: triton_launch.quantise_over_tokens(
        numbers(TOKENS, HIDDEN), form=TILES, rows_per_group=GROUPS
    ),
    "requantise over tokens": lambda: triton_launch.quantise_over_tokens(
        tiles(TOKENS, HIDDEN), form=TILES, rows_per_group=GROUPS
    ),
    "dequantise": lambda: triton_launch.dequantise(tiles(TOKENS, HIDDEN)),
    "quantise e5m6": lambda: triton_launch.quantise_e5m6(numbers(TOKENS, HIDDEN)),
    "dequantise e5m6": lambda: triton_launch.dequantise_e5m6(triton_launch.quantise_e5m6(numbers(TOKENS, HIDDEN))),
    "product of experts": lambda: product(tiles(TOKENS, HIDDEN), blocks(4, 2 * WIDTH, HIDDEN), GROUPS, torch.bfloat16),
    "product of few rows, ragged depth": lambda: product(tiles(8, LATENT), blocks(1, HIDDEN, LATENT), (8,)),
    "product of tiles": lambda: product(
        tiles(TOKENS, HIDDEN),
        Quantised(values=tiles(WIDTH, HIDDEN).values[None], scales=tiles(WIDTH, HIDDEN).scales[None], tile=(1, 128)),
        (TOKENS,),
    ),
    "product of e5m2 gradients": lambda: product(
        tiles(TOKENS, HIDDEN, dtype=E5M2), blocks(1, 2 * WIDTH, HIDDEN), (TOKENS,)
    ),
    "weight gradients": lambda: gradients(GROUPS),
    **CASES_BETWEEN,
    "turn": lambda: triton_launch.turn(numbers(4, HIDDEN, 2 * WIDTH, dtype=torch.float8_e4m3fn).mT),
}


def last_start(case: Callable[[], object]) -> tuple[object, tuple[object, ...], dict[str, object]]:
    """Return kernel, arguments and settings of the last kernel that a case starts."""
    starts = []
    for module in (triton_launch, on_gpu):
        module.start_kernel = lambda kernel, grid, *arguments, **settings: starts.append((kernel, arguments, settings))
    case()
    return starts[-1]


def compiled(kernel, arguments, settings):
    """Compile as Triton would at a start: integers of 1 are constants, pointers and multiples of 16 are marked."""
    signature, constants, aligned = {}, {}, {}
    named = dict(zip(kernel.arg_names, arguments, strict=False))
    named |= {name: settings.pop(name) for name in list(settings) if name in kernel.arg_names}
    for index, parameter in enumerate(kernel.params):
        value = named[parameter.name]
        if isinstance(value, Tensor):
            signature[parameter.name], aligned[(index,)] = NAMES[value.dtype], [["tt.divisibility", 16]]
        elif isinstance(value, TensorDescriptor):
            signature[parameter.name] = f"tensordesc<{NAMES[value.base.dtype][1:]}{value.block_shape}>"
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        elif parameter.is_constexpr or value == 1:
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        else:
            signature[parameter.name] = "i32"
            if value % 16 == 0:
                aligned[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    options = {**settings, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", HOPPER, 32), options=options)


def spilled(ptx: str) -> int:
    """Return the bytes that a kernel writes out of registers and reads back."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.ptx"
        file.write_text(ptx)
        command = [get_ptxas(HOPPER).path, "-v", "--gpu-name=sm_90a", str(file), "-o", str(file.with_suffix(".o"))]
        run = subprocess.run(command, capture_output=True, text=True, check=True)
    found = re.findall(r"(\d+) bytes spill (?:stores|loads)", run.stderr)
    assert len(found) == 2, run.stderr
    return sum(map(int, found))


def main() -> None:
    report = {}
    for name, case in CASES.items():
        result = compiled(*last_start(case))
        ptx = result.asm["ptx"]
        report[name] = {
            "cubin": len(result.asm["cubin"]),
            "spilled": spilled(ptx),
            "instructions": sorted(set(re.findall(INSTRUCTIONS, ptx))),
        }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
