"""The plan of a run on many ranks, as `dsv3 pretrain --dry-run` prints it."""

from dsv3.cli.columns import aligned
from dsv3.config import PretrainConfig
from dsv3.plan.ranks import RankPlan, RunPlan, plan_ranks

HEADER = (
    "pipeline rank",
    "ranks",
    "stages",
    "layers",
    "besides",
    "parameters",
    "weights",
    "master",
    "grads",
    "moments",
    "kept",
    "sum",
)


def describe_plan(config: PretrainConfig, *, ranks: int) -> str:
    """Return what each of so many ranks would hold; nothing is allocated.

    Raises:
        ConfigError: the settings do not divide over them.
    """
    plan = plan_ranks(config, world=ranks)
    parallel, schedule, batch = config.parallel, plan.timeline.schedule, config.batch
    own = "shared by the ranks that hold the same weights (ZeRO-1)" if parallel.zero else "whole on every rank"
    lines = [
        f"{ranks:,} ranks: {plan.data} pipelines of {parallel.pipeline}, schedule {schedule.name}; each has "
        f"{plan.micro_batches} micro-batches of {batch.micro_batch_sequences} x {batch.sequence_length:,} tokens, and "
        f"idles {plan.timeline.bubble_share:.1%} of the time if all chunks take equally long",
        f"experts: {plan.experts_per_rank} of {config.model.n_routed_experts} of each layer on a rank, every one on "
        f"{plan.expert_copies} ranks of a pipeline place; tokens travel {_wire(config)}",
        f"optimizer: {own}",
        "",
        *aligned([HEADER, *(_row(place) for place in plan.places)]),
        "",
        "GB of a rank that computes in BF16. 'kept' waits for the backward pass, at the worst moment of a step.",
        "Buffers, and what a kernel needs for a moment, are not in it; dsv3 plan has them, and what a step costs.",
        *_average(plan),
    ]
    return "\n".join(lines)


def _wire(config: PretrainConfig) -> str:
    if config.parallel.expert == 1:
        return "nowhere"
    return "in FP8 and their outputs back in BF16" if config.parallel.wire == "fp8" else "as they are computed"


def _row(place: RankPlan) -> tuple[str, ...]:
    layers = ", ".join(f"{one.start}-{one.stop - 1}" if len(one) > 1 else str(one.start) for one in place.layers)
    besides = [name for name, has in (("embedding", place.has_embedding), ("head", place.has_end)) if has]
    parameters = (place.shared_parameters + place.expert_parameters) / 1e9
    memory = (place.weights, place.master, place.gradients, place.moments, place.activations, place.on_device)
    return (
        str(place.pipeline_rank),
        f"{place.ranks.start}-{place.ranks.stop - 1}",
        ", ".join(map(str, place.stages)),
        layers,
        ", ".join(besides) or "-",
        f"{parameters:.2f}B",
        *(f"{number / 1e9:.1f}" for number in memory),
    )


def _average(plan: RunPlan) -> list[str]:
    most = max(place.average for place in plan.places)
    return (
        [f"The running average of the weights takes up to {most / 1e9:.1f} GB more of a rank's CPU memory."]
        if most
        else []
    )
