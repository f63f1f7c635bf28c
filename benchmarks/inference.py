"""Claim: on a CPU the engine serves a DeepSeek-V3 model faster than what a user would pick instead.

The model (`inference_peers/mini.py`) has V3's shape, 1,234 M random weights and 197.5 M of them read for a token. All
systems have the same weights, rounded to BF16 once; llama.cpp gets them through our own GGUF export, and quantises to
4 bits itself. Ours is timed as it serves: requests in the engine, every token drawn at temperature 1. Peers are fed
random tokens and take the likeliest: the calls that their own servers make, without the servers.

Every system in every format is a process of its own. Those of a group hold the model in like formats and take turns, a
task each, until every one was timed so many times; the median counts. With two threads that is seconds on the clock;
with one it is CPU seconds, which other programs disturb least. A sum over 1 GiB takes turns with them: tokens
a second, times the bytes of weights that one token reads, over that speed is the share of the memory floor.

Start-up is the time from a folder in BF16, dropped from the system's cache of files, to a model that can run, in BF16
too; beside it the same files are read and nothing else is done.
"""

import os
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median

from claims.process import Contender, Worker, WorkerError
from claims.record import Claim, arguments, report
from inference_peers.memory import BYTES
from inference_peers.mini import MINI, gguf_file, published_folder
from inference_peers.tasks import TASKS
from rich.console import Console
from rich.table import Table

from dsv3.infer.packed_loading import load_packed
from dsv3.plan.counts import count_parameters
from dsv3.runtime.cores import available_cores

WORK = Path(__file__).parents[1] / "runs" / "inference"
"""Files of weights, 15 GB in all; they stay, so that the next run finds them."""
MEMORY = Contender("memory", "1 GiB")
BYTES_A_WEIGHT = {
    "fp32": 4.0,
    "f32": 4.0,
    "bf16": 2.0,
    "f16": 2.0,
    "fp8": 1.0 + 4 / 128**2,
    "int8": 1.0 + 4 / 128,
    "q8_0": 34 / 32,
    "int4": 0.5 + 4 / 64,
    "q4_k_m": 4.84 / 8,
    "q4_0": 18 / 32,
}
"""Of the layers' matrices, multipliers included. Some formats keep head or rest in more bits."""
START_UP_ALLOWANCE = 1.2


@dataclass(frozen=True, kw_only=True)
class Group:
    """Formats that are compared with each other, ours first, and how much faster ours is to be than every peer."""

    ours: str
    others: tuple[str, ...] = ()
    """Other formats of ours, timed beside it."""
    peers: tuple[Contender, ...]
    targets: Mapping[str, float]
    """By task: how many times as fast as the fastest peer."""


@dataclass(kw_only=True)
class Timing:
    """What one contender took for one task, each time."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def seconds(self, *, threads: int) -> float:
        return median(self.cpu if threads == 1 else self.wall)


@dataclass(frozen=True, kw_only=True)
class Result:
    """One number of the table."""

    threads: int
    contender: Contender
    task: str
    tokens_per_second: float
    share_of_floor: float
    """Of what reading the weights at the memory's speed would take; only where a step is one token."""
    times: int


def llama(*kinds: str) -> tuple[Contender, ...]:
    return tuple(Contender("llama.cpp", kind) for kind in kinds)


def transformers(*modes: str) -> tuple[Contender, ...]:
    return tuple(Contender("transformers", mode) for mode in modes)


