"""GPU-hours and dollars of a whole recipe: pre-training with its growing batch, longer context, post-training."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from dsv3.config import PretrainConfig
from dsv3.plan.buffers import buffers
from dsv3.plan.ranks import place_ranks
from dsv3.plan.stages import make_schedule, make_stages
from dsv3.plan.step_time import StepClock, usable_micro_batches
from dsv3.plan.training import TrainingPlan, optimizer_seconds

PUBLISHED_POST_HOURS = 5000.0
"""GPU-hours of all post-training of DeepSeek-V3, as one figure (report, table 1); what is in it is not published."""
DOLLARS_PER_HOUR = 2.0
"""Of an H800, assumed by the report (table 1)."""


@dataclass(frozen=True, kw_only=True)
class Stretch:
    """Steps with batches of one size."""

    rows: int
    steps: int


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A part of a recipe."""

    name: str
    sequence_length: int
    context_ranks: int
    """Ranks that share each row."""
    steps: int
    tokens: int
    seconds: float
    bytes_of_fullest: int
    """Memory of the fullest rank."""
    fits_with: int
    """Fewest ranks that can share a row so that it fits, `context_ranks` or more; 0 where none can."""

    def gpu_hours(self, *, world: int) -> float:
        """Return the hours of all GPUs together."""
        return self.seconds * world / 3600


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Of a whole recipe."""

    world: int
    pretrain: Phase
    extensions: tuple[Phase, ...]
    post_hours: float
    """GPU-hours, as given: post-training is not planned."""
    dollars_per_hour: float

    @property
    def pretrain_hours(self) -> float:
        """GPU-hours; so are the next two."""
        return self.pretrain.gpu_hours(world=self.world)

    @property
    def context_hours(self) -> float:
        """Of all extensions."""
        return sum(phase.gpu_hours(world=self.world) for phase in self.extensions)

    @property
    def total_hours(self) -> float:
        """Of everything."""
        return self.pretrain_hours + self.context_hours + self.post_hours

    @property
    def dollars(self) -> float:
        """Of everything."""
        return self.total_hours * self.dollars_per_hour


def pretraining(plan: TrainingPlan, *, stretches: Sequence[Stretch]) -> Phase:
    """Return what pre-training takes, whose batch grows stretch by stretch.

    Batches too small for the schedule take as long as the smallest that is not; how the report's run began with 24
    micro-batches in each pipeline, of which DualPipe needs 32, is not published.
    """
    batch = plan.config.batch
    return Phase(
        name="pretrain",
        sequence_length=batch.sequence_length,
        context_ranks=plan.config.parallel.context,
        steps=sum(stretch.steps for stretch in stretches),
        tokens=sum(stretch.steps * stretch.rows for stretch in stretches) * batch.sequence_length,
        seconds=_seconds(plan, clock=plan.clock, stretches=stretches),
        bytes_of_fullest=plan.bytes_of(plan.fullest),
        fits_with=plan.config.parallel.context if plan.fits else 0,
    )


def extension_phase(plan: TrainingPlan, *, config: PretrainConfig, steps: int) -> Phase:
    """Return what a phase of longer rows takes on the cluster of `plan`.

    Assumption: ranks share each row so that none has more tokens at a time than in pre-training, as far as they divide.
    How the report's run laid out these phases is not published. It is said where so few do not fit.
    """
    least, *more = _context_ranks(plan, config=config)
    needed = _fullest_bytes(plan, config=_sharing(plan, config=config, ranks=least))
    capacity = plan.gpu.memory_gb * 1e9
    fitting = (
        size for size in more if _fullest_bytes(plan, config=_sharing(plan, config=config, ranks=size)) <= capacity
    )
    config = _sharing(plan, config=config, ranks=least)
    clock = StepClock(config=config, gpu=plan.gpu, imbalance=plan.imbalance)
    rows = config.batch.final_sequences
    return Phase(
        name=f"extension to {config.batch.sequence_length:,}",
        sequence_length=config.batch.sequence_length,
        context_ranks=config.parallel.context,
        steps=steps,
        tokens=steps * rows * config.batch.sequence_length,
        seconds=_seconds(plan, clock=clock, stretches=[Stretch(rows=rows, steps=steps)]),
        bytes_of_fullest=needed,
        fits_with=least if needed <= capacity else next(fitting, 0),
    )


def _sharing(plan: TrainingPlan, *, config: PretrainConfig, ranks: int) -> PretrainConfig:
    return replace(config, parallel=replace(plan.config.parallel, context=ranks))


def _fullest_bytes(plan: TrainingPlan, *, config: PretrainConfig) -> int:
    parallel = config.parallel
    stages = make_stages(parallel, model=config.model, sequence_length=config.batch.sequence_length)
    schedule = make_schedule(parallel, num_micro_batches=usable_micro_batches(config, wanted=2 * parallel.pipeline))
    places = place_ranks(config, stages=stages, schedule=schedule, data=plan.data, dtype=plan.dtype)
    return max(place.on_device + place.messages for place in places) + buffers(config, dtype=plan.dtype).total


def _seconds(plan: TrainingPlan, *, clock: StepClock, stretches: Sequence[Stretch]) -> float:
    """Return the seconds of all steps; of each size the pipeline is run once."""
    config = clock.config
    readers = plan.data // config.parallel.context
    last = optimizer_seconds(plan.flows, gpu=plan.gpu, places=plan.places)
    numbers = {
        stretch.rows: usable_micro_batches(
            config, wanted=-(-stretch.rows // (config.batch.micro_batch_sequences * readers))
        )
        for stretch in stretches
    }
    times = clock.many(sorted(set(numbers.values())), data=plan.data)
    return sum(stretch.steps * (times[numbers[stretch.rows]] + last) for stretch in stretches)


def _context_ranks(plan: TrainingPlan, *, config: PretrainConfig) -> list[int]:
    """Return by how many ranks each row may be shared: as many as leave each its tokens of pre-training, and more."""
    before = plan.config.batch.micro_batch_sequences * plan.config.batch.sequence_length
    wanted = -(-config.batch.micro_batch_sequences * config.batch.sequence_length // before)
    wanted *= plan.config.parallel.context
    sizes = [size for size in range(1, plan.data + 1) if plan.data % size == 0]
    least = max(size for size in sizes if size <= wanted)
    return [size for size in sizes if size >= least]
