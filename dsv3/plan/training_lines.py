"""A plan as numbers that say where they come from: what `dsv3 plan` prints, line by line."""

from collections.abc import Iterator

from dsv3.plan.cost import Cost
from dsv3.plan.counts import (
    count_parameters,
    mtp_training_flops_per_token,
    training_flops_per_token,
    training_flops_per_token_not_causal,
)
from dsv3.plan.hardware import H800, Hardware
from dsv3.plan.layer_times import BF16_SHARE, SET_ASIDE, TRACE, waits
from dsv3.plan.published_run import PUBLISHED_RUN, Published, is_published_run
from dsv3.plan.reason import Line, Source
from dsv3.plan.traffic import token_traffic
from dsv3.plan.training import FITTED_IMBALANCE, TrainingPlan

COMPUTED, PUBLISHED, ASSUMPTION, FITTED = Source.COMPUTED, Source.PUBLISHED, Source.ASSUMPTION, Source.FITTED


def training_lines(plan: TrainingPlan, *, cost: Cost) -> tuple[Line, ...]:
    """Return every number of a plan in the order in which one follows from another."""
    return (
        *_cluster(plan.gpu),
        *_parameters(plan),
        *_memory(plan),
        *_work(plan),
        *_traffic(plan),
        *_trace(),
        *_layer(plan),
        *_time(plan),
        *_speed(plan),
        *_cost(plan, cost=cost),
    )


def published_beside(plan: TrainingPlan) -> dict[str, Published]:
    """Return the published numbers that this plan can be held against, by the names of lines."""
    return PUBLISHED_RUN if is_published_run(plan) else {}


def _cluster(gpu: Hardware) -> Iterator[Line]:
    source = PUBLISHED if gpu == H800 else ASSUMPTION
    for name, value, unit in (
        ("peak, BF16", gpu.bf16_tflops * 1e12, "FLOPs/s"),
        ("peak, FP8", gpu.fp8_tflops * 1e12, "FLOPs/s"),
        ("memory of a GPU", gpu.memory_gb * 1e9, "bytes"),
        ("NVLink, one way", gpu.node_gb_s * 1e9, "bytes/s"),
        ("IB, one way", gpu.network_gb_s * 1e9, "bytes/s"),
    ):
        yield Line(section="cluster", name=name, value=value, unit=unit, source=source, why=gpu.origin)


def _parameters(plan: TrainingPlan) -> Iterator[Line]:
    counts = count_parameters(plan.config.model)
    for name, value, why in (
        ("embedding", counts.embedding, "rows of the vocabulary"),
        ("head", counts.head, "not tied to the embedding"),
        ("attention", counts.attention, "all layers, norms of the latents among them"),
        ("dense MLP", counts.dense_mlp, "of the first layers"),
        ("routed experts", counts.routed_experts, "all layers"),
        ("shared experts", counts.shared_experts, "all layers"),
        ("routers", counts.routers + counts.router_biases, "with the biases of balancing"),
        ("norms", counts.norms, "two a layer, and the last"),
        ("parameters", counts.total, "sum of these: the main model"),
        ("active parameters", counts.active, "what a token passes through, the head with it and the embedding not"),
        ("MTP", counts.mtp, "without embedding and head, which it shares"),
    ):
        yield Line(section="parameters", name=name, value=value, unit="", source=COMPUTED, why=why)


def _memory(plan: TrainingPlan) -> Iterator[Line]:
    place, config, room = plan.fullest, plan.config, plan.buffers
    again = [name for name in ("norms", "up_projections", "swiglu") if getattr(config.recompute, name)]
    fp8 = config.precision.recipe != "original"
    owner = "own rows (ZeRO-1)" if config.parallel.zero else "all rows"
    number = "BF16" if plan.dtype == "bfloat16" else "FP32"
    for name, value, source, why in (
        ("weights", place.weights, COMPUTED, f"{number}" + (", FP8 where the report has it" if fp8 else "")),
        ("master", place.master, COMPUTED, f"FP32; behind FP8 copies whole, else of {owner}"),
        ("gradients", place.gradients, COMPUTED, "FP32 sums; of what is not FP8 a micro-batch's own beside them"),
        ("moments", place.moments, COMPUTED, f"{'BF16' if config.optim.bf16_moments else 'FP32'}, of {owner}"),
        (
            "activations",
            place.activations - place.fp8_cache,
            COMPUTED,
            f"kept in {number} at the worst moment of the schedule; made again: {', '.join(again) or 'nothing'}",
        ),
        ("FP8 caches", place.fp8_cache, COMPUTED, "kept in FP8 and E5M6, with their scales (report 3.3.3)"),
        (
            "buffers",
            place.messages + room.total - room.system,
            ASSUMPTION,
            "rows at the experts, hidden states under way, a chunk of logits",
        ),
        ("system", room.system, ASSUMPTION, "context of CUDA, NCCL, gaps between allocations"),
        (
            "bytes of the fullest rank",
            plan.bytes_of(place),
            COMPUTED,
            f"rank {place.ranks.start}, sum of these; " + ("fits" if plan.fits else "DOES NOT FIT"),
        ),
    ):
        yield Line(section="memory", name=name, value=value, unit="bytes", source=source, why=why)


