"""Claim: a training step is faster, and takes less memory, than that of every peer that trains a DeepSeek-V3 here.

One step is forward pass, next-token cross-entropy, backward pass, clipping to norm 1 and AdamW, in FP32 on 2,048 random
tokens: the same architecture, the same number of weights of the same initial spread, the same tokens for every system.
Ours runs with MTP, balancing and weight average off (`training_peers/ours.py`), and once more with V3's whole loss.

Every system in every mode is a process of its own. All processes of a size are warmed up (here compiled modes
compile), then take turns, a step each, until the time is up; the median of the steps counts. With one thread that is
CPU seconds, which other programs disturb least; with two it is seconds on the clock. A product of two 2048^3 matrices
takes turns with them, so that "share of sgemm" (operations of a step / seconds / speed of that product) is measured at
the same temperature. The best peer mode is the fastest of all that ran; one that could not run is listed with its
reason.

Memory is the highest resident size in the timed steps, less what was resident after the imports.
"""

import math
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median

from claims.process import Contender
from claims.record import Claim, arguments, report
from rich.console import Console
from rich.table import Table
from training_peers import sgemm
from training_peers.ours import whole_loss
from training_peers.race import (
    COMPILED,
    EAGER_EXPERTS,
    GROUPED,
    OURS,
    SGEMM,
    TORCHTITAN,
    WHOLE_LOSS,
    Race,
    together,
)
from training_peers.sizes import SIZES, TOKENS, Size
from training_peers.timings import Timings

from dsv3.plan.counts import mtp_training_flops_per_token, training_flops_per_token
from dsv3.runtime.cores import available_cores

