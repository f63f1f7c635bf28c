"""Which layers of a model make up each stage of a pipeline, and where what is not a layer lies (report 3.2.1)."""

from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise

from dsv3.config import ModelConfig, ParallelConfig
from dsv3.errors import ConfigError
from dsv3.plan.counts import expanded_attention_flops_per_token, layer_counts
from dsv3.plan.pipeline import Schedule
from dsv3.plan.schedules import SCHEDULES, one_f_one_b

MESSAGES_AHEAD = 2
"""Messages that a rank is ready to take from a neighbour before it needs them (parallel/messages.py)."""


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
        return tuple(sorted({rank for stage in self.stages_of(name) for rank in self._ranks[stage]}))

    def held_by(self, rank: int) -> tuple[int, ...]:
        """Return the stages that a pipeline rank holds."""
        return tuple(stage for stage, ranks in enumerate(self._ranks) if rank in ranks)

    def messages_of(self, rank: int) -> int:
        """Return the most hidden states and gradients of them, each of a micro-batch, that a rank has under way.

        It is ready for `MESSAGES_AHEAD` from each neighbour, and of each kind that it sends, one has not been taken yet
        and one is being made.
        """
        crossings = [pair for route in self.routes for pair in pairwise(route) if pair[0] != pair[1]]
        sent_to = [to for pair in crossings for at, to in (pair, pair[::-1]) if at == rank]
        return MESSAGES_AHEAD * len(set(sent_to)) + 2 * len(sent_to)

    @cached_property
    def _ranks(self) -> tuple[frozenset[int], ...]:
        """Pipeline ranks of each stage."""
        return tuple(map(frozenset, zip(*self.routes, strict=True)))

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
                f"give {num_stages} numbers of at least 1 with the sum {num_layers}, or [] for a split by FLOPs"
            )
        starts = [sum(counts[:stage]) for stage in range(num_stages + 1)]
        return tuple(range(start, end) for start, end in pairwise(starts))
    if num_layers < num_stages:
        raise ConfigError(
            f"{num_layers} layers do not make up {num_stages} stages of a pipeline; use at most {num_layers} of them"
        )
    costs = tuple(layer_costs(model, sequence_length=sequence_length))
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


@lru_cache(maxsize=256)
def _split(costs: tuple[int, ...], *, num_parts: int, at_the_end: int) -> tuple[int, ...]:
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


def make_schedule(config: ParallelConfig, *, num_micro_batches: int) -> Schedule:
    """Return the schedule that a pipeline of `config` follows for a step of so many micro-batches.

    Raises:
        ConfigError: it cannot work with so many.
    """
    if config.pipeline == 1 and config.schedule != "dualpipe_v":
        return one_f_one_b(num_ranks=1, num_micro_batches=num_micro_batches)
    return _make(config.schedule, config.pipeline, num_micro_batches)


@lru_cache(maxsize=64)
def _make(name: str, num_ranks: int, num_micro_batches: int) -> Schedule:
    return SCHEDULES[name](num_ranks=num_ranks, num_micro_batches=num_micro_batches)


def fewest_micro_batches(config: ParallelConfig) -> int:
    """Return the smallest number of micro-batches that the schedule of `config` can work with."""
    return 1 if config.pipeline == 1 and config.schedule != "dualpipe_v" else _fewest(config.schedule, config.pipeline)


@lru_cache(maxsize=256)
def _fewest(name: str, num_ranks: int) -> int:
    for number in range(1, 2 * num_ranks + 1):
        try:
            _make(name, num_ranks, number)
        except ConfigError:
            continue
        return number
    # None is enough for so many ranks: the refusal says why.
    _make(name, num_ranks, 2 * num_ranks)
    raise AssertionError("twice as many as ranks are enough for every schedule")


def make_stages(config: ParallelConfig, *, model: ModelConfig, sequence_length: int) -> Stages:
    """Return the stages that the ranks of a pipeline hold."""
    # Where stages lie does not hang on the number of micro-batches.
    routes = make_schedule(config, num_micro_batches=fewest_micro_batches(config)).routes
    layers = split_layers(model, num_stages=len(routes[0]), sequence_length=sequence_length, counts=config.stage_layers)
    return Stages(layers=layers, routes=routes, mtp_modules=model.num_nextn_predict_layers)


def require_expert_ranks(size: int, *, num_experts: int) -> None:
    """Refuse a number of ranks that experts do not divide over.

    Raises:
        ConfigError: names the nearest numbers that they do.
    """
    if size >= 1 and num_experts % size == 0:
        return
    divisors = [number for number in range(1, num_experts + 1) if num_experts % number == 0]
    nearest = sorted(sorted(divisors, key=lambda number: abs(number - size))[:2])
    raise ConfigError(
        f"{num_experts} routed experts do not divide over an expert axis of {size} ranks; use a divisor of "
        f"{num_experts}, such as {' or '.join(map(str, nearest))}"
    )


def require_whole_pipelines(config: ParallelConfig, *, world: int, num_experts: int) -> None:
    """Refuse a number of ranks that do not divide into pipelines of groups that share the experts, and rows.

    Raises:
        ConfigError: says which degrees would do.
    """
    if world % (config.pipeline * config.expert) == 0 and world // config.pipeline % config.context == 0:
        return
    if world % config.pipeline:
        fitting = [size for size in range(1, world + 1) if world % size == 0]
        raise ConfigError(
            f"{world} ranks do not divide into pipelines of {config.pipeline}; use {', '.join(map(str, fitting))} for "
            "parallel.pipeline, or another number of ranks"
        )
    left = world // config.pipeline
    of_each = f"{left} ranks of each stage" if config.pipeline > 1 else f"{world} ranks"
    dividing = [size for size in range(1, left + 1) if left % size == 0]
    if left % config.context:
        raise ConfigError(
            f"{of_each} do not divide into groups of {config.context} that share rows; use "
            f"{', '.join(map(str, dividing))} for parallel.context, or another number of ranks"
        )
    fitting = [size for size in dividing if num_experts % size == 0]
    raise ConfigError(
        f"{of_each} do not divide into expert axes of {config.expert}; use {', '.join(map(str, fitting))} for "
        "parallel.expert, or another number of ranks"
    )
