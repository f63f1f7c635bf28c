"""What one rank does in the tests of ranks that share experts: an engine of its own, and steps together."""

from dataclasses import replace
from datetime import timedelta

import torch
import torch.distributed as dist

from dsv3.config import ExpertRanksConfig
from dsv3.errors import RankLostError
from dsv3.infer.ranks_runner import RanksRunner, step_together
from dsv3.model.transformer import Transformer

from .test_engine import engine_of, mixed_requests, model_of, tokens_of


def new_runner(settings, *, group=None):
    """Return a runner over a model of its own, for a rank lets go of experts."""
    known = model_of(1, dtype=torch.float64)
    model = Transformer(known.config)
    model.load_state_dict({name: value.clone() for name, value in known.state_dict().items()}, assign=True)
    model.requires_grad_(False)
    return RanksRunner(model, group=group or dist.group.WORLD, config=ExpertRanksConfig(**settings))


def answer_all(*, scenarios):
    """Return what `answer` returns for each of them, one after the other."""
    results = {name: answer(**scenario) for name, scenario in scenarios.items()}
    return results | {"told": stand_still()}


def answer(*, shares, settings, engine, rounds_between=0, times=1):
    """Answer this rank's share of the requests, one more every so many rounds; return what is known then."""
    runner = new_runner(settings)
    one = engine_of(runner, **engine)
    events = {}
    todo = [
        replace(request, id=f"{request.id}/{again}")
        for again in range(times)
        for request in mixed_requests(8)
        if int(request.id) in shares[dist.get_rank()]
    ]
    due = 0
    runner.wake(1)
    while todo or one.has_work or runner.is_awake:
        while todo and runner.num_rounds >= due:
            one.add(todo.pop(0))
            due += rounds_between
        if not todo and not one.has_work:
            runner.wake(2)  # as a router would: to sleep, all must have heard the same number
        for event in step_together(one, runner=runner):
            events.setdefault(event.id, []).append(event)
        one.check()
    return {
        "tokens": tokens_of(events),
        "stats": runner.stats(),
        "slots": [layer.placement.slots for layer in runner._slots],
        "rounds": runner.num_rounds,
        "held": one.stats().num_pages_in_use,
        "wrong weights": wrong_weights(runner),
    }


def wrong_weights(runner):
    """Return the slots of this rank that hold other weights than the placement says."""
    whole = model_of(1, dtype=torch.float64)
    blocks = [whole.layers[1], whole.mtp[0].block]
    return [
        (layer, slot)
        for layer, (slots, block, known) in enumerate(zip(runner._slots, runner._blocks, blocks, strict=True))
        for slot, expert in enumerate(slots.placement.experts_of(dist.get_rank()))
        if not torch.equal(block.mlp.experts.gate_up_proj[slot], known.mlp.experts.gate_up_proj[expert])
        or not torch.equal(block.mlp.experts.down_proj[slot], known.mlp.experts.down_proj[expert])
    ]


def stand_still():
    """Rank 1 stops in the middle of its work; return what rank 0 is told."""
    group = dist.new_group(timeout=timedelta(seconds=1))
    runner = new_runner({}, group=group)
    engine = engine_of(runner)
    engine.add(mixed_requests(1)[0])
    runner.wake(1)
    told = ""
    try:
        while dist.get_rank() == 0 or runner.num_rounds < 3:
            step_together(engine, runner=runner)
    except RankLostError as error:
        told = str(error)
    dist.barrier()
    return told