# The targets in tokens a second that were set on another machine, over what the fastest peer did there.
GROUPS = (
    Group(
        ours="int8",
        others=("int4",),
        peers=llama("q8_0", "q4_k_m", "q4_0"),
        targets={"decode": 1.17, "batch": 1.37, "prompt": 2.49, "long": 2.5},
    ),
    Group(
        ours="fp32",
        peers=(*llama("f32"), *transformers("fp32")),
        targets={"decode": 1.1, "batch": 1.36, "prompt": 1.17, "long": 1.49},
    ),
    Group(
        ours="bf16",
        others=("fp8",),
        peers=(*llama("f16", "bf16"), *transformers("bf16")),
        targets={"decode": 1.0, "batch": 1.0, "prompt": 1.0, "long": 1.0},
    ),
)
ROUNDS = {2: 7, 1: 3}
TIMED_ON_ONE_THREAD = 2
"""Groups, from the first on."""
QUICK = (replace(GROUPS[0], others=(), peers=llama("q8_0"), targets={"decode": 1.65, "batch": 1.9, "prompt": 3.16}),)
QUICK_ROUNDS = {2: 3}


def main() -> None:
    options = arguments(__doc__)
    console = Console(width=150)
    WORK.mkdir(parents=True, exist_ok=True)
    groups = QUICK if options.quick else GROUPS
    make_files(groups)
    results: list[Result] = []
    claims: list[Claim] = []
    absent: dict[str, str] = {}
    for threads, rounds in (QUICK_ROUNDS if options.quick else ROUNDS).items():
        for group in groups[: None if threads > 1 else TIMED_ON_ONE_THREAD]:
            here = race(group, threads=min(threads, available_cores()), rounds=rounds, absent=absent)
            console.print(table(here, title=f"{threads} threads" if threads > 1 else "1 thread, CPU seconds"))
            claims += claims_of(group, results=here)
            results += here
    if not options.quick:
        claims.append(start_up_claim())
    for contender, reason in absent.items():
        console.print(f"absent: {contender}: {reason}")
    details = {
        "results": [asdict(one) | {"contender": str(one.contender)} for one in results],
        "absent": absent,
        "peer_versions": {name: version_of(name) for name in ("llama-cpp-python", "transformers")},
    }
    report(claims, title="Inference", json_file=options.json, details=details)


def make_files(groups: tuple[Group, ...]) -> None:
    """Make all weights before anything is timed. Without llama.cpp its files in 4 bits cannot be, and it is absent."""
    published_folder(WORK)
    for group in groups:
        for peer in group.peers:
            if peer.system == "llama.cpp":
                with suppress(ImportError):
                    gguf_file(WORK, kind=peer.mode)


def race(group: Group, *, threads: int, rounds: int, absent: dict[str, str]) -> list[Result]:
    """Start all contenders of a group, let them take turns, and end them."""
    contenders = [MEMORY, *(Contender("dsv3", weights) for weights in (group.ours, *group.others)), *group.peers]
    with tempfile.TemporaryDirectory() as scratch:
        workers = {one: start(one, threads=threads, scratch=Path(scratch)) for one in contenders}
        try:
            timings = take_turns(workers, tasks=tuple(group.targets), rounds=rounds, absent=absent)
        finally:
            for worker in workers.values():
                worker.close()
    floor = {task: BYTES / timing.seconds(threads=threads) for task, timing in timings[MEMORY].items()}
    return [
        result_of(one, task=task, timing=timing, threads=threads, bytes_per_second=floor[task])
        for one, of_tasks in timings.items()
        if one != MEMORY
        for task, timing in of_tasks.items()
    ]


def start(contender: Contender, *, threads: int, scratch: Path) -> Worker:
    return Worker(
        "inference_peers.worker",
        [contender.system, contender.mode, str(WORK)],
        scratch=scratch,
        environment={"OMP_NUM_THREADS": str(threads)},
    )


