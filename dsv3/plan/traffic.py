"""Bytes that a rank sends to others: tokens to experts, activations along the pipeline, gradients to their sharers.

Links are NVLink within a node and InfiniBand (IB) between nodes (report 3.2.2).
"""

from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations, pairwise
from math import comb

from dsv3.config import ModelConfig, ParallelConfig, PretrainConfig
from dsv3.plan.hardware import Hardware
from dsv3.plan.ranks import RankPlan
from dsv3.plan.stages import Stages

TILE = 128
WOVEN = ("dualpipe", "dualpipe_v")
"""Schedules that weave a forward chunk into a backward one, so that tokens travel while other tokens are computed."""


def is_woven(parallel: ParallelConfig) -> bool:
    """Whether ranks work on two micro-batches at once: on one rank 'dualpipe' has no order to choose."""
    return parallel.schedule in WOVEN and (parallel.pipeline > 1 or parallel.schedule == "dualpipe_v")


@dataclass(frozen=True, kw_only=True)
class TokenTraffic:
    """What dispatch and combine of one layer send for one token, on average, to other ranks. Rows of one direction."""

    nodes: float
    """Other nodes that have experts for it: rows over IB, one a node however many experts there."""
    ranks: float
    """Other ranks that have experts for it: rows over NVLink, from the rank they have reached in the node."""
    dispatch_row: int
    """Bytes of a row on the way to experts, and of its gradient on the way to them in the backward pass."""
    combine_row: int
    """Bytes of a row on its way back."""

    def bytes_on(self, link: str) -> tuple[float, float]:
        """Return bytes of dispatch and of combine over a link; the backward pass sends as many."""
        rows = self.nodes if link == "IB" else self.ranks
        return rows * self.dispatch_row, rows * self.combine_row


