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
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from claims.record import Claim, arguments, report

from dsv3.runtime.device import available_cores

HERE = Path(__file__).parent
ROUNDS, QUICK_ROUNDS = 3, 1
COPY_BYTES, BACK_BYTES = 7168 + 56 * 4, 7168 * 2
CHOICE_BYTES = 8 + 4


def main() -> None:
    options = arguments(__doc__)
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
    report(claims, title="Many ranks", json_file=options.json, details=details)


def weak_scaling(rounds: int) -> dict[str, float]:
    """Return the median seconds of a step of each layout, taking turns."""
    layouts = {"one rank": ("train-1", 1), "data parallel": ("train-1", 2), "experts over two": ("train-2", 2)}
    seconds: dict[str, list[float]] = {name: [] for name in layouts}
    for _ in range(rounds):
        for name, (work, size) in layouts.items():
            found = run(work, size=size)
            # A step is over when it is over on all ranks.
            seconds[name] += [max(step) for step in zip(*(one["seconds"] for one in found), strict=True)]
    return {name: median(values) for name, values in seconds.items()}


def bytes_claims() -> list[Claim]:
    one, two = run("wire-8", size=8), run("wire-2", size=8)
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


def run(work: str, *, size: int) -> list[dict[str, list]]:
    """Run ranks, and return what each has found."""
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            subprocess.Popen(
                [sys.executable, "-m", "distributed_ranks.rank", work, folder, str(size), str(rank)],
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
