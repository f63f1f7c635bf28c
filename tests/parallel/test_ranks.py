"""Many ranks train as one does."""

import math
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from dsv3.batch import TokenBatch
from dsv3.config import (
    BalanceConfig,
    BatchConfig,
    LearningRateConfig,
    ModelConfig,
    MtpLossConfig,
    OptimConfig,
    ParallelConfig,
    PrecisionConfig,
    PretrainConfig,
    RuntimeConfig,
)
from dsv3.errors import ConfigError, NonFiniteError
from dsv3.parallel.ranks import Alone, Ranks
from dsv3.plan.stages import require_whole_pipelines
from dsv3.train.resume import new_state
from dsv3.train.step import train_step

STEPS, ROWS, LENGTH = 20, 8, 16
SLOW = pytest.mark.slow
LAYOUTS = {
    "data 2": (2, {}, SLOW),
    "experts 2": (2, {"expert": 2}, SLOW),
    "data 4": (4, {}, SLOW),
    "data 2, experts 2": (4, {"expert": 2}, SLOW),
    "experts 4": (4, {"expert": 4}, SLOW),
    "experts 4 on nodes of 2": (4, {"expert": 4, "ranks_per_node": 2}, SLOW),
    "zero 2": (2, {"zero": True}, SLOW),
    "experts 2, zero 2": (4, {"expert": 2, "zero": True}, SLOW),
    "gpipe 2": (2, {"pipeline": 2, "schedule": "gpipe"}, SLOW),
    "1f1b 2": (2, {"pipeline": 2, "schedule": "1f1b"}, SLOW),
    "interleaved 2": (2, {"pipeline": 2, "schedule": "interleaved"}, SLOW),
    "zb1p 2": (2, {"pipeline": 2, "schedule": "zb1p"}, SLOW),
    "zbv 2": (2, {"pipeline": 2, "schedule": "zbv"}, SLOW),
    "dualpipe 2": (2, {"pipeline": 2, "schedule": "dualpipe"}, SLOW),
    "dualpipe_v 2": (2, {"pipeline": 2, "schedule": "dualpipe_v"}, SLOW),
    "gpipe 4": (4, {"pipeline": 4, "schedule": "gpipe"}, SLOW),
    "1f1b 4": (4, {"pipeline": 4, "schedule": "1f1b"}, SLOW),
    "zb1p 4": (4, {"pipeline": 4, "schedule": "zb1p"}, SLOW),
    "dualpipe 4": (4, {"pipeline": 4, "schedule": "dualpipe"}, SLOW),
    "dualpipe 2, experts 2": (4, {"pipeline": 2, "expert": 2, "schedule": "dualpipe"}, ()),
    "1f1b 2, experts 2": (4, {"pipeline": 2, "expert": 2, "schedule": "1f1b"}, SLOW),
    "zbv 2, experts 2": (4, {"pipeline": 2, "expert": 2, "schedule": "zbv"}, SLOW),
    "dualpipe 2, data 2, zero": (4, {"pipeline": 2, "zero": True, "schedule": "dualpipe"}, SLOW),
    "woven, experts 2": (2, {"expert": 2, "schedule": "dualpipe_v"}, ()),
    "context 2": (2, {"context": 2}, ()),
    "context 4": (4, {"context": 4}, SLOW),
    "context 2, experts 2": (2, {"context": 2, "expert": 2}, SLOW),
    "context 2, experts 4": (4, {"context": 2, "expert": 4}, SLOW),
    "dualpipe 2, context 2, zero": (4, {"pipeline": 2, "context": 2, "zero": True, "schedule": "dualpipe"}, SLOW),
    "woven, context 2, experts 2": (2, {"context": 2, "expert": 2, "schedule": "dualpipe_v"}, SLOW),
    "1f1b 2, experts 2, data 2, zero": (
        8,
        {"pipeline": 2, "expert": 2, "zero": True, "schedule": "1f1b"},
        SLOW,
    ),
}
"""Ranks, and how they share the work."""