PEERS = (EAGER_EXPERTS, GROUPED, COMPILED, TORCHTITAN)
TRANSFORMERS = (EAGER_EXPERTS, GROUPED, COMPILED)
SHARE_TARGET = 0.65
MEMORY_TARGET = 1 / 0.7
WHOLE_LOSS_ALLOWANCE = 1.10
"""The whole loss may take so many times what its FLOPs say."""
COMPILED_AGAIN_FROM = 1.1
"""How many times faster than other modes compiled code must be on one thread to be timed on more."""
CLAIM_MEMORY_AT = ("8m-256", "8m-2048", "60m-256")
CLAIM_SHARE_AT = "8m-256"


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What runs at one size, for how long, and how much faster ours is to be."""

    size: str
    contenders: tuple[Contender, ...]
    target: float
    seconds: Mapping[int, float]
    """By number of threads: how long turns are taken, once there were `min_rounds`."""
    min_rounds: int = 3


@dataclass(frozen=True, kw_only=True)
class Result:
    """One row of the table."""

    size: str
    threads: int
    contender: Contender
    seconds: float
    """Median of a step: CPU seconds with one thread, seconds on the clock with more."""
    tokens_per_second: float
    share_of_sgemm: float
    peak_bytes: int
    above_idle_bytes: int
    steps: int


ALL = (OURS, WHOLE_LOSS, EAGER_EXPERTS, GROUPED, COMPILED, TORCHTITAN, SGEMM)
# Experts do the same work whatever the length of a row, and the loop over them only falls back as they grow in number,
# so their slower implementation is timed once.
WITHOUT_EAGER = tuple(contender for contender in ALL if contender != EAGER_EXPERTS)
FULL = (
    Comparison(size="8m-256", contenders=ALL, target=1.4, seconds={1: 30, 2: 15}),
    Comparison(size="8m-1024", contenders=WITHOUT_EAGER, target=2.5, seconds={1: 30}),
    Comparison(size="8m-2048", contenders=WITHOUT_EAGER, target=3.5, seconds={1: 45, 2: 25}),
    Comparison(size="60m-256", contenders=WITHOUT_EAGER, target=1.3, seconds={1: 60, 2: 30}),
)
QUICK = tuple(
    replace(
        one,
        contenders=tuple(contender for contender in one.contenders if contender != COMPILED),
        seconds={1: 20},
        min_rounds=2,
    )
    for one in FULL
    if one.size in ("8m-256", "8m-2048")
)


def main() -> None:
    options = arguments(__doc__)
    console = Console(width=140)
    comparisons = QUICK if options.quick else FULL
    results: list[Result] = []
    absent: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        races = {one.size: Race(one.size, scratch=Path(folder)) for one in comparisons}
        try:
            compile_all(comparisons, races=races)
            for comparison in comparisons:
                race = races[comparison.size]
                here = compare(comparison, race=race)
                console.print(table(here, title=SIZES[comparison.size].label))
                for contender, reason in race.absent.items():
                    console.print(f"absent: {contender}: {reason}")
                results += here
                absent |= {f"{contender}, {comparison.size}": reason for contender, reason in race.absent.items()}
        finally:
            for race in races.values():
                race.close()
    claims = [claim for comparison in comparisons for claim in claims_at(comparison, results=results)]
    details = {
        "results": [asdict(one) | {"contender": str(one.contender)} for one in results],
        "absent": absent,
        "peer_versions": peer_versions(),
    }
    report(claims, title="Training", json_file=options.json, details=details)


def compile_all(comparisons: tuple[Comparison, ...], *, races: Mapping[str, Race]) -> None:
    """Warm up the compiled contenders of all sizes, two at a time: it takes a minute or two each."""
    sizes = [one.size for one in comparisons if COMPILED in one.contenders]
    together(partial(races[size].warm_up, COMPILED, threads=1) for size in sizes)


def compare(comparison: Comparison, *, race: Race) -> list[Result]:
    """Time all contenders of one size on one thread, then on more; end their processes."""
    results: list[Result] = []
    contenders: tuple[Contender, ...] = comparison.contenders
    together(partial(race.warm_up, one, threads=1) for one in contenders if one != COMPILED)
    for threads, seconds in comparison.seconds.items():
        if threads > available_cores():
            continue
        if threads > 1:
            contenders = worth_more_threads(contenders, results=results)
            together(partial(race.warm_up, one, threads=threads) for one in contenders if one in race.workers)
        timings = race.take_turns(contenders, seconds=seconds, min_rounds=comparison.min_rounds)
        results += results_of(timings, size=SIZES[comparison.size], threads=threads)
    race.close()
    return results


def worth_more_threads(contenders: tuple[Contender, ...], *, results: list[Result]) -> tuple[Contender, ...]:
    """Return those also timed on more threads.

    Compiled code has to be compiled again for them, which is done where it is far ahead of other modes on one thread.
    The whole loss is judged on one thread alone.
    """
    seconds = {one.contender: one.seconds for one in results if one.contender in PEERS}
    others = min((value for one, value in seconds.items() if one != COMPILED), default=math.inf)
    again = seconds.get(COMPILED, math.inf) * COMPILED_AGAIN_FROM < others
    return tuple(one for one in contenders if one != WHOLE_LOSS and (one != COMPILED or again))


def results_of(timings: Mapping[Contender, Timings], *, size: Size, threads: int) -> list[Result]:
    """Return a row for each contender; its share is of the product's speed in the same rounds."""
    seconds = {one: median(timing.cpu if threads == 1 else timing.wall) for one, timing in timings.items()}
    sgemm_flops_per_second = sgemm.FLOPS / seconds[SGEMM]
    flops = {one: step_flops(one, size=size) for one in timings}
    return [
        Result(
            size=size.label,
            threads=threads,
            contender=one,
            seconds=seconds[one],
            tokens_per_second=0.0 if one == SGEMM else TOKENS / seconds[one],
            share_of_sgemm=flops[one] / seconds[one] / sgemm_flops_per_second,
            peak_bytes=timing.peak_bytes,
            above_idle_bytes=timing.peak_bytes - timing.idle_bytes,
            steps=len(timing.wall),
        )
        for one, timing in timings.items()
    ]


def step_flops(contender: Contender, *, size: Size) -> int:
    if contender == SGEMM:
        return sgemm.FLOPS
    return round(size.flops * (whole_loss_ratio(size) if contender == WHOLE_LOSS else 1))


def whole_loss_ratio(size: Size) -> float:
    """Return how many times the FLOPs of the plain step V3's whole loss takes, attention counted causally."""
    model, length = whole_loss(size).model, size.sequence_length
    plain = training_flops_per_token(model, sequence_length=length)
    return 1 + mtp_training_flops_per_token(model, sequence_length=length) / plain