def _work(plan: TrainingPlan) -> Iterator[Line]:
    model, length = plan.config.model, plan.config.batch.sequence_length
    for name, value, why in (
        ("FLOPs of a token", training_flops_per_token(model, sequence_length=length), "6 x active + causal attention"),
        (
            "  masked scores counted",
            training_flops_per_token_not_causal(model, sequence_length=length),
            "6 x active + attention to the whole row",
        ),
        ("  MTP on top", mtp_training_flops_per_token(model, sequence_length=length), "not counted in MFU"),
    ):
        yield Line(section="work", name=name, value=value, unit="FLOPs", source=COMPUTED, why=why)


def _traffic(plan: TrainingPlan) -> Iterator[Line]:
    token = token_traffic(plan.config, gpu=plan.gpu)
    yield Line(
        section="traffic",
        name="other nodes of a token",
        value=token.nodes,
        unit="",
        source=COMPUTED,
        why="with experts for it in one layer, if every allowed choice is as likely",
    )
    for flow in plan.flows:
        seconds = flow.num_bytes / plan.gpu.bytes_per_second(flow.link)
        hidden = "beside computing" if flow.is_hidden else "beside nothing"
        yield Line(
            section="traffic",
            name=f"{flow.name}, {flow.link}",
            value=flow.num_bytes,
            unit="bytes",
            source=COMPUTED,
            why=f"a rank in a step; {seconds:.3g} s at the rate of the link, {hidden}",
        )


TRACED = {
    "ATTN(F)": "attention_forward",
    "DISPATCH(F)": "dispatch_forward",
    "MLP(F)": "mlp_forward",
    "COMBINE(F)": "combine_forward",
    "COMBINE(B)": "combine_backward",
    "MLP(B)": "mlp_backward",
    "MLP(W)": "mlp_weight",
    "DISPATCH(B)": "dispatch_backward",
    "ATTN(B)": "attention_backward",
    "ATTN(W)": "attention_weight",
}
"""Parts of a layer by the names of report 3.2.1."""


def _trace() -> Iterator[Line]:
    for name, field in TRACED.items():
        yield Line(
            section="trace",
            name=name,
            value=getattr(TRACE, field),
            unit="seconds",
            source=PUBLISHED,
            why="deepseek-ai/profile-data, train: a layer with experts of V3 on H800, 4,096 tokens, EP64, balanced",
        )
    yield Line(
        section="trace",
        name="SMs set aside",
        value=SET_ASIDE,
        unit="share",
        source=PUBLISHED,
        why="20 of 132, for dispatch and combine (report 3.2.2)",
    )
    for name, value in zip(("waits, forward", "waits, backward"), waits(), strict=True):
        yield Line(
            section="trace",
            name=name,
            value=value,
            unit="",
            source=COMPUTED,
            why="times as long as the bytes need at the rate of the link: what the trace's communication takes",
        )


def _layer(plan: TrainingPlan) -> Iterator[Line]:
    """Yield what the trace comes to for this model, micro-batch, cluster and GPU."""
    clock = plan.clock.clock
    attention, experts, dense, end = clock.attention(), clock.experts(), clock.dense_mlp(), clock.end()
    model = plan.config.model
    scaled = "the trace's, by FLOPs and peak" if plan.config.precision.recipe != "original" else "by BF16 products"
    parts = [("attention", attention, f"{scaled}; scores and values apart, in BF16")]
    if model.num_moe_layers + model.num_nextn_predict_layers:
        parts.append(("experts", experts, f"{scaled}; the routed ones with the busiest rank's tokens"))
    if model.num_moe_layers < model.num_hidden_layers:
        parts.append(("dense MLP", dense, scaled))
    parts.append(("end of the model", end, "head in BF16, once a loss, and MTP modules whole"))
    for name, work, why in parts:
        for kind in ("forward", "backward", "weight"):
            yield _layer_line(f"{name}, {kind}", value=getattr(work, kind), why=why)
    for kind in ("forward", "backward"):
        if getattr(experts, f"{kind}_bare"):
            why = "dispatch and combine of a layer while others compute: the trace's, by bytes and rate of the link"
            yield _layer_line(f"tokens, {kind}, woven", value=getattr(experts, f"{kind}_link"), why=why)
            why = "the same with nothing beside it: bytes at the rate of the link"
            yield _layer_line(f"tokens, {kind}, alone", value=getattr(experts, f"{kind}_bare"), why=why)


def _layer_line(name: str, *, value: float, why: str) -> Line:
    return Line(section="layer", name=name, value=value, unit="seconds", source=COMPUTED, why=why)