def config_of(*, balance="bias", recipe="original", micro=2, layers=4, dtype="auto", mtp=0.3):
    model = ModelConfig(
        vocab_size=64,
        hidden_size=16,
        num_hidden_layers=layers,
        initializer_range=0.1,
        max_position_embeddings=64,
        num_attention_heads=2,
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_nope_head_dim=4,
        qk_rope_head_dim=4,
        v_head_dim=4,
        intermediate_size=24,
        moe_intermediate_size=8,
        first_k_dense_replace=1,
        n_routed_experts=8,
        num_experts_per_tok=3,
        n_group=4,
        topk_group=2,
    )
    return PretrainConfig(
        model=model,
        batch=BatchConfig(sequence_length=LENGTH, micro_batch_sequences=micro),
        # A clipped norm, and moments in FP32: rounding them would make a last bit a whole one.
        optim=OptimConfig(
            learning_rate=LearningRateConfig(peak=3e-3, warmup_steps=2), bf16_moments=False, clip_gradient_norm=0.5
        ),
        precision=PrecisionConfig(recipe=recipe),
        mtp=MtpLossConfig(early_weight=mtp),
        runtime=RuntimeConfig(dtype=dtype),
        balance=BalanceConfig(method=balance, bias_update_speed=1e-3, sequence_loss_weight=1e-2),
    )


def rows_of(step):
    generator = torch.Generator().manual_seed(step)
    return torch.randint(64, (ROWS, LENGTH + 1), generator=generator)


