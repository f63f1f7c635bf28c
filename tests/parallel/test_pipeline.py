"""What ranks do is what the schedule says, in the order in which the simulator has it."""

import json
from collections import defaultdict
from itertools import pairwise

import pytest
import torch.distributed as dist

from dsv3.config import ParallelConfig
from dsv3.parallel.trace import COMPUTE, Event, write_trace
from dsv3.plan.pipeline import Kind
from dsv3.plan.simulate import ChunkCosts, simulate
from dsv3.plan.stages import make_schedule
from dsv3.train.resume import new_state
from dsv3.train.step import train_step

from .test_ranks import config_of, open_layout, rows_of, share


def traced(*, parallel):
    """Take one step, and return what this rank has done when."""
    config = config_of()
    ranks = open_layout(config, parallel)
    state = new_state(config, ranks=ranks)
    train_step(state, batches=share(rows_of(0), ranks=ranks, micro=2))  # so that all is warm
    dist.barrier()
    ranks.trace.is_on = True
    train_step(state, batches=share(rows_of(1), ranks=ranks, micro=2))
    return ranks.trace.events


def spans(events):
    """Return when each action began and ended, and its parts, in the order in which they were done."""
    found = defaultdict(list)
    for event in events:
        if event.track == COMPUTE:
            name, *part = event.name.split(" ")
            found[name].append((event.start, event.end, *part))
    return found


@pytest.mark.parametrize(
    ("size", "parallel"),
    [
        (2, ParallelConfig(pipeline=2, schedule="zb1p")),
        (2, ParallelConfig(pipeline=2, schedule="dualpipe")),
        pytest.param(2, ParallelConfig(pipeline=2, schedule="dualpipe_v"), marks=pytest.mark.slow),
        pytest.param(2, ParallelConfig(pipeline=2, schedule="interleaved"), marks=pytest.mark.slow),
    ],
)
def test_the_executed_order_is_the_simulated_one(on_ranks, size, parallel):
    schedule = make_schedule(parallel, num_micro_batches=4)
    done = [spans(events) for events in on_ranks(traced, size=size, parallel=parallel)]
    timeline = simulate(schedule, costs=ChunkCosts())
    ended = {}
    for rank, found in enumerate(done):
        simulated = [span.step for span in timeline.spans[rank]]
        planned = [action for step in simulated for action in step]
        assert set(found) == {str(action) for action in planned}
        # Steps follow each other as planned; what is woven lies in each other.
        bounds = [
            (min(found[str(a)][0][0] for a in step), max(found[str(a)][-1][1] for a in step)) for step in simulated
        ]
        assert all(one[1] <= other[0] for one, other in pairwise(bounds))
        ended |= {action: found[str(action)][-1][1] for action in planned}
    for rank, found in enumerate(done):
        for step in schedule.steps[rank]:
            for action in step:
                for need in schedule.needs(action):
                    assert ended[need] < found[str(action)][-1][1], f"{action} before {need}"


def test_parts_of_woven_chunks_take_turns_in_the_published_order(on_ranks):
    """Fact sheet 3.8, order of issue in the published trace, a layer's parts of both chunks."""
    parallel = ParallelConfig(expert=2, schedule="dualpipe_v")
    (step,) = [step for step in make_schedule(parallel, num_micro_batches=4).steps[0] if len(step) == 2][:1]
    forward, backward = step
    assert (forward.kind, backward.kind) == (Kind.FORWARD, Kind.BACKWARD)
    for events in on_ranks(traced, size=2, parallel=parallel):
        of_both = sorted(
            (start, name[0], *part)
            for name in (str(forward), str(backward))
            for start, _, *part in spans(events)[name]
            if part
        )
        order = [f"{part}({kind})" for _, kind, part in of_both]
        published = "COMBINE(B) ATTN(F) MLP(B) DISPATCH(F) DISPATCH(B) MLP(F) ATTN(B) COMBINE(F)"
        assert published in " ".join(order), order


def test_a_trace_is_what_perfetto_reads(tmp_path):
    events = {0: [Event(name="F0.0 ATTN", track="compute", start=2.0, end=2.5)], 1: []}
    write_trace(events, path=tmp_path / "trace.json")
    found = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert {"ph": "X", "name": "F0.0 ATTN", "pid": 0, "tid": 0, "ts": 0.0, "dur": 500_000.0} in found
    assert [event["args"]["name"] for event in found if event["name"] == "process_name"] == ["rank 0", "rank 1"]