def _time(plan: TrainingPlan) -> Iterator[Line]:
    yield Line(
        section="time",
        name="tokens of the busiest experts",
        value=plan.imbalance,
        unit="",
        source=FITTED if plan.imbalance == FITTED_IMBALANCE else ASSUMPTION,
        why="more than the mean, as a share of it; chosen so that the published run's woven chunks take their 13.95 s; "
        "the trace has 0, perfectly balanced, and so has --imbalance 0"
        if plan.imbalance == FITTED_IMBALANCE
        else "more than the mean; given on the command line",
    )
    yield Line(
        section="time",
        name="BF16 products",
        value=BF16_SHARE,
        unit="",
        source=ASSUMPTION,
        why="share of the peak: head, eh_proj" + (", all layers" if plan.config.precision.recipe == "original" else ""),
    )
    time = plan.pipeline
    for name, value, why in (
        (
            "forward",
            time.forward,
            "forward chunks alone: layers of the stage, and moving their tokens; mean of ranks, as are the next",
        ),
        ("backward", time.backward, "backward chunks alone"),
        ("weights' gradients", time.weight, "those that were put off"),
        ("woven", time.woven, "a forward chunk in a backward one: the longer of computing and moving tokens"),
        ("  moving tokens, uncovered", plan.uncovered_seconds, "of these four, what computing alone would not take"),
        ("bubble", time.bubble, "waiting, by the schedule on paper"),
        ("optimizer", plan.optimizer_seconds, "gradients in FP32, weights back in BF16, the step; beside nothing"),
        ("step", plan.step_seconds, f"sum of these; {_micro_batches(plan)}"),
    ):
        yield Line(section="time", name=name, value=value, unit="seconds", source=COMPUTED, why=why)


def _micro_batches(plan: TrainingPlan) -> str:
    batch = plan.config.batch
    told = f"{plan.micro_batches} micro-batches of {batch.micro_batch_sequences} x {batch.sequence_length:,}"
    if plan.idle_micro_batches:
        told += f", {plan.idle_micro_batches} of them empty: the schedule needs so many"
    return told


def _speed(plan: TrainingPlan) -> Iterator[Line]:
    for name, value, unit, why in (
        ("tokens a second", plan.tokens_per_second, "tokens/s", f"{plan.tokens_per_step:,} tokens a step"),
        ("MFU, causal", plan.mfu(causal=True), "share", "of the peak of BF16; main model without MTP"),
        ("MFU, masked scores counted", plan.mfu(causal=False), "share", "the same"),
        ("bubble of a step", plan.bubble_fraction, "share", "mean of ranks"),
    ):
        yield Line(section="speed", name=name, value=value, unit=unit, source=COMPUTED, why=why)


def _cost(plan: TrainingPlan, *, cost: Cost) -> Iterator[Line]:
    before = cost.pretrain
    days = before.seconds / 86_400
    yield Line(
        section="cost",
        name="pre-training",
        value=cost.pretrain_hours,
        unit="GPU-hours",
        source=COMPUTED,
        why=f"{before.steps:,} steps, {before.tokens / 1e12:.4g}T tokens, the batch growing as set; {days:.1f} days",
    )
    for phase in cost.extensions:
        fits = "fits"
        if phase.fits_with != phase.context_ranks:
            fits = "DOES NOT FIT" + (f" with our trainer; {phase.fits_with} would" if phase.fits_with else "")
        yield Line(
            section="cost",
            name=phase.name,
            value=phase.gpu_hours(world=cost.world),
            unit="GPU-hours",
            source=ASSUMPTION if phase.context_ranks > 1 else COMPUTED,
            why=f"{phase.steps:,} steps; each row on {phase.context_ranks} ranks (how, is not published); "
            f"{phase.bytes_of_fullest / 1e9:.1f} GB, {fits}",
        )
    yield Line(
        section="cost",
        name="longer context",
        value=cost.context_hours,
        unit="GPU-hours",
        source=COMPUTED,
        why="sum of the extensions" if cost.extensions else "none: rows are as long as they get, or it was left out",
    )
    yield Line(
        section="cost",
        name="post-training",
        value=cost.post_hours,
        unit="GPU-hours",
        source=PUBLISHED if is_published_run(plan) else ASSUMPTION,
        why="one figure of the report's table 1, not planned" if cost.post_hours else "not planned (--post-hours)",
    )
    yield Line(
        section="cost",
        name="all GPU-hours",
        value=cost.total_hours,
        unit="GPU-hours",
        source=COMPUTED,
        why="sum of the three",
    )
    yield Line(
        section="cost",
        name="price",
        value=cost.dollars,
        unit="USD",
        source=COMPUTED,
        why=f"{cost.dollars_per_hour:g} USD a GPU-hour (--dollars-per-hour); research and ablations are not in it",
    )