def claims_at(comparison: Comparison, *, results: list[Result]) -> list[Claim]:
    """Return what is claimed at one size. A claim whose peer is absent is not made."""
    size = SIZES[comparison.size]
    here = {(one.threads, one.contender): one for one in results if one.size == size.label}
    claims = [
        speed_claim(ours, peer=peer, target=comparison.target)
        for threads in comparison.seconds
        if (ours := here.get((threads, OURS))) and (peer := best_peer(list(here.values()), threads=threads))
    ]
    ours = here[1, OURS]
    if comparison.size == CLAIM_SHARE_AT:
        claims.append(share_claim(ours))
    transformers = [here[1, one] for one in TRANSFORMERS if (1, one) in here]
    if comparison.size in CLAIM_MEMORY_AT and transformers:
        claims.append(memory_claim(ours, peer=min(transformers, key=lambda one: one.above_idle_bytes)))
    return [*claims, whole_loss_claim(ours, whole=here[1, WHOLE_LOSS], size=size)]


def best_peer(results: list[Result], *, threads: int) -> Result | None:
    """Return the fastest peer mode of all that ran."""
    peers = [one for one in results if one.contender in PEERS and one.threads == threads]
    return min(peers, key=lambda one: one.seconds, default=None)


def speed_claim(ours: Result, *, peer: Result, target: float) -> Claim:
    clock = "CPU seconds, 1 thread" if ours.threads == 1 else f"seconds, {ours.threads} threads"
    return Claim(
        name=f"training step, {ours.size} ({clock})",
        ours=ours.seconds,
        peer=peer.seconds,
        peer_name=f"best peer: {peer.contender}",
        ratio=peer.seconds / ours.seconds,
        target=target,
    )


def share_claim(ours: Result) -> Claim:
    return Claim(
        name=f"share of sgemm, {ours.size} (1 thread)",
        ours=ours.share_of_sgemm,
        peer=1.0,
        peer_name="a 2048^3 FP32 product",
        ratio=ours.share_of_sgemm,
        target=SHARE_TARGET,
    )


def memory_claim(ours: Result, *, peer: Result) -> Claim:
    return Claim(
        name=f"peak memory above idle, {ours.size} (MB)",
        ours=ours.above_idle_bytes / 1e6,
        peer=peer.above_idle_bytes / 1e6,
        peer_name=f"leanest of transformers: {peer.contender.mode}",
        ratio=peer.above_idle_bytes / ours.above_idle_bytes,
        target=MEMORY_TARGET,
    )


def whole_loss_claim(ours: Result, *, whole: Result, size: Size) -> Claim:
    """Compare the whole loss with the plain step, times what the MTP module adds in FLOPs, with an allowance."""
    ratio = whole_loss_ratio(size)
    allowed = ours.seconds * ratio * WHOLE_LOSS_ALLOWANCE
    return Claim(
        name=f"whole V3 loss, {ours.size} (CPU seconds, 1 thread)",
        ours=whole.seconds,
        peer=allowed,
        peer_name=f"plain step x {ratio:.3f} in FLOPs x {WHOLE_LOSS_ALLOWANCE:.2f}",
        ratio=allowed / whole.seconds,
        target=1.0,
    )


def table(results: list[Result], *, title: str) -> Table:
    shown = Table(title=title)
    for column in (
        "threads",
        "system",
        "s / step",
        "tokens / s",
        "share of sgemm",
        "peak MB",
        "above idle MB",
        "steps",
    ):
        shown.add_column(column, justify="left" if column == "system" else "right")
    for one in results:
        shown.add_row(
            str(one.threads),
            str(one.contender),
            f"{one.seconds:.3f}",
            f"{one.tokens_per_second:,.0f}" if one.tokens_per_second else "",
            f"{one.share_of_sgemm:.2f}",
            f"{one.peak_bytes / 1e6:,.0f}",
            f"{one.above_idle_bytes / 1e6:,.0f}",
            str(one.steps),
        )
    return shown


def peer_versions() -> dict[str, str]:
    versions = {}
    for name in ("transformers", "torchtitan"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    return versions


if __name__ == "__main__":
    main()
