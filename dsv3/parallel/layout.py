"""Where each rank stands: which stages of the model it has, which experts, and with whom it shares what.

The axes, slowest first: pipeline, expert-data, expert. Neighbouring ranks share the experts of a layer among them; a
pipeline's ranks read the same rows, all others different ones. Neighbours that share rows have different tokens of
them, and are as any others in everything but attention.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product

import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from dsv3.config import ModelConfig, ParallelConfig
from dsv3.errors import ConfigError
from dsv3.parallel.context import ContextGroup
from dsv3.parallel.dispatch import Hop
from dsv3.parallel.exchange import Channel
from dsv3.parallel.link import Link
from dsv3.parallel.wire import AS_COMPUTED, BF16, FP8
from dsv3.plan.stages import make_stages, require_expert_ranks, require_whole_pipelines
from dsv3.runtime.rank import ranks_on_this_machine

PIPELINE, EXPERT_DATA, EXPERT, NODE, IN_NODE = "pipeline", "expert_data", "expert", "node", "in_node"
"""Axes of the mesh. Over several nodes the expert axis falls into nodes, and ranks of one node."""


def is_expert(name: str) -> bool:
    """Whether a parameter is the routed experts of a layer."""
    return ".experts." in name


@dataclass(frozen=True, kw_only=True)
class Sharers:
    """Ranks that hold the very same weights."""

    group: dist.ProcessGroup
    size: int
    place: int
    """This rank's, among them."""
    num_pipeline_ranks: int
    """In how many places of the pipeline they are."""

    def rows(self, count: int, *, place: int) -> slice:
        """Return the rows, of so many, that fall to one of them."""
        return slice(count * place // self.size, count * (place + 1) // self.size)


class Layout:
    """This rank's place. Every rank makes one, in the same moment."""

    def __init__(self, config: ParallelConfig, *, model: ModelConfig, sequence_length: int, link: Link) -> None:
        """Find it.

        Raises:
            ConfigError: the ranks do not divide into pipelines and groups of `config.expert` or `config.context`, or
                the experts or layers do not divide over them.
        """
        num_experts = model.n_routed_experts
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        require_expert_ranks(config.expert, num_experts=num_experts)
        require_whole_pipelines(config, world=self.size, num_experts=num_experts)
        self.config = config
        self.stages = make_stages(config, model=model, sequence_length=sequence_length)
        self.data_size = self.size // config.pipeline
        self.pipeline_rank, self.data_rank = divmod(self.rank, self.data_size)
        self.expert_rank = self.data_rank % config.expert
        self.experts_per_rank = num_experts // config.expert
        shape = (config.pipeline, self.data_size // config.expert, config.expert)
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=(PIPELINE, EXPERT_DATA, EXPERT))
        self.pipeline = mesh.get_group(PIPELINE)
        self.towards_first = self._second_pipeline()
        """The same ranks once more: each way between two of them has a channel of its own, so that on one that keeps
        the order of calls (NCCL) a rank that gets ready to receive does not hold up what it sends."""
        self.context = self._context(link)
        self.hops = self._hops(mesh.get_group(EXPERT), link=link)
        self._sharers = self._find_sharers()

    @property
    def held_stages(self) -> tuple[int, ...]:
        """Stages that this rank holds."""
        return self.stages.held_by(self.pipeline_rank)

    @property
    def in_order(self) -> tuple[Sharers, ...]:
        """Every group of sharers that this rank is in; two ranks that are in the same ones have them in one order."""
        return tuple(self._sharers.values())

    def sharers(self, name: str) -> Sharers:
        """Return the ranks that hold the same parameter, this one among them."""
        return self._sharers[self.stages.holders(name), is_expert(name)]

    def writes(self, name: str) -> bool:
        """Whether this is the first of the ranks that hold the same parameter or buffer."""
        return self.sharers(name).place == 0

    def first_row(self, name: str) -> int:
        """Return which row of the whole model's parameter the first row here is: of experts, the first one here."""
        return self.expert_rank * self.experts_per_rank if is_expert(name) else 0

    def _own_group(self, groups: Iterable[Iterable[int]]) -> tuple[dist.ProcessGroup, list[int]] | None:
        """Make a group of each, which all ranks must do; return the one that this rank is in, and its ranks."""
        mine = None
        for members in groups:
            ranks = sorted(members)
            group = dist.new_group(ranks)
            if self.rank in ranks:
                mine = (group, ranks)
        return mine

    def _second_pipeline(self) -> dist.ProcessGroup:
        pipelines = (range(place, self.size, self.data_size) for place in range(self.data_size))
        mine = self._own_group(pipelines)
        assert mine is not None, "every rank is in a pipeline"
        return mine[0]

    def _context(self, link: Link) -> ContextGroup | None:
        """Return the ranks that share this one's rows, or None where it has rows of its own."""
        size = self.config.context
        if size == 1:
            return None
        mine = self._own_group(range(first, first + size) for first in range(0, self.size, size))
        assert mine is not None, "the ranks divide into groups that share rows"
        group, ranks = mine
        return ContextGroup(group=group, size=size, place=ranks.index(self.rank), link=link)

    def _find_sharers(self) -> dict[tuple[tuple[int, ...], bool], Sharers]:
        ends = (f"layers.{layers.start}" for layers in self.stages.layers)
        found = {}
        for holders in sorted({self.stages.holders(name) for name in (*ends, "embed_tokens", "lm_head")}):
            everyone = [rank for pipe in holders for rank in self._data_ranks(pipe, range(self.config.expert))]
            found[holders, False] = self._sharers_of([everyone], num_pipeline_ranks=len(holders))
            by_expert = [
                [rank for pipe in holders for rank in self._data_ranks(pipe, (expert,))]
                for expert in range(self.config.expert)
            ]
            found[holders, True] = self._sharers_of(by_expert, num_pipeline_ranks=len(holders))
        return {key: sharers for key, sharers in found.items() if sharers is not None}

    def _data_ranks(self, pipe: int, experts: Iterable[int]) -> list[int]:
        groups = range(self.data_size // self.config.expert)
        return [
            pipe * self.data_size + group * self.config.expert + expert for group, expert in product(groups, experts)
        ]

    def _sharers_of(self, groups: list[list[int]], *, num_pipeline_ranks: int) -> Sharers | None:
        """Make a group of each, which all ranks must do, and return the one that this rank is in."""
        mine = self._own_group(groups)
        if mine is None:
            return None
        group, ranks = mine
        return Sharers(
            group=group, size=len(ranks), place=ranks.index(self.rank), num_pipeline_ranks=num_pipeline_ranks
        )

    def _hops(self, across: dist.ProcessGroup, *, link: Link) -> tuple[Hop, ...]:
        """Return one hop to the ranks that hold experts, or two: to their nodes, then within these."""
        expert, own = self.config.expert, self.experts_per_rank
        if expert == 1:
            return ()
        out, back = (FP8, BF16) if self.config.wire == "fp8" else (AS_COMPUTED, AS_COMPUTED)
        per_node = self.config.ranks_per_node or ranks_on_this_machine()
        if per_node >= expert or per_node == 1:
            return (Hop(channel=Channel(group=across, link=link), experts_per_rank=own, out=out, back=back),)
        if expert % per_node:
            raise ConfigError(
                f"parallel.expert = {expert} ranks share the experts and do not fill nodes of {per_node}; use a "
                f"multiple of {per_node}, or set parallel.ranks_per_node"
            )
        shape = (self.size // expert, expert // per_node, per_node)
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=(EXPERT_DATA, NODE, IN_NODE))
        between, within = (mesh.get_group(axis) for axis in (NODE, IN_NODE))
        return (
            Hop(channel=Channel(group=between, link=link), experts_per_rank=own * per_node, out=out, back=back),
            Hop(channel=Channel(group=within), experts_per_rank=own, out=out, back=back),
        )
