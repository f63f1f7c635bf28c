"""Tokens that travel to their experts' ranks come back as if the experts had been here."""

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from dsv3.errors import ConfigError
from dsv3.model.interfaces import Routing
from dsv3.model.moe import LocalDispatch
from dsv3.parallel.dispatch import AllToAllDispatch, require_expert_ranks

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
    sent = dispatch.dispatch(tokens, routing=routing)
    rows = sent.rows * scales.repeat_interleave(torch.tensor(sent.rows_per_expert))[:, None] * sent.gates[:, None]
    output = dispatch.combine(rows, dispatched=sent)
    output.pow(2).sum().backward()
    return output.detach(), tokens.grad, routing.gates.grad, scales.grad


def difference(a, b):
    return ((a - b).abs().max() / (1 + a.abs().max())).item()


def both_ways(hotspot):
    """Compare this rank's numbers with those of all experts being here; return differences and what was moved."""
    rank, size = dist.get_rank(), dist.get_world_size()
    per_rank = EXPERTS // size
    scales = torch.linspace(0.5, 2.0, EXPERTS, dtype=torch.float64)
    here = through(LocalDispatch(), scales=scales, **named(inputs(rank, hotspot=hotspot)))
    group = dist.group.WORLD
    dispatch = AllToAllDispatch(group=group, num_experts=EXPERTS)
    mine = slice(rank * per_rank, (rank + 1) * per_rank)
    there = through(dispatch, scales=scales[mine], **named(inputs(rank, hotspot=hotspot)))
    differences = [difference(a, b) for a, b in zip(here[:3], there[:3], strict=True)]
    of_experts = here[3].clone()
    dist.all_reduce(of_experts)  # an expert learns from the tokens of all ranks
    differences.append(difference(of_experts[mine], there[3]))
    return differences, dispatch.traffic


def named(pair):
    return {"tokens": pair[0], "routing": pair[1]}


@pytest.mark.parametrize("hotspot", [False, True], ids=["even", "all to one rank"])
@pytest.mark.parametrize("size", [2, 4])
def test_outputs_and_gradients_are_those_of_experts_that_are_here(on_ranks, size, hotspot):
    for rank, (differences, traffic) in enumerate(on_ranks(both_ways, size=size, hotspot=hotspot)):
        assert max(differences) < 1e-12
        _, routing = inputs(rank, hotspot=hotspot)
        # By hand: each token goes once to every other rank that has any of its experts.
        targets = [set((row // (EXPERTS // size)).tolist()) - {rank} for row in routing.experts]
        copies = sum(map(len, targets))
        assert (traffic.tokens, traffic.copies_sent) == (TOKENS + rank, copies)
        one = HIDDEN * 8 + CHOSEN * (8 + 8)  # a row, and for each choice a place and a gate
        assert traffic.dispatch_bytes == copies * one


def test_what_goes_back_is_what_came(on_ranks):
    found = [traffic for _, traffic in on_ranks(both_ways, size=4, hotspot=False)]
    assert sum(traffic.combine_bytes for traffic in found) == sum(traffic.copies_sent for traffic in found) * HIDDEN * 8


@pytest.mark.parametrize(("size", "nearest"), [(48, "32 or 64"), (3, "2 or 4"), (0, "1 or 2"), (300, "128 or 256")])
def test_ranks_that_experts_do_not_divide_over_are_refused_with_the_nearest(size, nearest):
    with pytest.raises(ConfigError, match=f"256, such as {nearest}"):
        require_expert_ranks(size, num_experts=256)


@given(st.integers(1, 64), st.integers(1, 64))
def test_whatever_divides_is_taken(size, factor):
    require_expert_ranks(size, num_experts=size * factor)
