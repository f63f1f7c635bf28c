"""What each rank of a run will hold and do, worked out from its settings alone (report 3.2)."""

from dataclasses import dataclass, replace

from dsv3.config import ModelConfig, PretrainConfig
from dsv3.errors import ConfigError
from dsv3.plan.activations import FLOAT, fp8_cache, kept_at_end, kept_of_head, kept_of_tokens
from dsv3.plan.counts import layer_counts
from dsv3.plan.pipeline import Kind, Schedule
from dsv3.plan.simulate import ChunkCosts, Timeline, simulate
from dsv3.plan.stages import (
    Stages,
    make_schedule,
    make_stages,
    require_expert_ranks,
    require_whole_pipelines,
)


@dataclass(frozen=True, kw_only=True)
class RankPlan:
    """One place of the pipeline; the ranks that stand there differ in their rows and experts alone."""

    pipeline_rank: int
    ranks: range
    """Numbers of the ranks that stand there."""
    stages: tuple[int, ...]
    layers: tuple[range, ...]
    """Of each stage."""
    has_embedding: bool
    has_end: bool
    """Final norm, head and MTP modules."""
    shared_parameters: int
    """On every rank that stands there."""
    expert_parameters: int
    """Routed experts of one rank."""
    weights: int
    """Bytes that the model computes with, FP8 copies among them."""
    master: int
    """Bytes of FP32 weights beside them: of all rows where an FP8 recipe makes its copies from them, else of the own
    rows where ranks share the optimizer's state."""
    gradients: int
    moments: int
    """Both moments of AdamW; of the own rows where ranks share them."""
    activations: int
    """Bytes kept from forward to backward, at the worst moment of a step."""
    fp8_cache: int
    """Of these, what is kept in FP8 or E5M6, with its scales (report 3.3.3)."""
    messages: int
    """Bytes of hidden states and their gradients on their way from and to the neighbours in the pipeline."""
    average: int
    """Bytes of the running average, in CPU memory."""

    @property
    def on_device(self) -> int:
        """What stays or waits: everything but the average and messages."""
        return self.weights + self.master + self.gradients + self.moments + self.activations


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """How a run is laid out over its ranks."""

    world: int
    data: int
    """Pipelines, each of which reads other rows."""
    experts_per_rank: int
    expert_copies: int
    """Ranks of a stage that hold the same experts."""
    micro_batches: int
    """Of each pipeline in a step, when the batch has grown."""
    timeline: Timeline
    places: tuple[RankPlan, ...]


