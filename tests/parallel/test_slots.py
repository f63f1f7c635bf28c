"""Tokens reach a copy of each expert chosen for them, the least loaded one, and come back as if all had been here."""

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from dsv3.model.interfaces import Routing
from dsv3.model.moe import LocalDispatch
from dsv3.parallel.dispatch import AllToAllDispatch, Hop
from dsv3.parallel.exchange import Channel
from dsv3.parallel.slots import FixedDispatch, LayerSlots, SlotChoice, SlotDispatch
from dsv3.plan.placement import Placement, place_experts

HIDDEN, EXPERTS, CHOSEN, SLOTS = 6, 8, 3, 12


def routing_of(num_tokens, *, seed):
    generator = torch.Generator().manual_seed(seed)
    affinity = torch.rand(num_tokens, EXPERTS, generator=generator, dtype=torch.float64)
    gates, experts = affinity.topk(CHOSEN)
    return Routing(
        experts=experts, gates=gates, affinity=affinity, load=torch.bincount(experts.flatten(), minlength=EXPERTS)
    )


def run_through(dispatch, *, tokens, routing, scales):
    """Run experts, or copies of them, that each multiply by a number."""
    sent = dispatch.receive(dispatch.send(dispatch.announce(tokens, routing=routing)))
    rows = sent.rows * scales.repeat_interleave(torch.tensor(sent.rows_per_expert))[:, None] * sent.gates[:, None]
    return dispatch.receive_back(dispatch.send_back(rows, dispatched=sent)), rows


def exchange():
    """Return, for each way and number of tokens, how far off this rank's outputs are, and the rows computed here."""
    rank, size = dist.get_rank(), dist.get_world_size()
    placement = place_experts([1] * EXPERTS, num_slots=SLOTS, num_devices=size)
    channel = Channel(group=dist.group.WORLD)
    scales = torch.arange(1.0, EXPERTS + 1, dtype=torch.float64)
    found = []
    for way in ("told", "fixed"):
        for num in (5 + rank, 7 * rank, 0):
            tokens = torch.randn(num, HIDDEN, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)
            routing = routing_of(num, seed=rank)
            through = (
                AllToAllDispatch(hops=(Hop(channel=channel, experts_per_rank=SLOTS // size),))
                if way == "told"
                else FixedDispatch(channel=channel, slots_per_rank=SLOTS // size, capacity=8)
            )
            layer = LayerSlots(choice=SlotChoice(placement=placement, rank=rank))
            here = scales[list(placement.experts_of(rank))]
            output, rows = run_through(
                SlotDispatch(layers=[layer], through=through), tokens=tokens, routing=routing, scales=here
            )
            expected, _ = run_through(LocalDispatch(), tokens=tokens, routing=routing, scales=scales)
            found.append(
                (way, num, float((output - expected).abs().sum()), layer.num_rows == len(rows), layer.counts.tolist())
            )
    return found


def test_outputs_are_those_of_experts_that_are_all_here(on_ranks):
    for rank, results in enumerate(on_ranks(exchange, size=2)):
        assert [(way, num) for way, num, *_ in results] == [
            (way, num) for way in ("told", "fixed") for num in (5 + rank, 7 * rank, 0)
        ]
        for _, num, difference, counts_rows, counts in results:
            assert difference < 1e-12
            assert counts_rows
            assert sum(counts) == num * CHOSEN


@given(st.data())
def test_each_token_goes_to_a_copy_of_its_expert_and_copies_share_evenly(data):
    num_devices = data.draw(st.sampled_from([1, 2, 4]))
    num_experts = data.draw(st.integers(1, 6))
    copies = data.draw(st.lists(st.integers(0, num_experts - 1), max_size=6))
    slots = [*range(num_experts), *copies]
    slots = data.draw(st.permutations(slots + [0] * (-len(slots) % num_devices)))
    tokens = data.draw(st.lists(st.integers(0, num_experts - 1), max_size=40))
    rank = data.draw(st.integers(0, num_devices - 1))
    placement = Placement(slots=tuple(slots), num_experts=num_experts, num_devices=num_devices)
    chosen = SlotChoice(placement=placement, rank=rank).slots_for(torch.tensor(tokens, dtype=torch.long)[:, None])
    assert [placement.slots[slot] for slot in chosen.flatten().tolist()] == tokens
    if len(set(tokens)) == 1:
        homes = {placement.device_of(slot) for slot in placement.copies[tokens[0]]}
        loads = [[placement.device_of(slot) for slot in chosen.flatten().tolist()].count(home) for home in homes]
        assert max(loads) - min(loads) <= 1


@pytest.mark.parametrize("rank", [0, 1])
def test_of_equal_copies_the_one_on_the_own_device_is_taken(rank):
    placement = Placement(slots=(0, 1, 0, 1), num_experts=2, num_devices=2)
    slots = SlotChoice(placement=placement, rank=rank).slots_for(torch.tensor([[1]]))
    assert placement.device_of(int(slots)) == rank
