"""The ranks that train together, and what they tell each other in a step.

Ranks of one pipeline read the same rows and each does its stages of them; all others read different rows, or different
tokens of them where ranks share rows. Routed experts are dealt out over the expert axis, consecutive ones to each rank.
Gradients are summed over all ranks that hold the same weights, always in FP32; the loss is already divided by what all
ranks have (report 3.2, 4.2).
"""

from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Int
from torch import Tensor, nn

from dsv3.batch import TokenBatch
from dsv3.config import ModelConfig, ParallelConfig
from dsv3.model.block import run_through
from dsv3.model.interfaces import ModelOutput, Part, TokenDispatch
from dsv3.model.moe import Experts, LocalDispatch
from dsv3.model.transformer import Transformer
from dsv3.parallel.dispatch import AllToAllDispatch
from dsv3.parallel.layout import Layout, Sharers, is_expert
from dsv3.parallel.link import Link
from dsv3.parallel.messages import Messages
from dsv3.parallel.pipeline import ChunkWork, Pipeline
from dsv3.parallel.rows import gather_rows, reduce_rows
from dsv3.parallel.trace import Trace
from dsv3.plan.schedules import one_f_one_b
from dsv3.plan.stages import fewest_micro_batches, make_schedule

Layers = Callable[[range, Tensor | None], Generator[Part, None, ModelOutput]]
"""Runs layers on hidden states, the first ones on none: `Transformer.steps`."""
Room = Callable[[int], Tensor]
"""Makes room for the hidden states of a micro-batch, by its number."""


