"""Claim: on an H100, products in FP8 are faster than in BF16, and quantising keeps up with the memory.

For whoever has the card. We have never run this on a GPU, having none: the kernels were interpreted on a CPU against
the plain forms, and compiled for Hopper, but their speed is unknown to us. Targets are what we would call a success.

Products are those of V3's layers: one micro-batch of 4,096 tokens through attention and dense layers, and the rows of
one GPU's experts. Ours is the product alone, from operands that are quantised already, with FP32 output; the peer is
torch.mm or torch's grouped_mm in BF16. Casts are compared with a copy that moves as many bytes. Times are medians, with
the cache emptied before each run. A claim is made of the shape that does worst.

Before anything is timed, every quantising kernel is held to the plain form bit for bit, and every product to FP64.
Without a GPU there is nothing to do: it says so and records nothing.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from claims.record import Claim, arguments, report
from rich.console import Console
from rich.table import Table
from torch import Tensor

from dsv3.fp8.e5m6 import dequantise_e5m6
from dsv3.fp8.kernels import PlainKernels
from dsv3.fp8.quantise import BLOCKS, TILES, Quantised, dequantise

HIDDEN, WIDTH = 7168, 2048
# (in, out): query down and up, key-value down and up, output, dense gate or up and down.
LINEARS = {
    "q_a": (HIDDEN, 1536),
    "q_b": (1536, 24_576),
    "kv_a": (HIDDEN, 576),
    "kv_b": (512, 32_768),
    "o": (16_384, HIDDEN),
    "dense up": (HIDDEN, 18_432),
    "dense down": (18_432, HIDDEN),
}
EXPERTS = {"gate_up": (HIDDEN, 2 * WIDTH), "down": (WIDTH, HIDDEN)}
PLAIN = PlainKernels()
BIT_FORMS = (TILES, replace(TILES, power_of_two=True), replace(TILES, dtype=torch.float8_e5m2))


@dataclass(frozen=True, kw_only=True)
class Row:
    """One kernel at one shape, beside its peer."""

    kind: str
    shape: str
    ours: float
    peer: float
    error: float | None = None
    """Largest error of the product of the quantised numbers, over the largest result."""
    whole_error: float | None = None
    """The same of the product of the numbers before they were quantised: root mean square over root mean square."""
    bf16_error: float | None = None
    """That of the peer."""


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What everything is measured with."""

    kernels: Any
    device: torch.device
    tokens: int
    rows_per_expert: tuple[int, ...]
    seconds_of: Callable[[Callable[[], object]], float]

    def random(self, *shape: int, seed: int = 0) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(shape, generator=generator, device=self.device).to(torch.bfloat16)