def share(rows, *, ranks, micro):
    """Return a rank's rows as the loader deals them, in micro-batches that together are as large on any number."""
    mine = rows[ranks.row_rank :: ranks.row_size]
    batches = [TokenBatch.from_rows(part) for part in mine.split(max(1, micro // ranks.row_size))]
    return [ranks.share_rows(batch) for batch in batches]


def open_layout(config, parallel):
    return Ranks(parallel, model=config.model, sequence_length=LENGTH) if dist.is_initialized() else Alone()


def train(*, parallel=None, **settings):
    """Train on as many ranks as there are processes; return each step's numbers and what the weights have become."""
    config = config_of(**settings)
    ranks = open_layout(config, parallel)
    state = new_state(config, ranks=ranks)
    numbers = []
    for step in range(STEPS):
        batches = share(rows_of(step), ranks=ranks, micro=config.batch.micro_batch_sequences)
        found = train_step(state, batches=batches)
        numbers.append(
            [found.loss, *found.mtp_loss, found.balance_loss, found.gradient_norm, found.tokens, found.batch_sequences]
        )
    loads = torch.stack([load.cpu() for load in found.load])
    first = {name: ranks.first_row(name) for name in state.optimizer.parameters}
    weights = {name: (first[name], weight.detach().clone()) for name, weight in state.optimizer.parameters.items()}
    biases = {place: router.e_score_correction_bias for place, router in state.model.routers_by_place().items()}
    return torch.tensor(numbers, dtype=torch.float64), loads, weights, biases


ON_ONE_RANK = {}


@pytest.fixture
def on_one_rank(on_ranks):
    """Train on one rank, in a process of its own like the others, where shapes are not checked; once a setting."""

    def run(**settings):
        key = str(sorted(settings.items()))
        if key not in ON_ONE_RANK:
            (ON_ONE_RANK[key],) = on_ranks(train, size=1, **settings)
        return ON_ONE_RANK[key]

    return run


@pytest.mark.parametrize(
    ("size", "parallel"),
    [pytest.param(size, parallel, id=name, marks=marks) for name, (size, parallel, marks) in LAYOUTS.items()],
)
def test_twenty_steps_are_those_of_one_rank(on_ranks, on_one_rank, size, parallel):
    """Losses, MTP, the clipped norm, biases by global counts, and all weights."""
    micro = 1 if parallel.get("pipeline") == 4 else 2  # eight micro-batches where DualPipe needs as many
    numbers, loads, weights, biases = on_one_rank(micro=micro)
    seen = set()
    for found in on_ranks(train, size=size, parallel=ParallelConfig(**parallel), micro=micro):
        assert (found[0] - numbers).abs().max() < 1e-5 * numbers.abs().max().clamp(max=10)
        assert (found[0][:, 0] - numbers[:, 0]).abs().max() < 1e-6
        assert torch.equal(found[1], loads)
        for place, bias in found[3].items():
            assert torch.equal(bias, biases[place])
        for name, (first, weight) in found[2].items():
            assert torch.allclose(weight, weights[name][1][first : first + len(weight)], atol=2e-5), name
        seen |= set(found[2])
    assert seen == set(weights)


@pytest.mark.parametrize(
    ("size", "parallel"),
    [
        (2, {"pipeline": 2, "schedule": "zbv"}),
        pytest.param(4, {"pipeline": 2, "expert": 2, "schedule": "dualpipe"}, marks=SLOW),
        pytest.param(4, {"expert": 2, "zero": True}, marks=SLOW),
        pytest.param(4, {"pipeline": 4, "schedule": "zb1p"}, marks=SLOW),
        pytest.param(4, {"context": 4, "expert": 2}, marks=SLOW),
    ],
)
def test_in_fp64_they_are_those_of_one_rank_to_the_ninth_digit(on_ranks, on_one_rank, size, parallel):
    micro = 1 if parallel.get("pipeline") == 4 else 2
    numbers, *_ = on_one_rank(micro=micro, dtype="float64")
    for found, *_ in on_ranks(train, size=size, parallel=ParallelConfig(**parallel), dtype="float64", micro=micro):
        assert (found[:, 0] - numbers[:, 0]).abs().max() < 1e-9


@pytest.mark.parametrize(
    ("settings", "parallel"),
    [
        pytest.param({"balance": "batch_loss"}, {"expert": 2}, marks=SLOW),
        pytest.param({"balance": "batch_loss"}, {"pipeline": 2, "expert": 2}, marks=SLOW),
        pytest.param({"balance": "batch_loss", "mtp": 0.0}, {"pipeline": 2, "schedule": "1f1b"}, marks=SLOW),
        pytest.param({"balance": "sequence_loss"}, {"expert": 2}, marks=SLOW),
        pytest.param({"balance": "sequence_loss"}, {"context": 2}, marks=SLOW),
        pytest.param({"balance": "batch_loss"}, {"context": 2}, marks=SLOW),
        pytest.param({"balance": "v2_losses"}, {"context": 2}, marks=SLOW),
        pytest.param({"balance": "v2_losses"}, {"pipeline": 2, "expert": 2}, marks=SLOW),
        pytest.param({"mtp": 0.0}, {"pipeline": 2, "expert": 2, "schedule": "1f1b"}, marks=SLOW),
    ],
)
def test_every_loss_counts_all_ranks_and_layers(on_ranks, on_one_rank, settings, parallel):
    numbers, *_ = on_one_rank(**settings)
    size = 4 if "expert" in parallel else 2
    for found, *_ in on_ranks(train, size=size, parallel=ParallelConfig(**parallel), **settings):
        assert (found - numbers).abs().max() < 1e-5 * numbers.abs().max().clamp(max=10)


@pytest.mark.parametrize(
    "schedule",
    [pytest.param("1f1b", marks=SLOW), pytest.param("zb1p", marks=SLOW), pytest.param("dualpipe", marks=SLOW)],
)
def test_fp8_on_a_pipeline_is_fp8_on_one_rank(on_ranks, on_one_rank, schedule):
    """The rows are the same, and so are the tiles. What DualPipe adds up in another order, FP8 makes larger.

    Without MTP, whose share in the embedding's gradient is added up elsewhere.
    """
    numbers, *_ = on_one_rank(recipe="fp8_v3", mtp=0.0)
    for found, *_ in on_ranks(
        train, size=2, parallel=ParallelConfig(pipeline=2, schedule=schedule), recipe="fp8_v3", mtp=0.0
    ):
        assert (found[:2, 0] - numbers[:2, 0]).abs().max() < 1e-6
        assert (found[:, 0] - numbers[:, 0]).abs().max() < (0.02 if schedule == "dualpipe" else 1e-6)


@pytest.mark.slow
def test_fp8_begins_alike_and_stays_close(on_ranks, on_one_rank):
    """Not bit for bit: the tiles of Wgrad are 128 tokens long, and which tokens are neighbours depends on the ranks."""
    numbers, *_ = on_one_rank(recipe="fp8_v3")
    found, *_ = on_ranks(train, size=2, parallel=ParallelConfig(expert=2), recipe="fp8_v3")[0]
    assert (found[0, :2] - numbers[0, :2]).abs().max() < 1e-6
    assert (found[:, 0] - numbers[:, 0]).abs().max() < 0.03


@pytest.mark.slow
def test_tokens_in_fp8_on_the_wire_change_nothing_where_experts_compute_in_fp8(on_ranks):
    """The experts round what comes by the same rule, which finds it rounded. BF16 on the way back does round."""
    plain, wired = (
        on_ranks(train, size=2, parallel=ParallelConfig(expert=2, wire=wire), recipe="fp8_v3")[0][0]
        for wire in ("compute", "fp8")
    )
    assert (wired[:, 0] - plain[:, 0]).abs().max() < 0.02
    assert not torch.equal(wired, plain)


def break_one_rank(*, what, parallel):
    """Train with a fault on the last rank alone; return what every rank is told."""
    config = config_of()
    ranks = open_layout(config, ParallelConfig(**parallel))
    state = new_state(config, ranks=ranks)
    before = {name: weight.clone() for name, weight in state.optimizer.master.items()}
    batches = share(rows_of(0), ranks=ranks, micro=2)
    if ranks.rank == ranks.size - 1 and what == "gradient":
        # Finite forward, not backward: of this rank's tokens alone.
        state.model.embed_tokens.weight.register_hook(lambda gradient: gradient * math.inf)
    if ranks.rank == ranks.size - 1 and what == "loss":
        state.model.norm.weight.data.fill_(math.nan)
        before["norm.weight"] = state.model.norm.weight.data.clone()
    try:
        train_step(state, batches=batches)
    except NonFiniteError as error:
        same = all(torch.equal(a, before[name]) or a.isnan().all() for name, a in state.optimizer.master.items())
        return str(error), same, state.step
    return "", False, -1


@pytest.mark.parametrize(
    ("what", "message"),
    [("loss", "the loss is nan"), pytest.param("gradient", "the gradient of embed_tokens", marks=SLOW)],
)
@pytest.mark.parametrize(
    "parallel", [pytest.param({"expert": 2}, marks=SLOW), {"pipeline": 2, "expert": 2, "schedule": "dualpipe"}]
)
def test_what_breaks_on_one_rank_stops_all_with_the_same_words(on_ranks, what, message, parallel):
    told = on_ranks(break_one_rank, size=4, what=what, parallel=parallel)
    assert len({text for text, _, _ in told}) == 1
    assert message in told[0][0]
    assert "on rank 3" in told[0][0]
    assert all(unchanged and step == 0 for _, unchanged, step in told)


def refuse(**parallel):
    try:
        open_layout(config_of(), ParallelConfig(**parallel))
    except ConfigError as error:
        return str(error)
    return ""


def test_ranks_that_do_not_divide_are_refused_with_what_would(on_ranks):
    assert on_ranks(refuse, size=3, expert=2)[0] == (
        "3 ranks do not divide into expert axes of 2; use 1 for parallel.expert, or another number of ranks"
    )


def test_ranks_that_do_not_divide_to_share_rows_are_refused_with_what_would():
    with pytest.raises(ConfigError, match=r"6 ranks of each stage do not divide .* of 4 that share rows; use 1, 2, 3"):
        require_whole_pipelines(ParallelConfig(pipeline=2, context=4), world=12, num_experts=8)


def test_rows_too_short_to_share_are_refused():
    with pytest.raises(ConfigError, match=r"16 tokens is too short"):
        replace(config_of(), parallel=ParallelConfig(context=8))


def test_a_wire_that_nothing_travels_on_is_refused():
    with pytest.raises(ConfigError, match=r"parallel\.expert = 1"):
        ParallelConfig(wire="fp8")
