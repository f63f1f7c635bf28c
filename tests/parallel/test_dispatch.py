"""Tokens that travel to their experts' ranks come back as if the experts had been here."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from dsv3.errors import ConfigError
from dsv3.model.interfaces import Routing
from dsv3.model.moe import LocalDispatch
from dsv3.parallel.dispatch import AllToAllDispatch, Hop
from dsv3.parallel.exchange import Channel
from dsv3.parallel.wire import BF16, FP8
from dsv3.plan.stages import require_expert_ranks

TOKENS, HIDDEN, EXPERTS, CHOSEN = 23, 6, 8, 3


def inputs(seed, *, hotspot=False):
    """Return one rank's tokens and routing; with a hot spot, all of them go to the first experts."""
    generator = torch.Generator().manual_seed(seed)
    affinity = torch.rand(TOKENS + seed, EXPERTS, generator=generator, dtype=torch.float64)
    if hotspot:
        affinity = affinity * 1e-3 + torch.arange(EXPERTS, 0, -1)
    tokens = torch.randn(TOKENS + seed, HIDDEN, generator=generator, dtype=torch.float64, requires_grad=True)
    gates, experts = affinity.topk(CHOSEN)
    load = torch.bincount(experts.flatten(), minlength=EXPERTS)
    routing = Routing(experts=experts, gates=gates.requires_grad_(), affinity=affinity, load=load)
    return tokens, routing


def through(dispatch, *, tokens, routing, scales):
    """Run experts that each multiply by a number, and return output and gradients."""
    scales = scales.clone().requires_grad_()
    sent = dispatch.receive(dispatch.send(dispatch.announce(tokens, routing=routing)))
    rows = sent.rows * scales.repeat_interleave(torch.tensor(sent.rows_per_expert))[:, None] * sent.gates[:, None]
    output = dispatch.receive_back(dispatch.send_back(rows, dispatched=sent))
    output.pow(2).sum().backward()
    return output.detach(), tokens.grad, routing.gates.grad, scales.grad


