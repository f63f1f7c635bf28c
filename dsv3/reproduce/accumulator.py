"""FP8 products summed in the 14 bits of a tensor core, with and without promotion to FP32 (report 3.3.2)."""

from itertools import pairwise
from statistics import fmean

import torch

from dsv3.fp8.gemm import HOPPER, HOPPER_PROMOTED, Accumulator, multiply
from dsv3.fp8.quantise import BLOCKS, TILES, dequantise, quantise
from dsv3.report.lines import Curve, draw_lines
from dsv3.reproduce.experiment import Ask, Outcome, Picture
from dsv3.reproduce.finding import Limit, Number, Order

ACCUMULATORS: dict[str, Accumulator | None] = {
    "14 bits, all of K": HOPPER,
    "14 bits, promoted every 128": HOPPER_PROMOTED,
    "FP32": None,
}
HELD, PROMOTED, EXACT = ACCUMULATORS
DEPTHS = (128, 256, 512, 1024, 2048, 4096, 8192)
PUBLISHED_DEPTH = 4096
PUBLISHED_ERROR = 0.02


def run(ask: Ask) -> Outcome:
    """Multiply random matrices."""
    errors = {
        name: [accumulator_error(depth, accumulator=kind) for depth in DEPTHS] for name, kind in ACCUMULATORS.items()
    }
    draw_lines(
        [Curve(name=name, x=DEPTHS, y=[100 * error for error in values]) for name, values in errors.items()],
        x_label="K",
        y_label="largest relative error, %",
        title="Products in FP8, 64 x K by K x 64, against float64",
        levels={"report: nearly 2% at K = 4096": 100 * PUBLISHED_ERROR},
        is_logarithmic=True,
        file=ask.folder / "accumulator.png",
    )
    at = DEPTHS.index(PUBLISHED_DEPTH)
    held, promoted = errors[HELD][at], errors[PROMOTED][at]
    return Outcome(
        findings=(
            Number(
                claim="largest relative error at K = 4096 with 14 bits",
                report="nearly 2% (3.3.2)",
                expected=PUBLISHED_ERROR,
                value=held,
                tolerance=0.5,
            ),
            Order(
                claim="promoted every 128 products below not promoted, K = 4096",
                report="promotion to FP32 restores the precision (Fig. 7b)",
                lower=(promoted,),
                higher=(held,),
            ),
            Limit(
                claim="how many times smaller promotion makes it",
                report="no number",
                bound=5.0,
                at_least=True,
                values=(held / promoted,),
            ),
            Order(
                claim="without promotion the error grows with K: the mean of the shorter half below that of the longer",
                report="accumulates over a large K (3.3.2)",
                lower=(fmean(errors[HELD][: len(DEPTHS) // 2]),),
                higher=(fmean(errors[HELD][len(DEPTHS) // 2 :]),),
            ),
        ),
        pictures=(Picture(file="accumulator.png", caption="Error of the sum alone, beyond rounding to E4M3."),),
        settings={"numbers": "uniform in [0, 1), so that no result is near zero", "depths": list(DEPTHS)},
        data={
            "largest_relative_error": errors,
            "grows": [later > earlier for earlier, later in pairwise(errors[HELD])],
        },
        remark="The report does not say which numbers it multiplied, and the error hangs on them: sums of uniform ones "
        "grow with K, and what falls off their end with them. How a tensor core sums was measured on an H100 and an "
        "H200 (docs/gpu.md) and is copied bit by bit.",
    )


def accumulator_error(depth: int, *, accumulator: Accumulator | None) -> float:
    """Return the largest relative error of a 64 x depth by depth x 64 product, beyond that of rounding to E4M3."""
    generator = torch.Generator().manual_seed(depth)
    a, b = (quantise(torch.rand(64, depth, generator=generator), form=form) for form in (TILES, BLOCKS))
    exact = dequantise(a).double() @ dequantise(b).double().T
    return ((multiply(a, b, accumulator=accumulator) - exact).abs() / exact).max().item()
