"""How long a step takes: the schedule run on paper, with the times of each stage's layers."""

from collections import Counter
from dataclasses import dataclass
from functools import cached_property

from dsv3.config import PretrainConfig
from dsv3.errors import ConfigError
from dsv3.plan.hardware import Hardware
from dsv3.plan.layer_times import LENT, Clock, WorkTimes, together
from dsv3.plan.pipeline import Kind, Schedule, Step
from dsv3.plan.simulate import Timeline, simulate
from dsv3.plan.stages import Stages, fewest_micro_batches, make_schedule, make_stages
from dsv3.plan.traffic import link_between

LARGEST_SIMULATED = 4096
"""Chunks of work of all ranks; of longer steps two shorter ones are run, and what lies between goes on as it went."""


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
        return together(compute=compute, link=link)


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
        spent: Counter[str] = Counter()
        for spans in timeline.spans:
            for span in spans:
                name = names[span.step[0].kind] if len(span.step) == 1 else "woven"
                spent[name] += span.end - span.start  # type: ignore[assignment]
        ranks = len(timeline.spans)
        idle = timeline.duration * ranks - sum(timeline.busy)
        return cls(
            **{name: spent[name] / ranks for name in ("forward", "backward", "weight", "woven")}, bubble=idle / ranks
        )

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

    def pipeline_time(self, *, micro_batches: int, data: int) -> PipelineTime:
        """Return what a step of so many micro-batches of each pipeline takes.

        Raises:
            ConfigError: the schedule cannot work with so many.
        """
        parallel, costs = self.config.parallel, self.costs(data=data)
        schedule_size = micro_batches * len(self.stages.layers)
        multiple = multiple_of(parallel.schedule, pipeline=parallel.pipeline)
        fewest = fewest_micro_batches(parallel)
        near = -(-max(LARGEST_SIMULATED // len(self.stages.layers), 4 * parallel.pipeline, fewest) // multiple)
        near *= multiple
        if schedule_size <= LARGEST_SIMULATED or micro_batches <= near:
            return PipelineTime.of(self._timeline(micro_batches, costs=costs))
        make_schedule(parallel, num_micro_batches=2 * multiple + fewest)  # refuses what no number of them would mend
        shorter = max(fewest, near // 2 // multiple * multiple)
        far = PipelineTime.of(self._timeline(near, costs=costs))
        return far.further(
            PipelineTime.of(self._timeline(shorter, costs=costs)), steps=(micro_batches - near) / (near - shorter)
        )

    def timeline(self, *, micro_batches: int, data: int) -> Timeline:
        """Return the whole step, for a picture of it."""
        return self._timeline(micro_batches, costs=self.costs(data=data))

    def _timeline(self, micro_batches: int, *, costs: StageCosts) -> Timeline:
        return simulate(self._schedule(micro_batches), costs=costs)

    def _schedule(self, micro_batches: int) -> Schedule:
        return make_schedule(self.config.parallel, num_micro_batches=micro_batches)


def multiple_of(schedule: str, *, pipeline: int) -> int:
    """Return what the number of micro-batches of a schedule must be a multiple of."""
    if pipeline == 1:
        return 1
    return {"dualpipe": 2, "interleaved": pipeline}.get(schedule, 1)


def usable_micro_batches(config: PretrainConfig, *, wanted: int) -> int:
    """Return the smallest number of micro-batches, from `wanted` up, that the schedule can work with."""
    fewest = fewest_micro_batches(config.parallel)
    multiple = multiple_of(config.parallel.schedule, pipeline=config.parallel.pipeline)
    return max(fewest, -(-wanted // multiple) * multiple)
