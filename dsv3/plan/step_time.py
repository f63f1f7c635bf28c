"""How long a step takes: the schedule run on paper, with the times of each stage's layers."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from dsv3.config import ParallelConfig, PretrainConfig
from dsv3.plan.hardware import Hardware
from dsv3.plan.layer_times import Clock, WorkTimes
from dsv3.plan.pipeline import Kind, Step, require_micro_batches
from dsv3.plan.simulate import Timeline, simulate
from dsv3.plan.stages import Stages, fewest_micro_batches, make_schedule, make_stages
from dsv3.plan.traffic import link_between

LARGEST_SIMULATED = 4096
"""Chunks of work of all stages; longer steps are told from two shorter ones."""


@dataclass(frozen=True, kw_only=True)
class StageCosts:
    """What the steps of a schedule take when its stages have different layers."""

    stages: tuple[WorkTimes, ...]
    send: float

    def of(self, step: Step) -> float:
        """Return the seconds of a chunk, or of two that are woven into each other."""
        if len(step) == 1:
            (action,) = step
            work = self.stages[action.stage]
            alone = {
                Kind.FORWARD: work.forward + work.forward_bare,
                Kind.BACKWARD: work.backward + work.weight + work.backward_bare,
                Kind.INPUT: work.backward + work.backward_bare,
                Kind.WEIGHT: work.weight,
            }
            return alone[action.kind]
        compute = link = 0.0
        for action in step:
            work = self.stages[action.stage]
            forward = action.kind is Kind.FORWARD
            compute += work.forward if forward else work.backward + work.weight
            link += (work.forward_link if forward else work.backward_link) + self.send
        return max(compute, link)


@dataclass(frozen=True, kw_only=True)
class PipelineTime:
    """Seconds of a step without the optimizer, by what ranks do; the mean over the ranks of a pipeline."""

    forward: float
    """Forward chunks by themselves."""
    backward: float
    """Backward chunks by themselves, with weights' gradients that are not put off."""
    weight: float
    """Weights' gradients that were put off."""
    woven: float
    """A forward and a backward chunk at once."""
    bubble: float

    @property
    def total(self) -> float:
        """All of it."""
        return self.forward + self.backward + self.weight + self.woven + self.bubble

    @classmethod
    def of(cls, timeline: Timeline) -> "PipelineTime":
        """Sum up a timeline."""
        names = {Kind.FORWARD: "forward", Kind.BACKWARD: "backward", Kind.INPUT: "backward", Kind.WEIGHT: "weight"}
        spent = dict.fromkeys(("forward", "backward", "weight", "woven"), 0.0)
        for spans in timeline.spans:
            for span in spans:
                name = names[span.step[0].kind] if len(span.step) == 1 else "woven"
                spent[name] += span.end - span.start
        ranks = len(timeline.spans)
        idle = timeline.duration * ranks - sum(timeline.busy)
        return cls(**{name: seconds / ranks for name, seconds in spent.items()}, bubble=idle / ranks)

    def further(self, other: "PipelineTime", *, steps: float) -> "PipelineTime":
        """Return this, and `steps` times what it has more than `other`."""
        names = ("forward", "backward", "weight", "woven", "bubble")
        return PipelineTime(
            **{name: getattr(self, name) + steps * (getattr(self, name) - getattr(other, name)) for name in names}
        )


@dataclass(frozen=True, kw_only=True)
class StepClock:
    """Times of the steps of a run, for any number of micro-batches."""

    config: PretrainConfig
    gpu: Hardware
    imbalance: float

    @cached_property
    def stages(self) -> Stages:
        """Which layers are where."""
        return make_stages(
            self.config.parallel,
            model=self.config.model,
            sequence_length=self.config.batch.sequence_length,
        )

    @cached_property
    def clock(self) -> Clock:
        """Times of parts of the model."""
        return Clock(config=self.config, gpu=self.gpu, imbalance=self.imbalance)

    def pipeline_link(self, *, data: int) -> str:
        """Return the link between neighbours of a pipeline, of which there are `data`."""
        return link_between(self.config, gpu=self.gpu, distance=data)

    def costs(self, *, data: int) -> StageCosts:
        """Return the times of every stage."""
        model, clock = self.config.model, self.clock
        attention, dense, experts = clock.attention(), clock.dense_mlp(), clock.experts()
        found = []
        for layers in self.stages.layers:
            routed = sum(model.is_moe_layer(layer) for layer in layers)
            found.append(attention.times(len(layers)) + experts.times(routed) + dense.times(len(layers) - routed))
        found[-1] = found[-1] + clock.end()
        has_others = self.config.parallel.pipeline > 1
        send = clock.send_seconds(self.pipeline_link(data=data)) if has_others else 0.0
        return StageCosts(stages=tuple(found), send=send)

    def pipeline_time(self, *, micro_batches: int, data: int, exact: bool = True) -> PipelineTime:
        """Return what a step takes; of long ones, and where `exact` is False, from two shorter ones.

        Once a schedule is in its stride every further micro-batch adds the same.

        Raises:
            ConfigError: the schedule cannot work with so many micro-batches.
        """
        near, far = self._stride
        is_short = micro_batches * len(self.stages.layers) <= LARGEST_SIMULATED
        if micro_batches <= far or (exact and is_short):
            return PipelineTime.of(self.timeline(micro_batches=micro_batches, data=data))
        require_multiple(self.config.parallel, micro_batches=micro_batches)
        longer = PipelineTime.of(self.timeline(micro_batches=far, data=data))
        shorter = PipelineTime.of(self.timeline(micro_batches=near, data=data))
        return longer.further(shorter, steps=(micro_batches - far) / (far - near))

    def many(self, numbers: Sequence[int], *, data: int) -> dict[int, float]:
        """Return the seconds of steps of so many micro-batches each: of the fewest and the most, and evenly between."""
        least, most = min(numbers), max(numbers)
        first = self.pipeline_time(micro_batches=least, data=data).total
        if least == most:
            return {least: first}
        slope = (self.pipeline_time(micro_batches=most, data=data).total - first) / (most - least)
        return {number: first + slope * (number - least) for number in numbers}

    @cached_property
    def _stride(self) -> tuple[int, int]:
        """Return two numbers of micro-batches with which the schedule is in its stride."""
        parallel = self.config.parallel
        near = usable_micro_batches(self.config, wanted=2 * parallel.pipeline)
        return near, usable_micro_batches(self.config, wanted=near + max(2, parallel.pipeline // 2))

    def timeline(self, *, micro_batches: int, data: int) -> Timeline:
        """Return when each rank of a pipeline does what."""
        schedule = make_schedule(self.config.parallel, num_micro_batches=micro_batches)
        return simulate(schedule, costs=self.costs(data=data))


def usable_micro_batches(config: PretrainConfig, *, wanted: int) -> int:
    """Return the smallest number of micro-batches, from `wanted` up, that the schedule can work with."""
    parallel = config.parallel
    multiple = _multiple(parallel)
    return max(fewest_micro_batches(parallel), -(-wanted // multiple) * multiple)


def require_multiple(parallel: ParallelConfig, *, micro_batches: int) -> None:
    """Refuse a number of micro-batches that the schedule cannot deal out.

    Raises:
        ConfigError: says which would do.
    """
    require_micro_batches(micro_batches, name=parallel.schedule, multiple_of=_multiple(parallel))


def _multiple(parallel: ParallelConfig) -> int:
    if parallel.pipeline == 1:
        return 1
    return {"dualpipe": 2, "interleaved": parallel.pipeline}.get(parallel.schedule, 1)