def hops_of(*, per_node=0, **wires):
    """Return one hop to all ranks, or two over nodes of so many ranks."""
    rank, size = dist.get_rank(), dist.get_world_size()
    own = EXPERTS // size
    if not per_node:
        return [Hop(channel=Channel(group=dist.group.WORLD), experts_per_rank=own, **wires)]
    across = [dist.new_group(range(place, size, per_node)) for place in range(per_node)]
    within = [dist.new_group(range(first, first + per_node)) for first in range(0, size, per_node)]
    return [
        Hop(channel=Channel(group=across[rank % per_node]), experts_per_rank=own * per_node, **wires),
        Hop(channel=Channel(group=within[rank // per_node]), experts_per_rank=own, **wires),
    ]


def difference(a, b):
    return ((a - b).abs().max() / (1 + a.abs().max())).item()


def both_ways(hotspot, per_node):
    """Compare this rank's numbers with those of all experts being here; return differences and what was moved."""
    rank, size = dist.get_rank(), dist.get_world_size()
    per_rank = EXPERTS // size
    scales = torch.linspace(0.5, 2.0, EXPERTS, dtype=torch.float64)
    here = through(LocalDispatch(), scales=scales, **named(inputs(rank, hotspot=hotspot)))
    dispatch = AllToAllDispatch(hops=hops_of(per_node=per_node))
    mine = slice(rank * per_rank, (rank + 1) * per_rank)
    there = through(dispatch, scales=scales[mine], **named(inputs(rank, hotspot=hotspot)))
    differences = [difference(a, b) for a, b in zip(here[:3], there[:3], strict=True)]
    of_experts = here[3].clone()
    dist.all_reduce(of_experts)  # an expert learns from the tokens of all ranks
    differences.append(difference(of_experts[mine], there[3]))
    return differences, [hop.traffic for hop in dispatch.hops]


def named(pair):
    return {"tokens": pair[0], "routing": pair[1]}


@pytest.mark.parametrize(
    ("size", "per_node", "hotspot"),
    [
        (2, 0, False),
        pytest.param(4, 0, True, marks=pytest.mark.slow),
        (4, 2, False),
        pytest.param(8, 4, True, marks=pytest.mark.slow),
        pytest.param(4, 2, True, marks=pytest.mark.slow),
        pytest.param(8, 2, False, marks=pytest.mark.slow),
    ],
)
def test_outputs_and_gradients_are_those_of_experts_that_are_here(on_ranks, size, per_node, hotspot):
    found = on_ranks(both_ways, size=size, hotspot=hotspot, per_node=per_node)
    for rank, (differences, traffic) in enumerate(found):
        assert max(differences) < 1e-12
        # By hand: each token goes once to every other rank, or node, that has any of its experts.
        _, routing = inputs(rank, hotspot=hotspot)
        ranks_behind = per_node or 1
        own = rank // ranks_behind
        targets = [set((row // (EXPERTS // size * ranks_behind)).tolist()) - {own} for row in routing.experts]
        copies = sum(map(len, targets))
        assert (traffic[0].tokens, traffic[0].copies) == (TOKENS + rank, copies)
        one = HIDDEN * 8 + CHOSEN * (8 + 8)  # a row, and for each choice a place and a gate
        assert traffic[0].dispatch_bytes == copies * one
    for hop in range(2 if per_node else 1):
        came_home = sum(traffic[hop].combine_bytes for _, traffic in found)
        assert came_home == sum(traffic[hop].copies for _, traffic in found) * HIDDEN * 8


@pytest.mark.slow
def test_two_hops_send_less_over_the_slow_link(on_ranks):
    """Over eight ranks in nodes of four: one copy a node instead of one a rank."""
    one = [traffic[0] for _, traffic in on_ranks(both_ways, size=8, hotspot=False, per_node=0)]
    two = [traffic for _, traffic in on_ranks(both_ways, size=8, hotspot=False, per_node=4)]
    to_other_nodes = 0
    for rank in range(8):
        _, routing = inputs(rank)
        own_node = rank // 4
        to_other_nodes += sum(
            len({expert for expert in row.tolist() if expert // 4 != own_node}) for row in routing.experts
        )  # a rank has one expert here, so that one hop would send as many copies
    over_slow_link = sum(traffic[0].copies for traffic in two)
    assert over_slow_link < to_other_nodes < sum(traffic.copies for traffic in one)


@pytest.mark.parametrize(("size", "nearest"), [(48, "32 or 64"), (3, "2 or 4"), (0, "1 or 2"), (300, "128 or 256")])
def test_ranks_that_experts_do_not_divide_over_are_refused_with_the_nearest(size, nearest):
    with pytest.raises(ConfigError, match=f"256, such as {nearest}"):
        require_expert_ranks(size, num_experts=256)


@given(st.integers(1, 64), st.integers(1, 64))
def test_whatever_divides_is_taken(size, factor):
    require_expert_ranks(size, num_experts=size * factor)


def over_the_wire():
    """Dispatch what E4M3 with such scales has already, and other numbers; return what became of both, and the bytes."""
    generator = torch.Generator().manual_seed(dist.get_rank())
    width = 200
    _, routing = inputs(dist.get_rank())
    tokens = torch.randn(len(routing.experts), width, generator=generator) * 50
    rounded = FP8.decode(FP8.encode(tokens), columns=width, dtype=torch.float32)
    routing = replace(routing, gates=routing.gates.detach().float())
    found = []
    for sample in (rounded, tokens):
        plain = AllToAllDispatch(hops=hops_of())
        wired = AllToAllDispatch(hops=hops_of(out=FP8, back=BF16))
        here, there = (one.receive(one.send(one.announce(sample, routing=routing))) for one in (plain, wired))
        home = wired.receive_back(wired.send_back(there.rows, dispatched=there))
        at_home = plain.receive_back(plain.send_back(there.rows, dispatched=here))
        found.append((here.rows, there.rows, home, at_home, wired.hops[0].traffic))
    return found


def test_fp8_on_the_wire_keeps_what_fp8_has_and_rounds_the_rest(on_ranks):
    for exact, other in on_ranks(over_the_wire, size=2):
        assert torch.equal(exact[0], exact[1])
        assert not torch.equal(other[0], other[1])
        assert ((other[0] - other[1]).abs() <= 2**-4 * other[0].abs() + 1e-2).all()
        for rows, wired, home, plain, traffic in (exact, other):
            del rows, wired
            assert ((home - plain).abs() <= 2**-7 * plain.abs() + 2**-8 * plain.abs().max()).all()
            # 200 numbers and 2 scales; for each choice a place and a gate.
            assert traffic.dispatch_bytes == traffic.copies * (200 + 2 * 4 + CHOSEN * (8 + 4))
            assert traffic.combine_bytes % (200 * 2) == 0


def test_a_token_of_the_published_width_takes_7392_bytes():
    """Fact of DeepEP and of the report: 7,168 bytes of E4M3 and 56 scales."""
    assert FP8.bytes_of(7168, dtype=torch.float32) == 7392
    assert BF16.bytes_of(7168, dtype=torch.float32) == 14336
