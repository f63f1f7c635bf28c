"""Claim: two ranks do nearly twice the work of one, and dispatch moves the bytes that the report's layout needs.

Weak scaling: every rank has a process, one thread and 2,048 tokens a step of the 8M model (`training_peers/sizes.py`);
two ranks on two cores, whose experts are copied (data parallel) or shared (expert parallel over two), do twice the
work of one rank in a step. They exchange through gloo on this machine. Counted is how many times as many tokens a
second they do; the best would be 2.

Bytes: eight ranks in nodes of two dispatch 128 tokens each of the published width (7,168) by a router of the published
shape (256 experts, 8 of them from at most 4 of 8 groups), with random weights, in FP8 there and in BF16 back. In one
hop a token goes over the slow link once for every rank that has experts for it; in two hops once for every node. The
bytes are those that report 3.2.2 and 3.3.3 give: 7,392 for a copy out and 14,336 for one back, and here 12 more
for each of 8 choices. Nothing of this says how fast a network is.

Overlap: the network is made slow, every message takes so long that a step waits for messages about as long as it
computes (the report's ratio, 3.2.1). A pipeline that runs one chunk after another, 1F1B, takes turns with one that
weaves a forward chunk into a backward one and lets rows of one travel while the other computes: DualPipe on four ranks,
two stages and experts over two, and the same weaving on two ranks with experts over two and no other stage. Four ranks
share two cores here. `--trace FILE` writes what the ranks of the woven step did when, for ui.perfetto.dev.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from claims.record import Claim, arguments, report

from dsv3.runtime.cores import available_cores

HERE = Path(__file__).parent
ROUNDS, QUICK_ROUNDS = 3, 1
WAITS = 3 * 5 * 8
"""Messages that a rank waits for one after the other in a step: in each of three layers with experts counts, copies and
outputs forward, and the gradients of both backward, for eight micro-batches."""
COPY_BYTES, BACK_BYTES = 7168 + 56 * 4, 7168 * 2
CHOICE_BYTES = 8 + 4


def main() -> None:
    options = arguments(__doc__, trace="write when ranks did what in a woven step")
    rounds = QUICK_ROUNDS if options.quick else ROUNDS
    claims = bytes_claims()
    details: dict[str, object] = {}
    if available_cores() >= 2:
        scaling = weak_scaling(rounds)
        details["seconds_of_a_step"] = scaling
        claims += [
            Claim(
                name=f"weak scaling, two ranks, {name} (times one rank's tokens a second)",
                ours=2 * scaling["one rank"] / scaling[name],
                peer=2.0,
                peer_name="twice the cores",
                ratio=2 * scaling["one rank"] / scaling[name] / 2,
                target=0.8,
            )
            for name in ("data parallel", "experts over two")
        ]
        woven, details["overlap"] = overlap_claims(rounds, trace=options.trace)
        claims += woven
    report(claims, title="Many ranks", json_file=options.json, details=details)


def weak_scaling(rounds: int) -> dict[str, float]:
    """Return the median seconds of a step of each layout, taking turns."""
    layouts = {
        "one rank": ({"work": "train", "parallel": {}}, 1),
        "data parallel": ({"work": "train", "parallel": {}}, 2),
        "experts over two": ({"work": "train", "parallel": {"expert": 2}}, 2),
    }
    seconds: dict[str, list[float]] = {name: [] for name in layouts}
    for _ in range(rounds):
        for name, (work, size) in layouts.items():
            found = run(work, size=size)
            # A step is over when it is over on all ranks.
            seconds[name] += [max(step) for step in zip(*(one["seconds"] for one in found), strict=True)]
    return {name: median(values) for name, values in seconds.items()}


def bytes_claims() -> list[Claim]:
    wire = {"expert": 8, "wire": "fp8"}
    one, two = (run({"work": "wire", "parallel": wire | {"ranks_per_node": per_node}}, size=8) for per_node in (8, 2))
    claims = []
    for name, found in (("one hop", one), ("two hops, between nodes", two)):
        first = [rank["hops"][0] for rank in found]
        expected = sum(rank["expected"] for rank in found)
        moved = sum(hop["dispatch_bytes"] + hop["combine_bytes"] for hop in first)
        wanted = expected * (COPY_BYTES + 8 * CHOICE_BYTES + BACK_BYTES)
        tokens = sum(hop["tokens"] for hop in first)
        claims.append(
            Claim(
                name=f"bytes of dispatch and combine a token, {name}",
                ours=moved / tokens,
                peer=wanted / tokens,
                peer_name="copies counted by hand x (7,392 + 96 + 14,336)",
                ratio=wanted / moved,
                target=1.0,
            )
        )
    return claims


def overlap_claims(rounds: int, *, trace: Path | None) -> tuple[list[Claim], dict[str, object]]:
    """Time woven steps beside plain ones."""
    cases = {
        "experts over two": (2, {"expert": 2}, "1f1b", "dualpipe_v"),
        "two stages, experts over two": (4, {"expert": 2, "pipeline": 2}, "1f1b", "dualpipe"),
    }
    claims, details = [], {}
    for name, (size, parallel, plain, woven) in cases.items():
        computing = timed(parallel | {"schedule": plain}, size=size, latency=0.0)
        latency = (computing["seconds"] - computing["waited"]) / WAITS
        seconds: dict[str, list[float]] = {plain: [], woven: []}
        waited: dict[str, list[float]] = {plain: [], woven: []}
        for number in range(rounds):
            for schedule in (plain, woven):
                file = str(trace.absolute()) if trace and schedule == woven and number == 0 else ""
                found = timed(parallel | {"schedule": schedule}, size=size, latency=latency, trace=file)
                seconds[schedule].append(found["seconds"])
                waited[schedule].append(found["waited"])
        ours, peer = median(seconds[woven]), median(seconds[plain])
        claims.append(
            Claim(
                name=f"a step over a slow network, {name} (seconds)",
                ours=ours,
                peer=peer,
                peer_name=f"{plain}, nothing woven",
                ratio=peer / ours,
                target=1.1,
            )
        )
        details[name] = {
            "fast network": computing,
            "latency": latency,
            "seconds": {schedule: median(values) for schedule, values in seconds.items()},
            "waited": {schedule: median(values) for schedule, values in waited.items()},
        }
    return claims, details


def timed(parallel: dict[str, object], *, size: int, latency: float, trace: str = "") -> dict[str, float]:
    """Return how long a step takes, and how long a rank waits in it."""
    found = run({"work": "weave", "parallel": parallel, "latency": latency, "trace": trace}, size=size)
    slowest = [max(step) for step in zip(*(one["seconds"] for one in found), strict=True)]
    waited = [sum(step) / size for step in zip(*(one["waited"] for one in found), strict=True)]
    return {"seconds": median(slowest), "waited": median(waited)}


def run(work: dict[str, object], *, size: int) -> list[dict[str, list]]:
    """Run ranks, and return what each has found."""
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            subprocess.Popen(
                [sys.executable, "-m", "distributed_ranks.rank", json.dumps(work), folder, str(size), str(rank)],
                stdout=subprocess.PIPE,
                text=True,
                cwd=HERE,
            )
            for rank in range(size)
        ]
        said = [process.communicate(timeout=600)[0] for process in processes]
    for process in processes:
        assert process.returncode == 0, f"a rank of {work} ended with status {process.returncode}"
    return [json.loads(text.strip().splitlines()[-1]) for text in said]


if __name__ == "__main__":
    main()