def plan_ranks(config: PretrainConfig, *, world: int) -> RunPlan:
    """Return what `world` ranks hold under `config.parallel`, computing in BF16 as on a GPU.

    Raises:
        ConfigError: ranks, experts, layers or rows do not divide as the settings want it.
    """
    parallel, model = config.parallel, config.model
    require_expert_ranks(parallel.expert, num_experts=model.n_routed_experts)
    require_whole_pipelines(parallel, world=world, num_experts=model.n_routed_experts)
    data = world // parallel.pipeline
    rows, readers = config.batch.final_sequences, data // parallel.context
    if rows % readers:
        raise ConfigError(
            f"batch.final_sequences = {rows} rows do not divide over {readers} pipelines; use a multiple of {readers}"
        )
    micro_batches = -(-rows // (config.batch.micro_batch_sequences * readers))
    schedule = make_schedule(parallel, num_micro_batches=micro_batches)
    stages = make_stages(parallel, model=model, sequence_length=config.batch.sequence_length)
    timeline = simulate(schedule, costs=ChunkCosts())
    return RunPlan(
        world=world,
        data=data,
        experts_per_rank=model.n_routed_experts // parallel.expert,
        expert_copies=data // parallel.expert,
        micro_batches=micro_batches,
        timeline=timeline,
        places=place_ranks(config, stages=stages, schedule=schedule, data=data),
    )


def place_ranks(
    config: PretrainConfig, *, stages: Stages, schedule: Schedule, data: int, dtype: str = "bfloat16"
) -> tuple[RankPlan, ...]:
    """Return what the ranks of each place of the pipeline hold when they compute in `dtype`, 'bfloat16' or 'float32'.

    `data` ranks stand at each place. Activations are at their worst in the first micro-batches of `schedule`, so that a
    shorter one than the run's has the same.
    """
    kept = _kept_by_stages(config, stages=stages, dtype=dtype)
    return tuple(
        _place(config, stages=stages, schedule=schedule, rank=rank, data=data, dtype=dtype, kept_by_stages=kept)
        for rank in range(config.parallel.pipeline)
    )


def _place(
    config: PretrainConfig,
    *,
    stages: Stages,
    schedule: Schedule,
    rank: int,
    data: int,
    dtype: str,
    kept_by_stages: tuple[tuple[int, int], ...],
) -> RankPlan:
    model = config.model
    held, last = stages.held_by(rank), len(stages.layers) - 1
    has_embedding, has_end = rank in stages.holders("embed_tokens"), last in held
    table = model.vocab_size * model.hidden_size
    counts: dict[int, list[_Held]] = {}
    for stage in held:
        copies = len(stages.holders(f"layers.{stages.layers[stage].start}.")) * data
        counts.setdefault(copies, []).append(_of_layers(config, layers=stages.layers[stage]))
    if has_embedding:
        counts.setdefault(len(stages.holders("embed_tokens")) * data, []).append(_Held(other=table))
    if has_end:
        counts.setdefault(len(stages.ends) * data, []).append(_of_end(config))
    all_held = [one for those in counts.values() for one in those]
    shared = sum(one.in_fp8 + one.other for one in all_held)
    experts = sum(one.experts for one in all_held)
    is_fp8 = config.precision.recipe != "original"
    wide = sum((one.in_fp8 + one.experts) if is_fp8 else 0 for one in all_held)  # FP32, its own master, and a copy
    narrow = shared + experts - wide
    is_bf16 = dtype == "bfloat16"
    tokens = config.batch.micro_batch_sequences * config.batch.sequence_length // config.parallel.context
    own_wide, own_narrow = _own_parameters(config, counts=counts, is_fp8=is_fp8)
    kept, in_fp8 = _peak_activations(schedule, rank=rank, kept_by_stages=kept_by_stages)
    return RankPlan(
        pipeline_rank=rank,
        ranks=range(rank * data, (rank + 1) * data),
        stages=held,
        layers=tuple(stages.layers[stage] for stage in held),
        has_embedding=has_embedding,
        has_end=has_end,
        shared_parameters=shared,
        expert_parameters=experts,
        weights=wide + narrow * (2 if is_bf16 else FLOAT),
        master=FLOAT * wide + (FLOAT * own_narrow if is_bf16 else 0),
        gradients=FLOAT * wide + (FLOAT + 2 if is_bf16 else FLOAT) * narrow,
        moments=2 * (own_wide + own_narrow) * (2 if config.optim.bf16_moments else FLOAT),
        activations=kept,
        fp8_cache=in_fp8,
        messages=stages.messages_of(rank) * tokens * model.hidden_size * (2 if is_bf16 else FLOAT),
        average=FLOAT * (own_wide + own_narrow) if config.optim.ema_decay > 0 else 0,
    )


@dataclass(frozen=True, kw_only=True)
class _Held:
    """Parameters of one rank, by what becomes of them."""

    in_fp8: int = 0
    """Matrices of attention, dense layers and shared experts."""
    other: int = 0
    experts: int = 0


def _own_parameters(config: PretrainConfig, *, counts: dict[int, list[_Held]], is_fp8: bool) -> tuple[int, int]:
    """Return parameters whose optimizer state a rank has, by whether they are kept in FP32 for FP8 copies."""
    wide = narrow = 0
    for copies, those in counts.items():
        for one in those:
            for number, sharers, is_wide in (
                (one.in_fp8, copies, is_fp8),
                (one.other, copies, False),
                (one.experts, copies // config.parallel.expert, is_fp8),
            ):
                own = -(-number // sharers) if config.parallel.zero else number
                wide, narrow = (wide + own, narrow) if is_wide else (wide, narrow + own)
    return wide, narrow


def _of_layers(config: PretrainConfig, *, layers: range) -> _Held:
    model = config.model
    of_layer = layer_counts(model)
    routed = sum(model.is_moe_layer(layer) for layer in layers)
    vectors = of_layer.norms + model.kv_lora_rank + (model.q_lora_rank or 0)
    matrices = len(layers) * (of_layer.attention - (vectors - of_layer.norms))
    matrices += (len(layers) - routed) * of_layer.dense_mlp + routed * of_layer.shared_experts
    own = model.n_routed_experts // config.parallel.expert
    return _Held(
        in_fp8=matrices,
        other=len(layers) * vectors + routed * (of_layer.router + of_layer.router_bias),
        experts=routed * own * of_layer.expert,
    )


def _of_end(config: PretrainConfig) -> _Held:
    """Return the parameters after the last layer: final norm, head, MTP modules."""
    model, modules = config.model, config.model.num_nextn_predict_layers
    as_layer = _of_layers(replace(config, model=replace(model, first_k_dense_replace=0)), layers=range(1))
    joint = 2 * model.hidden_size**2 + 3 * model.hidden_size
    return _Held(
        in_fp8=modules * as_layer.in_fp8,
        other=model.hidden_size * (1 + model.vocab_size) + modules * (as_layer.other + joint),
        experts=modules * as_layer.experts,
    )


def _peak_activations(schedule: Schedule, *, rank: int, kept_by_stages: tuple[tuple[int, int], ...]) -> tuple[int, int]:
    """Return the most bytes that a rank's chunks hold at once in the order of its schedule, and of these, in FP8."""
    held = in_fp8 = 0
    peak = (0, 0)
    for step in schedule.steps[rank]:
        for kind, stage, _ in step:
            if kind is Kind.FORWARD:
                held, in_fp8 = held + kept_by_stages[stage][0], in_fp8 + kept_by_stages[stage][1]
        peak = max(peak, (held, in_fp8))
        for kind, stage, _ in step:
            if kind is Kind.BACKWARD or kind is Kind.WEIGHT:
                held, in_fp8 = held - kept_by_stages[stage][0], in_fp8 - kept_by_stages[stage][1]
    return peak


def _kept_by_stages(config: PretrainConfig, *, stages: Stages, dtype: str) -> tuple[tuple[int, int], ...]:
    """Return the bytes that a micro-batch leaves at each stage, and of these, in FP8; equal stages are told once."""
    model = config.model
    forms = [
        (len(layers), sum(not model.is_moe_layer(layer) for layer in layers), stage == len(stages.layers) - 1)
        for stage, layers in enumerate(stages.layers)
    ]
    kept = {
        form: _kept_by_stage(config, layers=form[0], dense=form[1], is_last=form[2], dtype=dtype) for form in set(forms)
    }
    return tuple(kept[form] for form in forms)


def _kept_by_stage(config: PretrainConfig, *, layers: int, dense: int, is_last: bool, dtype: str) -> tuple[int, int]:
    model = config.model
    part: ModelConfig = replace(
        model,
        num_hidden_layers=layers,
        first_k_dense_replace=dense,
        num_nextn_predict_layers=model.num_nextn_predict_layers if is_last else 0,
    )
    of_stage = replace(config, model=part)
    tokens = config.batch.micro_batch_sequences * config.batch.sequence_length
    kept = kept_of_tokens(of_stage, tokens=tokens, dtype=dtype)
    own_tokens = -(-tokens // config.parallel.context)
    if not is_last:
        kept -= kept_of_head(part, tokens=own_tokens, dtype=dtype) + own_tokens * kept_at_end(config, dtype=dtype)
    return kept, fp8_cache(of_stage).per_token * own_tokens