class Alone:
    """One rank that holds everything: nobody to talk to."""

    def __init__(self) -> None:
        self.rank = self.row_rank = 0
        self.size = self.row_size = 1
        self.link = Link()
        self.trace = Trace()

    @property
    def dispatch(self) -> TokenDispatch:
        """How tokens reach their experts."""
        return LocalDispatch()

    def share_rows(self, batch: TokenBatch) -> TokenBatch:
        """Return the tokens of a batch's rows that are this rank's: all."""
        return batch

    def keep_own(self, model: Transformer) -> None:
        """Let go of the layers and experts that belong to others: of none."""

    def own_rows(self, parameters: Mapping[str, Tensor]) -> dict[str, slice]:
        """Return for each parameter that is here the rows whose optimizer state belongs here: all."""
        return {name: slice(0, len(parameter)) for name, parameter in parameters.items()}

    def run(self, work: ChunkWork, *, num_layers: int, num_micro_batches: int, room: Room) -> None:
        """Go forward and backward with all micro-batches, in the order of the schedule."""
        del room
        schedule = one_f_one_b(num_ranks=1, num_micro_batches=num_micro_batches)
        Pipeline(schedule=schedule, rank=0, layers=(range(num_layers),), work=work, trace=self.trace).run()

    def run_forward(self, steps: Layers, *, num_layers: int, room: Room) -> list[tuple[range, ModelOutput]]:
        """Go forward with one micro-batch; return the stages that are here and what each has made."""
        del room
        layers = range(num_layers)
        return [(layers, run_through(steps(layers, None)))]

    @property
    def fewest_micro_batches(self) -> int:
        """Micro-batches that a run needs at least."""
        return 1

    def require_micro_batches(self, number: int) -> None:
        """Refuse a number of micro-batches that the schedule cannot work with."""

    def total(self, values: Sequence[int | float]) -> list[float]:
        """Return each number summed over all ranks."""
        return [float(value) for value in values]

    def total_over_data(self, values: Sequence[int | float]) -> list[float]:
        """Return each number summed over the ranks that read different rows, or different tokens of them."""
        return [float(value) for value in values]

    def total_over_pipeline(self, values: Sequence[int | float]) -> list[float]:
        """Return each number summed over the ranks that read the same rows."""
        return [float(value) for value in values]

    def total_loads(self, loads: Int[Tensor, "layer expert"], *, over_data: bool = True) -> Int[Tensor, "layer expert"]:
        """Return expert loads summed over all ranks, or with `over_data` False over those that read the same rows."""
        del over_data
        return loads

    def lacking(self, names: Sequence[str], *, gradients: Mapping[str, Tensor]) -> list[str]:
        """Return the parameters that have no gradient here and one on another rank that holds them."""
        del names, gradients
        return []

    def reduce_gradients(self, gradients: Mapping[str, Tensor]) -> None:
        """Sum gradients, in place, over the ranks that hold the same weights."""

    def gradient_norm(self, gradients: Mapping[str, Tensor]) -> float:
        """Return the Euclidean norm of all gradients of all ranks as one vector, each weight counted once.

        `gradients` are those of the rank's own rows.
        """
        norms = torch._foreach_norm(list(gradients.values()))
        return torch.stack(norms).double().square().sum().sqrt().item() if norms else 0.0

    def share_weights(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Give the rows that were stepped here to all ranks that hold the same parameters, and take theirs."""

    def whole_rows(self, tensors: Mapping[str, Tensor], *, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return what is kept for own rows alone, for all rows of each parameter; `like` are the parameters here."""
        del like
        return dict(tensors)

    def take_wire_bytes(self) -> int:
        """Return what dispatch and combine have sent from here, forward, since this was asked last."""
        return 0

    def gather(self, value: Any) -> list[Any]:
        """Return what every rank has given."""
        return [value]

    def first_row(self, name: str) -> int:
        """Return which row of the whole model's parameter the first row here is."""
        del name
        return 0

    def gather_numbers(self, values: Sequence[float]) -> list[list[float]]:
        """Return the numbers that every rank has given, as many from each."""
        return [list(values)]

    def num_rows(self, name: str, *, here: int) -> int:
        """Return how many rows the whole model's parameter has, of which so many are here."""
        del name
        return here

    def writes(self, name: str) -> bool:
        """Whether this is the rank that writes a parameter or buffer down, of those that hold the same."""
        del name
        return True


class Ranks(Alone):
    """All ranks of torch's process group, each in its place."""

    def __init__(
        self, config: ParallelConfig, *, model: ModelConfig, sequence_length: int, link: Link | None = None
    ) -> None:
        """Give every rank its place; all of them must do so.

        Raises:
            ConfigError: they do not divide as `config` wants it, or experts or layers do not divide over them.
        """
        super().__init__()
        self.link = link or Link()
        self.link.trace = self.trace
        self.layout = Layout(config, model=model, sequence_length=sequence_length, link=self.link)
        self.rank, self.size = self.layout.rank, self.layout.size
        self.row_rank = self.layout.data_rank // config.context
        self.row_size = self.layout.data_size // config.context
        """How many are given different rows."""
        self.hops = self.layout.hops
        """Ways that tokens take to their experts, one after the other; none where all experts are here."""
        self._dispatch: TokenDispatch = AllToAllDispatch(hops=self.hops) if self.hops else LocalDispatch()
        self._wire_bytes = 0

    @property
    def dispatch(self) -> TokenDispatch:
        """How tokens reach their experts."""
        return self._dispatch

    def share_rows(self, batch: TokenBatch) -> TokenBatch:
        """Return the tokens of a batch's rows that are this rank's."""
        return batch if self.layout.context is None else self.layout.context.share(batch)

    def keep_own(self, model: Transformer) -> None:
        """Let go of the layers and experts that belong to others."""
        stages, held = self.layout.stages, self.layout.held_stages
        last = len(stages.layers) - 1
        model.keep_only(
            [layer for stage in held for layer in stages.layers[stage]],
            embedding=self.layout.pipeline_rank in stages.holders("embed_tokens"),
            end=last in held,
        )
        own = slice(self.layout.first_row(".experts."), None)
        for module in model.modules():
            if isinstance(module, Experts):
                for name, parameter in module.named_parameters():
                    kept = parameter.data[own][: self.layout.experts_per_rank].clone()
                    setattr(module, name, nn.Parameter(kept))

    def own_rows(self, parameters: Mapping[str, Tensor]) -> dict[str, slice]:
        """Return for each parameter that is here the rows whose optimizer state belongs here."""
        if not self.layout.config.zero:
            return super().own_rows(parameters)
        of_names = {name: self.layout.sharers(name) for name in parameters}
        return {name: sharers.rows(len(parameters[name]), place=sharers.place) for name, sharers in of_names.items()}

    def run(self, work: ChunkWork, *, num_layers: int, num_micro_batches: int, room: Room) -> None:
        """Go forward and backward with all micro-batches, in the order of the schedule."""
        del num_layers
        schedule = make_schedule(self.layout.config, num_micro_batches=num_micro_batches)
        messages = None
        if schedule.num_ranks > 1:
            messages = Messages(
                schedule=schedule,
                towards_last=self.layout.pipeline,
                towards_first=self.layout.towards_first,
                link=self.link,
                room=room,
            )
        Pipeline(
            schedule=schedule,
            rank=self.layout.pipeline_rank,
            layers=self.layout.stages.layers,
            work=work,
            messages=messages,
            trace=self.trace,
        ).run()

    def run_forward(self, steps: Layers, *, num_layers: int, room: Room) -> list[tuple[range, ModelOutput]]:
        """Go forward with one micro-batch, stage after stage; return those that are here and what each has made."""
        del num_layers
        stages, route = self.layout.stages.layers, self.layout.stages.routes[0]
        group, here = self.layout.pipeline, self.layout.pipeline_rank
        found: list[tuple[range, ModelOutput]] = []
        hidden: Tensor | None = None
        leaving: list[tuple[dist.Work | None, Tensor]] = []
        for stage, (layers, rank) in enumerate(zip(stages, route, strict=True)):
            if rank != here:
                continue
            if stage and route[stage - 1] != here:
                hidden = room(0)
                with self.link.waiting():
                    dist.recv(hidden, group=group, group_src=route[stage - 1])
            output = run_through(steps(layers, hidden))
            found.append((layers, output))
            hidden = output.before_norm.contiguous()
            if stage + 1 < len(stages) and route[stage + 1] != here:
                leaving.append((dist.isend(hidden, group=group, group_dst=route[stage + 1]), hidden))
        with self.link.waiting():
            for work, _ in leaving:
                assert work is not None
                work.wait()
        return found

    @property
    def fewest_micro_batches(self) -> int:
        """Micro-batches that a run needs at least."""
        return fewest_micro_batches(self.layout.config)

    def require_micro_batches(self, number: int) -> None:
        """Refuse a number of micro-batches that the schedule cannot work with.

        Raises:
            ConfigError: says which numbers it can work with.
        """
        make_schedule(self.layout.config, num_micro_batches=number)

    def total(self, values: Sequence[int | float]) -> list[float]:
        """Return each number summed over all ranks, in FP64."""
        sums = torch.tensor(list(values), dtype=torch.float64)
        with self.link.waiting():
            dist.all_reduce(sums)
        return sums.tolist()

    def total_over_data(self, values: Sequence[int | float]) -> list[float]:
        """Return each number summed over the ranks that read different rows, or different tokens of them, in FP64."""
        counts = self.layout.pipeline_rank == 0
        return self.total([value if counts else 0 for value in values])

    def total_over_pipeline(self, values: Sequence[int | float]) -> list[float]:
        """Return each number summed over the ranks that read the same rows, in FP64."""
        sums = torch.tensor(list(values), dtype=torch.float64)
        with self.link.waiting():
            dist.all_reduce(sums, group=self.layout.pipeline)
        return sums.tolist()

    def total_loads(self, loads: Int[Tensor, "layer expert"], *, over_data: bool = True) -> Int[Tensor, "layer expert"]:
        """Return expert loads summed over all ranks, or with `over_data` False over those that read the same rows."""
        sums = loads.clone()
        with self.link.waiting():
            dist.all_reduce(sums, group=None if over_data else self.layout.pipeline)
        return sums

    def lacking(self, names: Sequence[str], *, gradients: Mapping[str, Tensor]) -> list[str]:
        """Return the parameters that have no gradient here and one on another rank that holds them.

        Such as the embedding beside the last stage, on rows of which MTP modules have read nothing.
        """
        found = []
        for sharers in self.layout.in_order:
            if sharers.num_pipeline_ranks > 1:
                mine = sorted(name for name in names if self.layout.sharers(name) is sharers)
                has = torch.tensor([name in gradients for name in mine], dtype=torch.uint8)
                anywhere = has.clone()
                with self.link.waiting():
                    dist.all_reduce(anywhere, op=dist.ReduceOp.MAX, group=sharers.group)
                found += [name for name, one in zip(mine, (anywhere > has).tolist(), strict=True) if one]
        return found

    def reduce_gradients(self, gradients: Mapping[str, Tensor]) -> None:
        """Sum gradients, in place, over the ranks that hold the same weights.

        Where these share the optimizer's state, only the sums of a rank's own rows are made: the others keep what they
        had, which is of no use.
        """
        for sharers, named in self._by_sharers(gradients):
            if self.layout.config.zero:
                reduce_rows(list(named.values()), sharers=sharers, link=self.link)
                continue
            flat = torch.cat([gradient.reshape(-1) for gradient in named.values()])
            with self.link.waiting():
                dist.all_reduce(flat, group=sharers.group)
            sums = flat.split([gradient.numel() for gradient in named.values()])
            for gradient, total in zip(named.values(), sums, strict=True):
                gradient.copy_(total.view_as(gradient))

    def gradient_norm(self, gradients: Mapping[str, Tensor]) -> float:
        """Return the Euclidean norm of all gradients of all ranks as one vector, each weight counted once.

        `gradients` are those of the rank's own rows.
        """
        square = torch.zeros((), dtype=torch.float64)
        by_copies: dict[int, list[Tensor]] = {}
        for name, gradient in gradients.items():
            copies = 1 if self.layout.config.zero else self.layout.sharers(name).size
            by_copies.setdefault(copies, []).append(gradient)
        for copies, mine in by_copies.items():
            square += torch.stack(torch._foreach_norm(mine)).double().square().sum().cpu() / copies
        with self.link.waiting():
            dist.all_reduce(square)
        return square.sqrt().item()

    @torch.no_grad()
    def share_weights(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Give the rows that were stepped here to all ranks that hold the same parameters, and take theirs."""
        if self.layout.config.zero:
            own = self.own_rows(parameters)
            rows = {name: parameter.data[own[name]] for name, parameter in parameters.items()}
            for name, whole in self.whole_rows(rows, like=parameters).items():
                parameters[name].data.copy_(whole)

    def whole_rows(self, tensors: Mapping[str, Tensor], *, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return what is kept for own rows alone, for all rows of each parameter; `like` are the parameters here."""
        whole = dict(tensors)
        if self.layout.config.zero:
            for sharers, named in self._by_sharers(tensors):
                whole |= gather_rows(named, like=like, sharers=sharers, link=self.link)
        return whole

    def take_wire_bytes(self) -> int:
        """Return what dispatch and combine have sent from here, forward, since this was asked last."""
        so_far = sum(hop.traffic.dispatch_bytes + hop.traffic.combine_bytes for hop in self.hops)
        taken, self._wire_bytes = so_far - self._wire_bytes, so_far
        return taken

    def gather(self, value: Any) -> list[Any]:
        """Return what every rank has given."""
        found: list[Any] = [None] * self.size
        with self.link.waiting():
            dist.all_gather_object(found, value)
        return found

    def gather_numbers(self, values: Sequence[float]) -> list[list[float]]:
        """Return the numbers that every rank has given, as many from each."""
        flat = self.total([value if rank == self.rank else 0.0 for rank in range(self.size) for value in values])
        return [flat[first : first + len(values)] for first in range(0, len(flat), len(values))]

    def first_row(self, name: str) -> int:
        """Return which row of the whole model's parameter the first row here is."""
        return self.layout.first_row(name)

    def num_rows(self, name: str, *, here: int) -> int:
        """Return how many rows the whole model's parameter has, of which so many are here."""
        return here * self.layout.config.expert if is_expert(name) else here

    def writes(self, name: str) -> bool:
        """Whether this is the rank that writes a parameter or buffer down, of those that hold the same."""
        return self.layout.writes(name)

    def _by_sharers(self, tensors: Mapping[str, Tensor]) -> list[tuple[Sharers, dict[str, Tensor]]]:
        """Return tensors with those that hold them too, in an order that all of these share; none that nobody has."""
        found: dict[int, tuple[Sharers, dict[str, Tensor]]] = {}
        for name, tensor in sorted(tensors.items()):
            sharers = self.layout.sharers(name)
            if sharers.size > 1:
                found.setdefault(id(sharers), (sharers, {}))[1][name] = tensor
        return [found[id(sharers)] for sharers in self.layout.in_order if id(sharers) in found]
