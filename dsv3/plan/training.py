"""The plan of a training run on a cluster: what each rank holds and sends, and how long a step takes."""

from dataclasses import dataclass, replace
from functools import cached_property

from dsv3.config import PretrainConfig
from dsv3.errors import ConfigError
from dsv3.plan.buffers import Buffers, buffers
from dsv3.plan.counts import training_flops_per_token, training_flops_per_token_not_causal
from dsv3.plan.hardware import Hardware
from dsv3.plan.ranks import RankPlan, place_ranks
from dsv3.plan.stages import Stages, make_schedule, require_expert_ranks, require_whole_pipelines
from dsv3.plan.step_time import PipelineTime, StepClock, usable_micro_batches
from dsv3.plan.traffic import Flow, step_flows

FITTED_IMBALANCE = 0.2
"""Fitted: the one number here that was chosen for its result. With it the woven chunks of the published run take the
13.95 s that are published for them ("Insights", table 4: '1F1B'), within 0.5%; with 0, as in the trace, 12.0 s."""


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """A run on a cluster, when its batch has grown."""

    config: PretrainConfig
    gpu: Hardware
    world: int
    imbalance: float
    dtype: str
    """What is computed with: 'bfloat16' on GPUs, 'float32' for a run on CPUs."""
    places: tuple[RankPlan, ...]
    buffers: Buffers
    flows: tuple[Flow, ...]
    """Gradients and weights as the ranks with most of them have it: a step ends when theirs are there."""
    micro_batches: int
    """Of each pipeline in a step."""
    idle_micro_batches: int
    """How many more the schedule needs than there are: they cost time and do nothing."""
    clock: StepClock
    exact: bool
    """Whether the whole step is run on paper, not two shorter ones."""

    @property
    def data(self) -> int:
        """Ranks at each place of the pipeline."""
        return self.world // self.config.parallel.pipeline

    @cached_property
    def pipeline(self) -> PipelineTime:
        """Of a step without the optimizer."""
        return self.clock.pipeline_time(micro_batches=self.micro_batches, data=self.data, exact=self.exact)

    @property
    def stages(self) -> Stages:
        """Which layers are where."""
        return self.clock.stages

    def bytes_of(self, place: RankPlan) -> int:
        """Return what a rank holds at its fullest, buffers included."""
        return place.on_device + place.messages + self.buffers.total

    @property
    def fullest(self) -> RankPlan:
        """The place whose ranks hold most."""
        return max(self.places, key=self.bytes_of)

    @property
    def fits(self) -> bool:
        """Whether the fullest rank has memory enough."""
        return self.bytes_of(self.fullest) <= self.gpu.memory_gb * 1e9

    @cached_property
    def optimizer_seconds(self) -> float:
        """From the last gradient to weights that all have: sums over sharers, the step, and the way back."""
        return optimizer_seconds(self.flows, gpu=self.gpu, places=self.places)

    @property
    def step_seconds(self) -> float:
        """Of a whole step."""
        return self.pipeline.total + self.optimizer_seconds

    @property
    def tokens_per_step(self) -> int:
        """Of the whole cluster."""
        return self.config.batch.final_sequences * self.config.batch.sequence_length

    @property
    def tokens_per_second(self) -> float:
        """Of the whole cluster."""
        return self.tokens_per_step / self.step_seconds

    @property
    def bubble_fraction(self) -> float:
        """Share of a step in which a rank waits for others of its pipeline, on average."""
        return self.pipeline.bubble / self.step_seconds

    @property
    def uncovered_seconds(self) -> float:
        """Of the pipeline's time, what moving tokens adds to computing them; the mean of ranks."""
        costs = self.clock.costs(data=self.data)
        computing = sum(stage.forward + stage.backward + stage.weight for stage in costs.stages)
        computing *= self.micro_batches / self.config.parallel.pipeline
        return self.pipeline.total - self.pipeline.bubble - computing

    def mfu(self, *, causal: bool) -> float:
        """Return the share of the peak of BF16 that the main model's FLOPs amount to.

        MTP and what is computed twice are not counted as work. Not causal: masked scores are.

        Source: the accounting of "Insights into DeepSeek-V3", table 4.
        """
        of_token = training_flops_per_token if causal else training_flops_per_token_not_causal
        flops = of_token(self.config.model, sequence_length=self.config.batch.sequence_length)
        return self.tokens_per_second * flops / (self.world * self.gpu.bf16_tflops * 1e12)


