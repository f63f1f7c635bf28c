"""Claim: a small model, trained here, reads 64 times as far as its pre-training did, and nothing grows too fast.

A model of 4 layers learns to look back from lists of words that go round and round, is pre-trained on rows of 128
tokens of facts stated again and again, of documents of recall and of real text, and is extended as by `dsv3 extend` to
1,024 and 8,192 tokens, on two cores. `runs/reproduce/niah` keeps it, where `dsv3 reproduce niah` trains the same one,
and a call that was stopped goes on. Needles of three kinds, whose forms it has been taught with other words and
numbers, are then hidden in held-out text at 15 depths of 15 lengths up to 8,192 tokens, for the extended model, and at
5 of 5 for the one before it. Perplexity is measured by position, and for the pre-trained weights under four ways of
scaling positions.

Training steps on ever longer rows show that memory grows with their length, and time as well but for attention. A
context of 131,072 tokens is filled by the engine, gone on with after 1,024 tokens and ever more, and asked again with a
new end.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from claims.record import Claim, arguments, report
from long_context_parts.training import config_of
from rich.console import Console
from rich.table import Table

from dsv3.evals.extension import compare_phases
from dsv3.evals.needle import NeedleResult, find_needles
from dsv3.evals.positions import PositionLoss, loss_by_position, whole_rows
from dsv3.evals.scaling import SCALINGS, scale_positions
from dsv3.infer.loaded import load
from dsv3.plan.activations import activation_memory
from dsv3.report.needle import draw_needles
from dsv3.report.positions import draw_positions
from dsv3.reproduce.niah import BEFORE_GRID, LENGTHS, TRAINED, haystack, real_text, train

FOLDER = Path(__file__).parents[1] / "runs" / "reproduce" / "niah"
PICTURES = Path(__file__).parents[1] / "docs" / "long-context"
GRID = 15
NEEDLES_TARGET = 0.95
ROWS = 32
STEP_LENGTHS = (2048, 4096, 8192, 16_384)
SERVED = 131_072


def main() -> None:
    options = arguments(__doc__)
    folder = FOLDER.with_name("niah_quick") if options.quick else FOLDER
    base, phases = train(folder, quick=options.quick)
    with tempfile.TemporaryDirectory() as scratch:
        pictures = Path(scratch) if options.quick else PICTURES
        pictures.mkdir(parents=True, exist_ok=True)
        grids, curves = read(base, phases=phases, pictures=pictures, grid=3 if options.quick else GRID)
        steps = {tokens: in_own_process("training", tokens) for tokens in STEP_LENGTHS[: 2 if options.quick else None]}
        served = in_own_process("serving", 8192 if options.quick else SERVED, Path(scratch) / "model")
    show(grids, steps=steps, served=served)
    report(
        claims_of(grids, steps=steps, served=served),
        title="Long context",
        json_file=options.json,
        details={
            "needles": {name: grid.as_dict() for name, grid in grids.items()},
            "perplexity": {name: [curve.as_dict() for curve in some] for name, some in curves.items()},
            "training_steps": steps,
            "serving": served,
        },
    )


def read(
    base: Path, *, phases: list[Path], pictures: Path, grid: int
) -> tuple[dict[str, NeedleResult], dict[str, list[PositionLoss]]]:
    """Look for needles before and after, and measure perplexity by position; draw all of it."""
    real = real_text(base, tokens=4 * ROWS * LENGTHS[-1])
    hay = haystack(real)
    grids = {}
    for name, folder, size in (("before", base, min(grid, BEFORE_GRID)), ("after", phases[-1], grid)):
        model = load(folder, weights="fp32", device="cpu")
        grids[name] = find_needles(model, haystack=hay, longest=LENGTHS[-1], size=size)
        draw_needles(grids[name], file=pictures / f"needles-{name}.png", title=f"{name} the extension")
    rows = whole_rows(real, length=LENGTHS[-1], most=8 if grid < GRID else ROWS)
    curves = {"extension": compare_phases(base, phases=phases, rows=len(rows), device="cpu"), "scalings": []}
    model = load(base, plain=True, device="cpu").model
    for scaling in SCALINGS:
        scale_positions(model, scaling=scaling, factor=LENGTHS[0] / TRAINED, trained=TRAINED)
        shorter = [row[: LENGTHS[0] + 1] for row in rows]
        curves["scalings"].append(loss_by_position(model, rows=shorter, name=scaling))
    draw_positions(
        curves["extension"], file=pictures / "perplexity.png", title="before and after each phase", trained=TRAINED
    )
    draw_positions(
        curves["scalings"], file=pictures / "scalings.png", title="pre-trained weights, scaled", trained=TRAINED
    )
    return grids, curves


def in_own_process(part: str, *given: object) -> dict[str, Any]:
    command = [sys.executable, "-m", f"long_context_parts.{part}", *map(str, given)]
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=Path(__file__).parent)
    found: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
    return found


def claims_of(
    grids: Mapping[str, NeedleResult], *, steps: Mapping[int, Mapping[str, float]], served: Mapping[str, Any]
) -> list[Claim]:
    lengths = sorted(steps)
    slopes = [
        (steps[long]["peak_bytes"] - steps[short]["peak_bytes"]) / (long - short) for short, long in pairwise(lengths)
    ]
    config = config_of(lengths[-1])
    rest = {tokens: (one["seconds"] - one["attention_seconds"]) / tokens for tokens, one in steps.items()}
    after = {int(tokens): one for tokens, one in served["after"].items()}
    longest = max(after)
    return [
        Claim(
            name=f"needles found over the whole grid up to {LENGTHS[-1]:,} tokens, pre-trained on {TRAINED}",
            ours=grids["after"].score,
            peer=grids["before"].score,
            peer_name="before the extension",
            ratio=grids["after"].score,
            target=NEEDLES_TARGET,
        ),
        Claim(
            name=f"kB of training memory a further token takes, {lengths[-2]:,} to {lengths[-1]:,}",
            ours=slopes[-1] / 1e3,
            peer=slopes[0] / 1e3,
            peer_name=f"{lengths[0]:,} to {lengths[1]:,}: linear",
            ratio=slopes[0] / slopes[-1],
            target=0.9,
        ),
        Claim(
            name="kB a token kept by a pass, as dsv3 inspect --context predicts",
            ours=activation_memory(config).per_token / 1e3,
            peer=slopes[-1] / 1e3,
            peer_name="measured at the peak, gradients and scratch included",
            ratio=activation_memory(config).per_token / slopes[-1],
            target=0.5,
        ),
        Claim(
            name=f"us of a training step a token without attention, rows of {lengths[-1]:,}",
            ours=rest[lengths[-1]] * 1e6,
            peer=rest[lengths[0]] * 1e6,
            peer_name=f"rows of {lengths[0]:,}",
            ratio=rest[lengths[0]] / rest[lengths[-1]],
            target=0.8,
        ),
        Claim(
            name=f"ms to decode a token after {longest:,}",
            ours=after[longest]["token_seconds"] * 1e3,
            peer=after[1024]["token_seconds"] * 1e3 * longest / 1024,
            peer_name=f"{longest // 1024} times that after 1,024",
            ratio=after[1024]["token_seconds"] * longest / 1024 / after[longest]["token_seconds"],
            target=1.0,
        ),
        Claim(
            name=f"s to the first token of {longest:,} that were read before but for the end",
            ours=served["again_first_token_seconds"],
            peer=after[longest]["first_token_seconds"],
            peer_name="read for the first time",
            ratio=after[longest]["first_token_seconds"] / served["again_first_token_seconds"],
            target=20.0,
        ),
    ]


def show(
    grids: Mapping[str, NeedleResult], *, steps: Mapping[int, Mapping[str, float]], served: Mapping[str, Any]
) -> None:
    console = Console(width=120)
    table = Table(title="needles found, by length")
    for column in ("tokens", *grids):
        table.add_column(column, justify="right")
    for length in grids["after"].lengths:
        shares = (grid.by_length().get(length) for grid in grids.values())
        table.add_row(f"{length:,}", *("" if share is None else f"{share:.0%}" for share in shares))
    console.print(table)
    table = Table(title="a training step on one row, recipe tiny")
    for column in ("tokens", "peak memory, MB", "seconds", "of them attention"):
        table.add_column(column, justify="right")
    for tokens, one in steps.items():
        times = (f"{one[name]:.2f}" for name in ("seconds", "attention_seconds"))
        table.add_row(f"{tokens:,}", f"{one['peak_bytes'] / 1e6:,.0f}", *times)
    console.print(table)
    table = Table(title="serving, recipe tiny's model in FP32")
    for column in ("after tokens", "s to read them", "ms a token then"):
        table.add_column(column, justify="right")
    for tokens, one in served["after"].items():
        table.add_row(f"{int(tokens):,}", f"{one['first_token_seconds']:.2f}", f"{one['token_seconds'] * 1e3:.2f}")
    console.print(table)


if __name__ == "__main__":
    main()