def token_traffic(config: PretrainConfig, *, gpu: Hardware) -> TokenTraffic:
    """Return the rows of one token in one layer with experts, if every allowed choice of experts is equally likely.

    The expert axis lies on neighbouring ranks, so that over several nodes each has consecutive experts.

    Source: report 2.1.2 (node limit), 3.2.2 (one row a node over IB, then NVLink), 3.3.3 (FP8 there, BF16 back).
    """
    model, size = config.model, config.parallel.expert
    in_node = config.parallel.ranks_per_node or gpu.ranks_per_node
    num_nodes = max(1, size // in_node)
    hidden = model.hidden_size
    is_fp8 = config.parallel.wire == "fp8"
    computed = 2 * hidden
    other = (size - 1) / size
    nodes = expected_places(model, places=num_nodes) * (num_nodes - 1) / num_nodes
    ranks = expected_places(model, places=size)
    # Of those in other nodes one is reached over IB alone: the rank with the sender's own place in the node.
    within = ranks * (in_node - 1) / in_node if num_nodes > 1 else ranks * other
    return TokenTraffic(
        nodes=nodes,
        ranks=within,
        dispatch_row=hidden + 4 * -(-hidden // TILE) if is_fp8 else computed,
        combine_row=2 * hidden,
    )


def expected_places(model: ModelConfig, *, places: int) -> float:
    """Return in how many of `places` equal, consecutive shares of the experts a token finds its chosen experts.

    Source: the chances of drawing `num_experts_per_tok` experts, each set as likely, out of `topk_group` of the
    groups; the mean over the places.
    """
    limited = model.topk_method != "greedy"
    groups, open_groups = (model.n_group, model.topk_group) if limited else (1, 1)
    return _expected_places(model.n_routed_experts, groups, open_groups, model.num_experts_per_tok, places)


@lru_cache(maxsize=256)
def _expected_places(experts: int, groups: int, open_groups: int, chosen: int, places: int) -> float:
    in_group, in_place = experts // groups, experts // places
    reachable = open_groups * in_group
    every = comb(reachable, chosen)
    ways = list(combinations(range(groups), open_groups))
    found = 0.0
    for place in range(places):
        first, end = place * in_place, (place + 1) * in_place
        own = [max(0, min(end, (group + 1) * in_group) - max(first, group * in_group)) for group in range(groups)]
        misses = sum(comb(reachable - sum(own[group] for group in way), chosen) for way in ways)
        found += 1 - misses / (every * len(ways))
    return found


def link_between(config: PretrainConfig, *, gpu: Hardware, distance: int) -> str:
    """Return the link between ranks whose numbers lie so far apart."""
    in_node = config.parallel.ranks_per_node or gpu.ranks_per_node
    return gpu.link(within_node=distance < in_node)


@dataclass(frozen=True, kw_only=True)
class Flow:
    """Bytes that a rank sends in a step."""

    name: str
    link: str
    num_bytes: float
    is_hidden: bool
    """Whether it has other work beside it: that of a woven pair."""


def step_flows(
    config: PretrainConfig, *, gpu: Hardware, stages: Stages, place: RankPlan, data: int, micro_batches: int
) -> tuple[Flow, ...]:
    """Return all that a rank sends in a step: tokens and hidden states as the mean of ranks, gradients as `place` does.

    Tokens go to their experts and back in the forward pass, and their gradients the same ways in the backward pass.
    """
    model, parallel = config.model, config.parallel
    tokens = config.batch.micro_batch_sequences * config.batch.sequence_length / parallel.context * micro_batches
    woven = is_woven(parallel)
    routed = (model.num_moe_layers + model.num_nextn_predict_layers) / parallel.pipeline
    token = token_traffic(config, gpu=gpu)
    flows = []
    for link in ("IB", "NVLink"):
        dispatch, combine = token.bytes_on(link)
        flows += [
            Flow(name="expert dispatch", link=link, num_bytes=2 * tokens * routed * dispatch, is_hidden=woven),
            Flow(name="expert combine", link=link, num_bytes=2 * tokens * routed * combine, is_hidden=woven),
        ]
    crossings = sum(near != far for near, far in pairwise(stages.routes[0])) / parallel.pipeline
    hidden = 2 * 2 * tokens * model.hidden_size * crossings
    flows.append(
        Flow(
            name="pipeline sends",
            link=link_between(config, gpu=gpu, distance=data),
            num_bytes=hidden,
            is_hidden=woven,
        )
    )
    if parallel.context > 1:
        width = model.kv_lora_rank + model.qk_rope_head_dim
        layers = (model.num_hidden_layers + model.num_nextn_predict_layers) / parallel.pipeline
        link = link_between(config, gpu=gpu, distance=parallel.context - 1)
        latents = 2 * 2 * tokens * (parallel.context - 1) * width * layers
        flows.append(Flow(name="latents of shared rows", link=link, num_bytes=latents, is_hidden=woven))
    flows += _data_parallel(config, gpu=gpu, stages=stages, place=place, data=data)
    return tuple(flow for flow in flows if flow.num_bytes > 0)


def _data_parallel(config: PretrainConfig, *, gpu: Hardware, stages: Stages, place: RankPlan, data: int) -> list[Flow]:
    """Return what summing gradients in FP32 takes, and bringing stepped weights back in BF16 where ranks share them.

    Of n sharers each sends (n - 1) / n of the bytes, and twice as much where all of them get the whole sum.
    """
    found = []
    holders = len(stages.routes)
    for name, number, sharers, distance in (
        ("", place.shared_parameters, holders * data, data * holders - 1),
        (
            " of experts",
            place.expert_parameters,
            holders * data // config.parallel.expert,
            (data - config.parallel.expert) if holders == 1 else data,
        ),
    ):
        others = (sharers - 1) / sharers
        link = link_between(config, gpu=gpu, distance=max(0, distance))
        times = 1 if config.parallel.zero else 2
        found.append(Flow(name=f"gradients{name}", link=link, num_bytes=times * 4 * number * others, is_hidden=False))
        if config.parallel.zero:
            found.append(Flow(name=f"weights{name}", link=link, num_bytes=2 * number * others, is_hidden=False))
    return found