def take_turns(
    workers: dict[Contender, Worker], *, tasks: tuple[str, ...], rounds: int, absent: dict[str, str]
) -> dict[Contender, dict[str, Timing]]:
    """Have each task done once by all that is not counted, then so many times in turn. What fails is absent."""
    timings: dict[Contender, dict[str, Timing]] = {one: {task: Timing() for task in tasks} for one in workers}
    for task in tasks:
        for number in range(rounds + 1):
            for contender in list(timings):
                try:
                    answer = workers[contender].ask({"task": task})
                except WorkerError as error:
                    if contender == MEMORY or contender.system == "dsv3":
                        raise
                    absent[str(contender)] = str(error)
                    del timings[contender]
                    continue
                if number:
                    timings[contender][task].wall.append(answer["wall"])
                    timings[contender][task].cpu.append(answer["cpu"])
    return timings


def result_of(contender: Contender, *, task: str, timing: Timing, threads: int, bytes_per_second: float) -> Result:
    speed = TASKS[task].tokens / timing.seconds(threads=threads)
    bytes_read = count_parameters(MINI).active * BYTES_A_WEIGHT[contender.mode]
    one_at_a_time = TASKS[task].sequences == 1 and TASKS[task].steps > 0
    return Result(
        threads=threads,
        contender=contender,
        task=task,
        tokens_per_second=speed,
        share_of_floor=speed * bytes_read / bytes_per_second if one_at_a_time else 0.0,
        times=len(timing.wall),
    )


def claims_of(group: Group, *, results: list[Result]) -> list[Claim]:
    """Return a claim for each task: ours beside the fastest peer. A claim whose peers are absent is not made."""
    ours = {one.task: one for one in results if one.contender == Contender("dsv3", group.ours)}
    claims = []
    for task, target in group.targets.items():
        peers = [one for one in results if one.task == task and one.contender.system != "dsv3"]
        if peers:
            best = max(peers, key=lambda one: one.tokens_per_second)
            clock = "CPU second, 1 thread" if best.threads == 1 else f"second, {best.threads} threads"
            claims.append(
                Claim(
                    name=f"{TASKS[task].label}, {group.ours} (tokens a {clock})",
                    ours=ours[task].tokens_per_second,
                    peer=best.tokens_per_second,
                    peer_name=f"fastest peer: {best.contender}",
                    ratio=ours[task].tokens_per_second / best.tokens_per_second,
                    target=target,
                )
            )
    return claims


def start_up_claim() -> Claim:
    """Time three starts, each beside a mere reading of the files."""
    loading, reading = [], []
    for _ in range(3):
        reading.append(seconds_of_reading(published_folder(WORK)))
        forget_files(published_folder(WORK))
        began = time.perf_counter()
        load_packed(published_folder(WORK), weights="bf16")
        loading.append(time.perf_counter() - began)
    return Claim(
        name="start-up, bf16 from files in BF16 (seconds)",
        ours=median(loading),
        peer=median(reading),
        peer_name=f"the files read, x {START_UP_ALLOWANCE}",
        ratio=median(reading) * START_UP_ALLOWANCE / median(loading),
        target=1.0,
    )


def seconds_of_reading(folder: Path) -> float:
    forget_files(folder)
    room = bytearray(2**24)
    began = time.perf_counter()
    for file in folder.glob("*.safetensors"):
        with file.open("rb", buffering=0) as bytes_of:
            while bytes_of.readinto(room):
                pass
    return time.perf_counter() - began


def forget_files(folder: Path) -> None:
    """Drop the files from the system's cache."""
    for file in folder.glob("*.safetensors"):
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def table(results: list[Result], *, title: str) -> Table:
    shown = Table(title=title)
    for column in ("system", *(TASKS[task].label for task in TASKS)):
        shown.add_column(column, justify="left" if column == "system" else "right")
    for contender in dict.fromkeys(one.contender for one in results):
        cells = {one.task: one for one in results if one.contender == contender}
        shown.add_row(str(contender), *(cell(cells.get(task)) for task in TASKS))
    return shown


def cell(result: Result | None) -> str:
    if result is None:
        return ""
    share = f" ({result.share_of_floor:.0%})" if result.share_of_floor else ""
    return f"{result.tokens_per_second:,.1f}{share}"


def version_of(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    main()
