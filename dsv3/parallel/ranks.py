"""The ranks that train together, and what they tell each other in a step.

All ranks read different rows. Routed experts are dealt out over the expert axis: consecutive ranks, each with
consecutive experts of every layer. What is not a routed expert is on every rank. So gradients of routed experts are
summed over the ranks that hold the same ones (the expert-data axis), and all others over all ranks, always in FP32; the
loss is already divided by what all ranks have (report 3.2, 4.2).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Int
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from dsv3.config import ParallelConfig
from dsv3.errors import ConfigError
from dsv3.model.interfaces import TokenDispatch
from dsv3.model.moe import Experts, LocalDispatch
from dsv3.model.transformer import Transformer
from dsv3.parallel.dispatch import AllToAllDispatch, Hop, require_expert_ranks
from dsv3.parallel.wire import AS_COMPUTED, BF16, FP8
from dsv3.runtime.rank import ranks_on_this_machine

EXPERT_DATA, EXPERT, NODE, IN_NODE = "expert_data", "expert", "node", "in_node"
"""Axes of the mesh, the slow one first: neighbouring ranks share the experts of a layer among them. Over several nodes
the expert axis falls into nodes, and ranks of one node."""


class Alone:
    """One rank that holds everything: nobody to talk to."""

    rank = 0
    size = 1

    @property
    def dispatch(self) -> TokenDispatch:
        """How tokens reach their experts."""
        return LocalDispatch()

    def deal_out_experts(self, model: Transformer) -> None:
        """Keep the experts that belong here: all."""

    def total(self, values: Sequence[int | float]) -> list[float]:
        """Return each number summed over all ranks."""
        return [float(value) for value in values]

    def total_loads(self, loads: Sequence[Int[Tensor, " expert"]]) -> list[Int[Tensor, " expert"]]:
        """Return expert loads summed over all ranks."""
        return list(loads)

    def reduce_gradients(self, gradients: Mapping[str, Tensor]) -> None:
        """Sum gradients, in place, over the ranks that hold the same weights."""

    def gradient_norm(self, gradients: Mapping[str, Tensor]) -> float:
        """Return the Euclidean norm of all gradients of all ranks as one vector, each weight counted once."""
        norms = torch._foreach_norm(list(gradients.values()))
        return torch.stack(norms).norm().item() if norms else 0.0

    def take_wire_bytes(self) -> int:
        """Return what dispatch and combine have sent from here, forward, since this was asked last."""
        return 0

    def gather(self, value: Any) -> list[Any]:
        """Return what every rank has given."""
        return [value]

    def whole_experts(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return tensors named as parameters with the experts of all ranks in them."""
        return dict(tensors)

    def own_experts(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return tensors named as parameters with only the experts that belong here."""
        return dict(tensors)


class Ranks(Alone):
    """All ranks of torch's process group, laid out over the axes."""

    def __init__(self, config: ParallelConfig, *, num_experts: int) -> None:
        """Lay out the ranks; every one of them must do so.

        Raises:
            ConfigError: they do not divide into groups of `config.expert`, or the experts do not divide over one.
        """
        world, expert = dist.get_world_size(), config.expert
        require_expert_ranks(expert, num_experts=num_experts)
        if world % expert:
            fitting = [size for size in range(1, world + 1) if world % size == 0 and num_experts % size == 0]
            raise ConfigError(
                f"{world} ranks do not divide into expert axes of {expert}; use {', '.join(map(str, fitting))} for "
                "parallel.expert, or another number of ranks"
            )
        self.rank, self.size = dist.get_rank(), world
        mesh = init_device_mesh("cpu", (world // expert, expert), mesh_dim_names=(EXPERT_DATA, EXPERT))
        everyone = dist.group.WORLD
        assert everyone is not None
        self._everyone: dist.ProcessGroup = everyone
        self._expert, self._expert_data = mesh.get_group(EXPERT), mesh.get_group(EXPERT_DATA)
        self.hops = self._hops(config, num_experts=num_experts)
        """Ways that tokens take to their experts, one after the other; none where all experts are here."""
        self._dispatch: TokenDispatch = AllToAllDispatch(hops=self.hops) if self.hops else LocalDispatch()
        self._wire_bytes = 0
        self._per_rank = num_experts // expert
        self._place = self._expert.rank()

    @property
    def dispatch(self) -> TokenDispatch:
        """How tokens reach their experts."""
        return self._dispatch

    def deal_out_experts(self, model: Transformer) -> None:
        """Keep the experts that belong here, out of all."""
        for module in model.modules():
            if isinstance(module, Experts):
                for name, parameter in module.named_parameters():
                    setattr(module, name, torch.nn.Parameter(self._own(parameter.data).clone()))

    def total(self, values: Sequence[int | float]) -> list[float]:
        """Return each number summed over all ranks, in FP64."""
        sums = torch.tensor(list(values), dtype=torch.float64)
        dist.all_reduce(sums)
        return sums.tolist()

    def total_loads(self, loads: Sequence[Int[Tensor, " expert"]]) -> list[Int[Tensor, " expert"]]:
        """Return expert loads summed over all ranks."""
        if not loads:
            return []
        sums = torch.stack(list(loads))
        dist.all_reduce(sums)
        return list(sums)

    def reduce_gradients(self, gradients: Mapping[str, Tensor]) -> None:
        """Sum gradients, in place, over the ranks that hold the same weights."""
        for group, mine in self._by_group(gradients):
            if mine and group.size() > 1:
                flat = torch.cat([gradient.reshape(-1) for gradient in mine])
                dist.all_reduce(flat, group=group)
                for gradient, total in zip(mine, flat.split([one.numel() for one in mine]), strict=True):
                    gradient.copy_(total.view_as(gradient))

    def gradient_norm(self, gradients: Mapping[str, Tensor]) -> float:
        """Return the Euclidean norm of all gradients of all ranks as one vector, each weight counted once."""
        (_, shared), (_, experts) = self._by_group(gradients)
        squares = torch.stack([_square(shared), _square(experts)])
        # Reduced, gradients of shared weights are the same on all ranks; those of experts are each rank's own.
        dist.all_reduce(squares[1:], group=self._expert)
        return squares.sum().sqrt().item()

    def take_wire_bytes(self) -> int:
        """Return what dispatch and combine have sent from here, forward, since this was asked last."""
        so_far = sum(hop.traffic.dispatch_bytes + hop.traffic.combine_bytes for hop in self.hops)
        taken, self._wire_bytes = so_far - self._wire_bytes, so_far
        return taken

    def gather(self, value: Any) -> list[Any]:
        """Return what every rank has given."""
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found

    def whole_experts(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return tensors named as parameters with the experts of all ranks in them."""
        whole = {}
        for name, tensor in tensors.items():
            if is_expert(name):
                parts = [torch.empty_like(tensor) for _ in range(self._expert.size())]
                dist.all_gather(parts, tensor.contiguous(), group=self._expert)
                whole[name] = torch.cat(parts)
            else:
                whole[name] = tensor
        return whole

    def own_experts(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return tensors named as parameters with only the experts that belong here."""
        return {name: self._own(tensor) if is_expert(name) else tensor for name, tensor in tensors.items()}

    def _hops(self, config: ParallelConfig, *, num_experts: int) -> tuple[Hop, ...]:
        """Return one hop to the ranks that hold experts, or two: to their nodes, then within these."""
        expert = config.expert
        if expert == 1:
            return ()
        out, back = (FP8, BF16) if config.wire == "fp8" else (AS_COMPUTED, AS_COMPUTED)
        per_node = config.ranks_per_node or ranks_on_this_machine()
        own = num_experts // expert
        if per_node >= expert or per_node == 1:
            return (Hop(group=self._expert, experts_per_rank=own, out=out, back=back),)
        if expert % per_node:
            raise ConfigError(
                f"parallel.expert = {expert} ranks share the experts and do not fill nodes of {per_node}; use a "
                f"multiple of {per_node}, or set parallel.ranks_per_node"
            )
        shape = (self.size // expert, expert // per_node, per_node)
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=(EXPERT_DATA, NODE, IN_NODE))
        return (
            Hop(group=mesh.get_group(NODE), experts_per_rank=own * per_node, out=out, back=back),
            Hop(group=mesh.get_group(IN_NODE), experts_per_rank=own, out=out, back=back),
        )

    def _own(self, tensor: Tensor) -> Tensor:
        return tensor[self._place * self._per_rank : (self._place + 1) * self._per_rank]

    def _by_group(self, gradients: Mapping[str, Tensor]) -> list[tuple[dist.ProcessGroup, list[Tensor]]]:
        shared = [gradient for name, gradient in gradients.items() if not is_expert(name)]
        experts = [gradient for name, gradient in gradients.items() if is_expert(name)]
        return [(self._everyone, shared), (self._expert_data, experts)]


def is_expert(name: str) -> bool:
    """Whether a parameter is the routed experts of a layer."""
    return ".experts." in name


def _square(tensors: list[Tensor]) -> Tensor:
    norms = torch._foreach_norm(tensors)
    return torch.stack(norms).double().square().sum() if norms else torch.zeros((), dtype=torch.float64)
