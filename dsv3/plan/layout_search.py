"""The best layout of a run on a given cluster, and why others lose: memory, divisibility, bubble, communication."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from dsv3.config import ParallelConfig, PretrainConfig
from dsv3.errors import ConfigError
from dsv3.plan.hardware import Hardware
from dsv3.plan.training import TrainingPlan, plan_training

LONGEST_PIPELINE = 64
OF_PIPELINES = ("dualpipe", "dualpipe_v", "zb1p", "1f1b")
OF_ONE_RANK = ("1f1b", "dualpipe_v")


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One layout."""

    parallel: ParallelConfig
    plan: TrainingPlan | None
    """None where it cannot run."""
    problem: str
    """'memory' or 'divisibility', or '' where it runs."""
    why: str

    @property
    def name(self) -> str:
        """How it is told."""
        parallel = self.parallel
        moved = f", stages of {'-'.join(map(str, parallel.stage_layers))} layers" if parallel.stage_layers else ""
        return f"PP{parallel.pipeline} EP{parallel.expert} {parallel.schedule}{moved}"


@dataclass(frozen=True, kw_only=True)
class Search:
    """What came of one."""

    running: tuple[Candidate, ...]
    """Fastest first; each of the others says what it loses to the first."""
    refused: tuple[Candidate, ...]

    @property
    def best(self) -> TrainingPlan:
        """The plan of the fastest.

        Raises:
            ConfigError: none runs; says which comes nearest.
        """
        if self.running:
            assert self.running[0].plan is not None
            return self.running[0].plan
        full = [candidate for candidate in self.refused if candidate.plan is not None]
        if not full:
            raise ConfigError(f"no layout divides: {self.refused[0].name}: {self.refused[0].why}")
        nearest = min(full, key=lambda one: one.plan.bytes_of(one.plan.fullest) if one.plan else 0)
        raise ConfigError(f"no layout fits; {nearest.name} comes nearest: {nearest.why}; use more GPUs or larger ones")


def search_layouts(config: PretrainConfig, *, gpu: Hardware, world: int, imbalance: float) -> Search:
    """Try every layout of some schedules and return them by the time of a step.

    Ranks that hold the same weights share the optimizer's state throughout. Rows of a micro-batch, and ranks that share
    a row, are as `config` has them.
    """
    found = [
        _try(config, parallel=parallel, gpu=gpu, world=world, imbalance=imbalance)
        for parallel in _layouts(config, gpu=gpu, world=world)
    ]
    running = sorted(
        (one for one in found if not one.problem), key=lambda one: one.plan.step_seconds if one.plan else 0.0
    )
    told = tuple(replace(one, why=_loses(one.plan, best=running[0].plan)) for one in running)
    return Search(running=told, refused=tuple(one for one in found if one.problem))


def lighter_split(plan: TrainingPlan) -> TrainingPlan | None:
    """Return a plan that fits, with layers moved from the first stage to the last, or None where there is none.

    Activations wait longest at the first stage, and least at the last. Where one rank has both, as in DualPipe, it
    computes no more for it.
    """
    layers = [len(one) for one in plan.stages.layers]
    if plan.config.parallel.stage_layers or len(layers) < 2:
        return None
    for moved in range(1, layers[0]):
        split = (layers[0] - moved, *layers[1:-1], layers[-1] + moved)
        parallel = replace(plan.config.parallel, stage_layers=split)
        other = plan_training(
            replace(plan.config, parallel=parallel),
            gpu=plan.gpu,
            world=plan.world,
            imbalance=plan.imbalance,
            exact=plan.exact,
        )
        if other.fits:
            return other
    return None


def wire_of(config: PretrainConfig, *, expert: int) -> str:
    """Return how tokens travel over so many expert ranks: in FP8 where the run computes in it, as in the report."""
    if expert == 1:
        return "compute"
    if config.parallel.expert > 1:
        return config.parallel.wire
    return "compute" if config.precision.recipe == "original" else "fp8"


def _layouts(config: PretrainConfig, *, gpu: Hardware, world: int) -> Iterator[ParallelConfig]:
    model = config.model
    in_node = config.parallel.ranks_per_node or gpu.ranks_per_node
    for pipeline in _divisors(world):
        if pipeline > min(LONGEST_PIPELINE, model.num_hidden_layers):
            continue
        for expert in _divisors(world // pipeline):
            # What does not divide the experts, or fill nodes, is no layout; nobody needs to be told.
            if model.n_routed_experts % expert or (expert > in_node and expert % in_node):
                continue
            for schedule in OF_PIPELINES if pipeline > 1 else OF_ONE_RANK:
                yield replace(
                    config.parallel,
                    pipeline=pipeline,
                    expert=expert,
                    wire=wire_of(config, expert=expert),
                    schedule=schedule,
                    stage_layers=(),
                    zero=world > 1,
                )


def _try(config: PretrainConfig, *, parallel: ParallelConfig, gpu: Hardware, world: int, imbalance: float) -> Candidate:
    try:
        plan = plan_training(replace(config, parallel=parallel), gpu=gpu, world=world, imbalance=imbalance, exact=False)
    except ConfigError as error:
        return Candidate(parallel=parallel, plan=None, problem="divisibility", why=str(error))
    if not plan.fits and parallel.schedule == "dualpipe":
        plan = lighter_split(plan) or plan
    needed = plan.bytes_of(plan.fullest) / 1e9
    problem = "" if plan.fits else "memory"
    why = f"the fullest rank needs {needed:.1f} GB, and a GPU has {gpu.memory_gb:.1f}"
    return Candidate(parallel=plan.config.parallel, plan=plan, problem=problem, why=why)


def _loses(plan: TrainingPlan | None, *, best: TrainingPlan | None) -> str:
    assert plan is not None
    assert best is not None
    if plan is best:
        return "the fastest"
    parts = {
        "bubble": (plan.pipeline.bubble, best.pipeline.bubble),
        "communication": (plan.uncovered_seconds, best.uncovered_seconds),
        "optimizer": (plan.optimizer_seconds, best.optimizer_seconds),
    }
    parts["computing"] = tuple(  # type: ignore[assignment]
        one.step_seconds - one.pipeline.bubble - one.uncovered_seconds - one.optimizer_seconds for one in (plan, best)
    )
    name = max(parts, key=lambda part: parts[part][0] - parts[part][1])
    slower = plan.step_seconds / best.step_seconds - 1
    mine, other = parts[name]
    return f"{slower:.1%} slower: {name} takes {mine:.3g} s, not {other:.3g}"


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]
