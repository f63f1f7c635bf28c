"""Claim: `dsv3 plan` says what the published run took, and what our own ranks hold.

Published: time, speed, MFU, GPU-hours and dollars of V3 on 2,048 H800, planned from its settings, beside the published
numbers; the ratio is how near the plan comes, 1 being the same. One number of the plan is fitted, to one of these (the
woven chunks; docs/planning.md).

Memory: runs of 1, 2 and 4 ranks of a small model on this machine, in FP32; tensors by kind and the most that was
allocated at any part of a chunk of work, beside the plan of the same run. `--quick` leaves out all but one layout of
each size.
"""

import json
import time

from claims.record import Claim, arguments, report
from distributed import run
from distributed_ranks.memory import run_of
from typer.testing import CliRunner

from dsv3.cli.main import Options, build_app
from dsv3.plan.hardware import H800
from dsv3.plan.training import plan_training

LAYOUTS = {
    "one rank": (1, {}),
    "two ranks, experts over two": (2, {"expert": 2}),
    "two ranks, 1F1B": (2, {"pipeline": 2, "schedule": "1f1b"}),
    "two ranks, ZeRO-1": (2, {"zero": True}),
    "four ranks, DualPipe, experts over two": (4, {"pipeline": 2, "expert": 2, "schedule": "dualpipe"}),
    "four ranks, 1F1B": (4, {"pipeline": 4, "schedule": "1f1b"}),
}
QUICK = ("one rank", "two ranks, experts over two", "four ranks, DualPipe, experts over two")


def main() -> None:
    options = arguments(__doc__)
    claims, seconds = published_claims()
    names = QUICK if options.quick else tuple(LAYOUTS)
    details: dict[str, object] = {"seconds_of_the_plan": seconds}
    for name in names:
        size, parallel = LAYOUTS[name]
        measured = run({"work": "memory", "parallel": parallel}, size=size)
        details[name] = measured
        claims += memory_claims(name, parallel=parallel, size=size, measured=measured)
    report(claims, title="Plans", json_file=options.json, details=details)


def published_claims() -> tuple[list[Claim], float]:
    """Return the plan of the published run beside what is published, and how long it took."""
    began = time.process_time()
    told = CliRunner().invoke(build_app(Options()), ["plan", "v3_671b", "--gpus", "2048", "--json"])
    seconds = time.process_time() - began
    lines = json.loads(told.output)["lines"]
    wanted = ("woven", "step", "tokens a second", "MFU, causal", "pre-training", "longer context", "price")
    return [
        Claim(
            name=f"V3 on 2,048 H800: {line['name']} ({line['source']})",
            ours=line["value"],
            peer=line["published"]["value"],
            peer_name=line["published"]["where"],
            ratio=nearness(line["value"], line["published"]["value"]),
            target=0.95,
        )
        for line in lines
        if line["name"] in wanted
    ], seconds


def memory_claims(name: str, *, parallel: dict, size: int, measured: list[dict]) -> list[Claim]:
    """Return the planned bytes of the rank that the plan misses most, of each kind."""
    plan = plan_training(run_of(parallel, size=size), gpu=H800, world=size)
    claims = []
    for kind in ("weights", "gradients", "moments", "all"):
        pairs = []
        for rank in measured:
            place = plan.places[rank["place"]]
            everything = place.on_device + place.messages  # hidden states that are under way between chunks
            pairs.append((everything if kind == "all" else getattr(place, kind), rank[kind]))
        planned, found = min(pairs, key=lambda pair: nearness(*pair))
        claims.append(
            Claim(
                name=f"{name}: {kind} (bytes planned)",
                ours=planned,
                peer=found,
                peer_name="measured",
                ratio=nearness(planned, found),
                target=0.9,
            )
        )
    return claims


def nearness(ours: float, theirs: float) -> float:
    """Return the smaller over the larger."""
    return min(ours, theirs) / max(ours, theirs)


if __name__ == "__main__":
    main()
