"""Which layers of a model make up each stage of a pipeline, and where what is not a layer lies (report 3.2.1)."""

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from dsv3.config import ModelConfig
from dsv3.errors import ConfigError
from dsv3.plan.counts import expanded_attention_flops_per_token, layer_counts


@dataclass(frozen=True, kw_only=True)
class Stages:
    """Consecutive layers for each stage. The first has the embedding too, the last final norm, head and MTP modules.

    MTP modules read the embedding, so the last stage needs it as well: where one rank has both ends of the model, as in
    DualPipe, they are one and the same tensor there (report 3.2.3, 'Shared Embedding and Output Head').
    """

    layers: tuple[range, ...]
    routes: tuple[tuple[int, ...], ...]
    """For each direction, the pipeline rank of every stage."""
    mtp_modules: int

    def stages_of(self, name: str) -> tuple[int, ...]:
        """Return the stages that use a parameter or buffer, by its name in the model."""
        first, *rest = name.split(".")
        last = len(self.layers) - 1
        if first == "layers":
            return (next(stage for stage, layers in enumerate(self.layers) if int(rest[0]) in layers),)
        if first == "embed_tokens":
            return (0, last) if self.mtp_modules and last else (0,)
        return (last,)

    def holders(self, name: str) -> tuple[int, ...]:
        """Return the pipeline ranks that hold it, lowest first."""
        return tuple(sorted({route[stage] for route in self.routes for stage in self.stages_of(name)}))

    def held_by(self, rank: int) -> tuple[int, ...]:
        """Return the stages that a pipeline rank holds."""
        return tuple(sorted({stage for route in self.routes for stage, at in enumerate(route) if at == rank}))

    @cached_property
    def ends(self) -> tuple[int, ...]:
        """Pipeline ranks that hold the last stage, lowest first: the losses are found there."""
        return tuple(sorted({route[-1] for route in self.routes}))


def split_layers(
    model: ModelConfig, *, num_stages: int, sequence_length: int, counts: tuple[int, ...] = ()
) -> tuple[range, ...]:
    """Return consecutive layers for each stage: `counts` of them, or so that the slowest stage is as fast as can be.

    A layer's cost is its FLOPs of training; the last stage also has the head, once for each loss, and the MTP modules.
    How the report splits its 61 layers over 16 stages is not published.

    Raises:
        ConfigError: there are fewer layers than stages, or `counts` are not of these.
    """
    num_layers = model.num_hidden_layers
    if counts:
        if len(counts) != num_stages or sum(counts) != num_layers or min(counts) < 1:
            raise ConfigError(
                f"parallel.stage_layers = {list(counts)} does not split {num_layers} layers into {num_stages} stages; "
                f"give {num_stages} numbers of at least 1 with the sum {num_layers}"
            )
        starts = [sum(counts[:stage]) for stage in range(num_stages + 1)]
        return tuple(range(start, end) for start, end in pairwise(starts))
    if num_layers < num_stages:
        raise ConfigError(
            f"{num_layers} layers do not make up {num_stages} stages of a pipeline; use at most {num_layers} of them"
        )
    costs = layer_costs(model, sequence_length=sequence_length)
    ends = _split(costs, num_parts=num_stages, at_the_end=end_cost(model, sequence_length=sequence_length))
    return tuple(range(start, end) for start, end in pairwise((0, *ends)))


def layer_costs(model: ModelConfig, *, sequence_length: int) -> list[int]:
    """Return the forward FLOPs of each layer for one token."""
    of_layer = layer_counts(model)
    attention = expanded_attention_flops_per_token(model, mean_context=sequence_length // 2) // model.num_hidden_layers
    return [
        attention + 2 * (of_layer.moe_layer_active if model.is_moe_layer(layer) else of_layer.dense_layer)
        for layer in range(model.num_hidden_layers)
    ]


def end_cost(model: ModelConfig, *, sequence_length: int) -> int:
    """Return the forward FLOPs for one token of what follows the last layer: head and MTP modules."""
    modules, hidden = model.num_nextn_predict_layers, model.hidden_size
    head = 2 * model.vocab_size * hidden
    attention = expanded_attention_flops_per_token(model, mean_context=sequence_length // 2) // model.num_hidden_layers
    module = attention + 2 * (layer_counts(model).moe_layer_active + 2 * hidden**2)
    return head * (1 + modules) + module * modules


def _split(costs: list[int], *, num_parts: int, at_the_end: int) -> tuple[int, ...]:
    """Return where each part ends, with the smallest possible largest sum; every part has something."""
    total = len(costs)
    sums = [0]
    for cost in costs:
        sums.append(sums[-1] + cost)
    # best[end]: (largest sum, ends) of the first `end` layers in so many parts.
    best: dict[int, tuple[int, tuple[int, ...]]] = {end: (sums[end], (end,)) for end in range(1, total + 1)}
    for part in range(2, num_parts + 1):
        extra = at_the_end if part == num_parts else 0
        best = {
            end: min(
                (max(best[start][0], sums[end] - sums[start] + extra), (*best[start][1], end))
                for start in range(part - 1, end)
            )
            for end in range(part, total + 1)
        }
    return best[total][1]
