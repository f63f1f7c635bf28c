"""Bytes that a rank sends to others: tokens to experts, activations along the pipeline, gradients to their sharers.

Links are NVLink within a node and InfiniBand (IB) between nodes (report 3.2.2).
"""

from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from math import comb

from dsv3.config import ModelConfig, PretrainConfig
from dsv3.plan.hardware import Hardware

TILE = 128


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


@dataclass(frozen=True, kw_only=True)
class Flow:
    """Bytes that one rank sends in a step, the busiest rank where they differ."""

    name: str
    link: str
    num_bytes: float
    why: str


def link_between(config: PretrainConfig, *, gpu: Hardware, distance: int) -> str:
    """Return the link between ranks whose numbers lie so far apart at most."""
    in_node = config.parallel.ranks_per_node or gpu.ranks_per_node
    return gpu.link(within_node=distance < in_node)