def plan_training(
    config: PretrainConfig, *, gpu: Hardware, world: int, imbalance: float = FITTED_IMBALANCE, exact: bool = True
) -> TrainingPlan:
    """Return the plan of a run of `config` on `world` GPUs; `exact` runs the whole step on paper, not two shorter ones.

    Raises:
        ConfigError: ranks, experts, layers or rows do not divide, or the GPU has not what the recipe needs.
    """
    config = _with_node(config, gpu=gpu)
    require_layout(config, gpu=gpu, world=world)
    parallel = config.parallel
    data = world // parallel.pipeline
    readers = data // parallel.context
    config = _with_rows(config, at_most=config.batch.final_sequences // readers)
    wanted = -(-config.batch.final_sequences // (config.batch.micro_batch_sequences * readers))
    micro_batches = usable_micro_batches(config, wanted=wanted)
    clock = StepClock(config=config, gpu=gpu, imbalance=imbalance)
    dtype = "float32" if config.runtime.dtype == "float32" else "bfloat16"
    first = usable_micro_batches(config, wanted=min(wanted, 2 * parallel.pipeline))
    schedule = make_schedule(parallel, num_micro_batches=first)
    places = place_ranks(config, stages=clock.stages, schedule=schedule, data=data, dtype=dtype)
    last_to_step = max(places, key=lambda place: place.gradients)
    return TrainingPlan(
        config=config,
        gpu=gpu,
        world=world,
        imbalance=imbalance,
        dtype=dtype,
        places=places,
        buffers=buffers(config, dtype=dtype),
        flows=step_flows(
            config, gpu=gpu, stages=clock.stages, place=last_to_step, data=data, micro_batches=micro_batches
        ),
        micro_batches=micro_batches,
        idle_micro_batches=micro_batches - wanted,
        clock=clock,
        exact=exact,
    )


def require_layout(config: PretrainConfig, *, gpu: Hardware, world: int) -> None:
    """Refuse what cannot run.

    Raises:
        ConfigError: ranks, experts or rows do not divide, or the GPU has no FP8; says what would do.
    """
    parallel, num_experts = config.parallel, config.model.n_routed_experts
    require_expert_ranks(parallel.expert, num_experts=num_experts)
    require_whole_pipelines(parallel, world=world, num_experts=num_experts)
    in_node = parallel.ranks_per_node
    if parallel.expert > in_node and parallel.expert % in_node:
        raise ConfigError(
            f"an expert axis of {parallel.expert} ranks does not fill whole nodes of {in_node}; use a multiple or a "
            f"divisor of {in_node}, or --hardware ranks_per_node=..."
        )
    if gpu.fp8_tflops == 0 and config.precision.recipe != "original":
        raise ConfigError(
            f"precision.recipe '{config.precision.recipe}' needs products in FP8, and {gpu.name} has none; use "
            "--set precision.recipe=original, or another GPU"
        )
    rows, readers = config.batch.final_sequences, world // parallel.pipeline // parallel.context
    if rows % readers:
        raise ConfigError(
            f"batch.final_sequences = {rows} rows do not divide over {readers} pipelines; use a multiple of {readers}, "
            f"such as {max(1, round(rows / readers)) * readers}, or a number of GPUs that leaves a divisor of {rows}"
        )


def optimizer_seconds(flows: tuple[Flow, ...], *, gpu: Hardware, places: tuple[RankPlan, ...]) -> float:
    """Return how long the optimizer's step takes when nothing is done beside it.

    Gradients and weights travel at the rates of their links; the step reads and writes each master, moment and
    gradient of the own rows once, which takes the rate of the GPU's memory.
    """
    travel = sum(
        flow.num_bytes / gpu.bytes_per_second(flow.link)
        for flow in flows
        if flow.name.startswith(("gradients", "weights"))
    )
    touched = max(2 * place.moments + 2 * place.master + place.gradients + place.weights for place in places)
    return travel + touched / (gpu.memory_gb_s * 1e9)


def _with_node(config: PretrainConfig, *, gpu: Hardware) -> PretrainConfig:
    in_node = config.parallel.ranks_per_node or gpu.ranks_per_node
    return replace(config, parallel=replace(config.parallel, ranks_per_node=in_node))


def _with_rows(config: PretrainConfig, *, at_most: int) -> PretrainConfig:
    """Return the run with no more rows in a micro-batch than a pipeline has in a step."""
    rows = min(config.batch.micro_batch_sequences, at_most)
    return replace(config, batch=replace(config.batch, micro_batch_sequences=rows))