def main() -> None:
    options = arguments(__doc__)
    why_not = why_no_gpu()
    if why_not is not None:
        print(f"fp8_gpu: nothing measured, {why_not}. It needs one NVIDIA GPU of compute capability 9.0 (H100, H200).")
        return
    from triton.testing import do_bench

    from dsv3.fp8.gpu import GpuKernels

    milliseconds = 20 if options.quick else 200
    bench = Bench(
        kernels=GpuKernels(),
        device=torch.device("cuda"),
        tokens=4096,
        rows_per_expert=(2000, 2400, 1800, 1992),
        seconds_of=lambda run: do_bench(run, warmup=milliseconds // 4, rep=milliseconds, return_mode="median") / 1e3,
    )
    console = Console(width=160)
    console.print(f"{torch.cuda.get_device_name()}; FP8 by {bench.kernels.name}")
    differing = bits_that_differ(bench)
    console.print(f"numbers that differ from the plain form: {differing}")
    if any(differing.values()):
        sys.exit("quantising does not agree with the plain form on this GPU; nothing is timed")
    rows = [*products(bench, quick=options.quick), *products_of_experts(bench), *casts(bench)]
    show(rows, console=console)
    name = torch.cuda.get_device_name()
    details = {"machine": name, "rows": [row.__dict__ for row in rows], "kernels": bench.kernels.name}
    report(claims_of(rows), title=f"FP8 on {name}", json_file=options.json, details=details)


def why_no_gpu() -> str | None:
    if not torch.cuda.is_available():
        return "there is no CUDA device here"
    major, minor = torch.cuda.get_device_capability()
    return None if major == 9 else f"{torch.cuda.get_device_name()} has compute capability {major}.{minor}"


def bits_that_differ(bench: Bench) -> dict[str, int]:
    """Count the numbers of each quantising kernel that are not those of the plain form on the same device."""
    x = bench.random(1000, 1000).float() * torch.exp2(bench.random(1000, 1).float() * 20)
    x[0, :200], x[1, 300], x[2, 5] = 0.0, float("nan"), float("inf")
    groups = (300, 0, 1, 699)
    counts = {"1x128": 0, "128x128": 0, "128x1": 0, "128x1 of 1x128": 0, "E5M6": 0}
    for form in BIT_FORMS:
        blocks = replace(form, tile=BLOCKS.tile)
        over = {"form": form, "rows_per_group": groups}
        ours, plain = [kernels.quantise(x, form=form) for kernels in (bench.kernels, PLAIN)]
        counts["1x128"] += unequal(ours, plain)
        counts["128x128"] += unequal(*(kernels.quantise(x[None], form=blocks) for kernels in (bench.kernels, PLAIN)))
        pairs = {
            "128x1": [kernels.quantise_over_tokens(x, **over) for kernels in (bench.kernels, PLAIN)],
            "128x1 of 1x128": [kernels.requantise_over_tokens(plain, **over) for kernels in (bench.kernels, PLAIN)],
        }
        for name, (made, expected) in pairs.items():
            counts[name] += sum(unequal(made.group(g), expected.group(g)) for g in range(len(groups)))
    packed = [kernels.quantise_e5m6(x) for kernels in (bench.kernels, PLAIN)]
    counts["E5M6"] = different(*(dequantise_e5m6(one) for one in packed))
    counts["E5M6"] += different(*(kernels.dequantise_e5m6(packed[1]) for kernels in (bench.kernels, PLAIN)))
    return counts


def unequal(a: Quantised, b: Quantised) -> int:
    return different(a.values.float(), b.values.float()) + different(a.scales, b.scales)


def different(a: Tensor, b: Tensor) -> int:
    return int(((a != b) & ~(a.isnan() & b.isnan())).sum())


def products(bench: Bench, *, quick: bool) -> list[Row]:
    """Time Fprop, Dgrad and Wgrad of the layers that every token goes through."""
    rows = []
    for name, (ins, outs) in list(LINEARS.items())[: 3 if quick else None]:
        x, slope, weight = bench.random(bench.tokens, ins), bench.random(bench.tokens, outs, seed=1), bench.random(
            outs, ins, seed=2
        )  # fmt: skip
        rows += three_products(
            bench,
            name,
            x=x,
            slope=slope,
            weight=weight[None],
            groups=(bench.tokens,),
            peers={
                "Fprop": lambda x=x, weight=weight: x @ weight.T,
                "Dgrad": lambda slope=slope, weight=weight: slope @ weight,
                "Wgrad": lambda x=x, slope=slope: (slope.T @ x)[None],
            },
        )
    return rows


def products_of_experts(bench: Bench) -> list[Row]:
    """Time the same of the experts, in groups of unequal size."""
    groups = bench.rows_per_expert
    ends = torch.tensor(list(accumulate(groups)), dtype=torch.int32, device=bench.device)
    rows = []
    for name, (ins, outs) in EXPERTS.items():
        x, slope = bench.random(sum(groups), ins), bench.random(sum(groups), outs, seed=1)
        weight = bench.random(len(groups), outs, ins, seed=2)
        rows += three_products(
            bench,
            f"experts {name}",
            x=x,
            slope=slope,
            weight=weight,
            groups=groups,
            peers={
                "Fprop": lambda x=x, weight=weight: F.grouped_mm(x, weight.mT, offs=ends),
                "Dgrad": lambda slope=slope, weight=weight: F.grouped_mm(slope, weight, offs=ends),
                "Wgrad": lambda x=x, slope=slope: F.grouped_mm(slope.T, x, offs=ends),
            },
        )
    return rows


def three_products(
    bench: Bench,
    name: str,
    *,
    x: Tensor,
    slope: Tensor,
    weight: Tensor,
    groups: Sequence[int],
    peers: dict[str, Callable[[], Tensor]],
) -> list[Row]:
    """Time and check the products of a Linear, or of several experts, from quantised operands."""
    kernels, common = bench.kernels, {"rows_per_group": groups}
    rows, slopes = kernels.quantise(x, form=TILES), kernels.quantise(slope, form=TILES)
    matrices = kernels.quantise(weight, form=BLOCKS)
    over = [kernels.quantise_over_tokens(y, form=TILES, **common) for y in (slope, x)]
    ours = {
        "Fprop": lambda: kernels.multiply(rows, weight=matrices, accumulator=None, **common),
        "Dgrad": lambda: kernels.multiply(slopes, weight=matrices.T, accumulator=None, **common),
        "Wgrad": lambda: kernels.weight_gradients(over[0], rows=over[1], accumulator=None),
    }
    of_quantised = {
        "Fprop": lambda: by_group(dequantise(rows), dequantise(matrices).mT, groups),
        "Dgrad": lambda: by_group(dequantise(slopes), dequantise(matrices), groups),
        "Wgrad": lambda: torch.stack(
            [
                dequantise(over[0].group(g)).double() @ dequantise(over[1].group(g)).double().T
                for g in range(len(groups))
            ]
        ),
    }
    exact = {
        "Fprop": lambda: by_group(x, weight.mT, groups),
        "Dgrad": lambda: by_group(slope, weight, groups),
        "Wgrad": lambda: torch.stack(
            [a.double().T @ b.double() for a, b in zip(slope.split(groups), x.split(groups), strict=True)]
        ),
    }
    operations = 2 * x.shape[0] * weight.shape[1] * weight.shape[2]
    measured = []
    for kind, run in ours.items():
        made, peer, reference, whole = run().double(), peers[kind]().double(), of_quantised[kind](), exact[kind]()
        measured.append(
            Row(
                kind=f"{kind}, experts" if len(groups) > 1 else kind,
                shape=f"{name} {tuple(weight.shape[1:])}",
                ours=operations / bench.seconds_of(run) / 1e12,
                peer=operations / bench.seconds_of(peers[kind]) / 1e12,
                error=((made - reference).abs().max() / reference.abs().max()).item(),
                whole_error=((made - whole).norm() / whole.norm()).item(),
                bf16_error=((peer - whole).norm() / whole.norm()).item(),
            )
        )
    return measured


def by_group(rows: Tensor, matrices: Tensor, groups: Sequence[int]) -> Tensor:
    """Return rows of each group times its matrix, in FP64."""
    parts = zip(rows.split(list(groups)), matrices, strict=True)
    return torch.cat([part.double() @ matrix.double() for part, matrix in parts])


def casts(bench: Bench) -> list[Row]:
    """Time what quantises and turns, in GB/s read and written."""
    kernels, groups = bench.kernels, bench.rows_per_expert
    x, weight = bench.random(sum(groups), HIDDEN), bench.random(4, 2 * WIDTH, HIDDEN)
    gate_up, gates = bench.random(sum(groups), 2 * WIDTH), bench.random(sum(groups)).float()
    quantised, packed = kernels.quantise(x, form=TILES), kernels.quantise_e5m6(x)
    over = {"form": TILES, "rows_per_group": groups}
    runs: dict[str, tuple[Callable[[], object], float]] = {
        "1x128": (lambda: kernels.quantise(x, form=TILES), 3 * x.numel()),
        "128x128": (lambda: kernels.quantise(weight, form=BLOCKS), 3 * weight.numel()),
        "128x1": (lambda: kernels.quantise_over_tokens(x, **over), 3 * x.numel()),
        "128x1 of 1x128": (lambda: kernels.requantise_over_tokens(quantised, **over), 2 * x.numel()),
        "SwiGLU to 1x128": (
            lambda: kernels.quantise_swiglu(gate_up, factors=gates, form=TILES),
            2.5 * gate_up.numel(),
        ),
        "1x128 to FP32": (lambda: kernels.dequantise(quantised), 5 * x.numel()),
        "E5M6": (lambda: kernels.quantise_e5m6(x), 3.5 * x.numel()),
        "E5M6 to FP32": (lambda: kernels.dequantise_e5m6(packed), 5.5 * x.numel()),
    }
    measured = []
    for kind, (run, num_bytes) in runs.items():
        source = torch.empty(int(num_bytes) // 2, dtype=torch.uint8, device=bench.device)
        target = torch.empty_like(source)
        copy_seconds = bench.seconds_of(lambda source=source, target=target: target.copy_(source))
        speeds = [num_bytes / seconds / 1e9 for seconds in (bench.seconds_of(run), copy_seconds)]
        measured.append(Row(kind=f"cast {kind}", shape=f"{num_bytes / 1e6:.0f} MB", ours=speeds[0], peer=speeds[1]))
    return measured


def show(rows: list[Row], *, console: Console) -> None:
    table = Table(title="TFLOP/s of products, GB/s of casts; errors relative")
    headings = ("kernel", "shape", "ours", "peer", "ratio", "arithmetic", "FP8 in all", "BF16 in all")
    for heading in headings:
        table.add_column(heading, justify="left" if heading in headings[:2] else "right")
    for row in rows:
        errors = ["" if error is None else f"{error:.2g}" for error in (row.error, row.whole_error, row.bf16_error)]
        numbers = [f"{row.ours:.4g}", f"{row.peer:.4g}", f"{row.ours / row.peer:.2f}"]
        table.add_row(row.kind, row.shape, *numbers, *errors)
    console.print(table)


def claims_of(rows: list[Row]) -> list[Claim]:
    """Make one claim of each kernel, of the shape that does worst beside its peer."""
    claims = []
    for kind in dict.fromkeys(row.kind for row in rows):
        worst = min((row for row in rows if row.kind == kind), key=lambda row: row.ours / row.peer)
        cast = kind.startswith("cast")
        claims.append(
            Claim(
                name=f"FP8 {kind}, {'GB/s' if cast else 'TFLOP/s'}, worst shape: {worst.shape}",
                ours=worst.ours,
                peer=worst.peer,
                peer_name="a copy of as many bytes" if cast else "torch in BF16",
                ratio=worst.ours / worst.peer,
                target=0.7 if cast else 1.3,
            )
        )
    return claims


if __name__ == "__main__":
    main()
