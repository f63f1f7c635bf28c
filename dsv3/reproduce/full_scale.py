"""The report's own scale: the settings of each run, and the command that starts it on a cluster. Nothing is run."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from dsv3.config import PretrainConfig
from dsv3.config.files import write_config
from dsv3.config.override import apply_overrides
from dsv3.plan.hardware import H800
from dsv3.plan.training import plan_training
from dsv3.recipes import v3_16b
from dsv3.recipes.v2 import steps_down

GPUS, GPUS_A_NODE = 256, 8
TOKENS = 1_330_000_000_000
"""Of the report's small models of 15.7 billion parameters (4.5.1, 4.5.2, B.1)."""
RUNS = "runs/full"
LAUNCH = (
    "torchrun --nnodes {nodes} --nproc-per-node {each} --rdzv-backend c10d --rdzv-endpoint HOST:29500 --no-python \\\n"
    "    -- dsv3 pretrain --config {file} --run {run} --data PATH"
)

V3_GATE = {"model.scoring_func": "sigmoid", "model.norm_topk_prob": "true"}
"""The baselines of Table 5 have V3's gate and V2's losses."""
BIAS = V3_GATE | {"model.topk_method": "noaux_tc", "balance.method": "bias", "balance.sequence_loss_weight": "0.0"}
BALANCED = BIAS | {"balance.sequence_loss_weight": "1e-4"}
"""V3's own balancing, with the complementary loss."""


@dataclass(frozen=True, kw_only=True)
class FullScale:
    """How an experiment is made at the report's scale."""

    arms: Mapping[str, Mapping[str, str]]
    """Settings beyond recipe `v3_16b` at 1.33T tokens, by the name of the run; none where nothing is to be trained."""
    afterwards: str
    """What to do with the runs, or where nothing is trained."""


_AT_SCALE = "It is made at the published run's own scale already: leave out --scale full."
FULL = {
    "cost": FullScale(arms={}, afterwards=f"{_AT_SCALE} Other clusters: dsv3 plan v3_671b --gpus N --gpu NAME --fit"),
    "cache": FullScale(arms={}, afterwards=f"{_AT_SCALE} Other models: dsv3 inspect RECIPE"),
    "bubbles": FullScale(arms={}, afterwards=f"{_AT_SCALE} Other sizes: dsv3 schedule --ranks N --micro-batches M"),
    "schedule": FullScale(arms={}, afterwards=f"{_AT_SCALE} Other sizes: dsv3 schedule dualpipe --picture FILE"),
    "accumulator": FullScale(
        arms={}, afterwards=f"{_AT_SCALE} On a GPU of Hopper's kind: python benchmarks/fp8_gpu.py"
    ),
    "balancing": FullScale(
        arms={
            "sequence_loss": V3_GATE | {"balance.method": "sequence_loss"},
            "batch_loss": V3_GATE | {"balance.method": "batch_loss"},
            "bias": BIAS,
            "none": V3_GATE | {"balance.method": "none"},
        },
        afterwards="Then, for each: dsv3 evaluate RUN (MaxVio and bits per byte), dsv3 eval run RUN (Table 5's rows)",
    ),
    "moe": FullScale(
        arms={
            "v3": BALANCED,
            "v2": {},
            "dense": {
                "model.first_k_dense_replace": "27",
                "model.intermediate_size": "11264",
                "balance.method": "none",
            },
        },
        afterwards="Then, for each: dsv3 evaluate RUN. The dense network is as wide as all experts of a token",
    ),
    "mtp": FullScale(
        arms={"base": BALANCED, "mtp": BALANCED | {"model.num_nextn_predict_layers": "1"}},
        afterwards="Then, for each: dsv3 eval run RUN (Table 4's rows)",
    ),
    "acceptance": FullScale(
        arms={"mtp": BALANCED | {"model.num_nextn_predict_layers": "1"}},
        afterwards="Then: dsv3 eval domains RUN; of the published weights: dsv3 eval domains FOLDER --data PATH",
    ),
    "specialisation": FullScale(
        arms={"sequence_loss": V3_GATE | {"balance.method": "sequence_loss"}, "bias": BIAS},
        afterwards="Then, for each: dsv3 eval domains RUN --data PATH, a folder for each domain of the Pile's test set",
    ),
    "fp8": FullScale(
        arms={"original": BALANCED, "fp8_v3": BALANCED | {"precision.recipe": "fp8_v3"}},
        afterwards="Then compare 'loss' of both metrics.jsonl, smoothed by an average of 0.9",
    ),
    "niah": FullScale(
        arms={},
        afterwards="dsv3 pretrain v3_671b, dsv3 extend RUN, dsv3 sft, then: dsv3 eval needle RUN --longest 131072",
    ),
    "distillation": FullScale(
        arms={},
        afterwards="dsv3 distill --help: a teacher behind an OpenAI endpoint; then dsv3 sft, and dsv3 eval run on both",
    ),
}


def full_scale_run(settings: Mapping[str, str]) -> PretrainConfig:
    """Return recipe `v3_16b` for 1.33T tokens on 256 GPUs that share the experts by 8, with some settings changed.

    The learning rate falls at 80% and 90% of the tokens, as the recipe's; that of the ablations is not published.
    """
    start = v3_16b()
    rate = steps_down(
        peak=start.optim.learning_rate.peak, first_tokens=TOKENS * 80 // 100, second_tokens=TOKENS * 90 // 100
    )
    config = replace(
        start,
        total_tokens=TOKENS,
        optim=replace(start.optim, learning_rate=rate),
        parallel=replace(start.parallel, expert=GPUS_A_NODE, zero=True),
        balance=replace(start.balance, bias_freeze_tokens=TOKENS * 143 // 148),
        mtp=replace(start.mtp, switch_tokens=TOKENS * 100 // 148),
    )
    return apply_overrides(config, assignments=[f"{name}={value}" for name, value in settings.items()])


def full_scale_text(name: str, *, folder: Path) -> str:
    """Write the settings of each run into `folder` and return what to do with them.

    Raises:
        ConfigError: the folder cannot be written.
    """
    wanted = FULL[name]
    lines = [f"{name} at the report's scale"]
    for arm, settings in wanted.arms.items():
        config, file = full_scale_run(settings), folder / f"{arm}.json"
        write_config(config, path=file)
        plan = plan_training(config, gpu=H800, world=GPUS)
        hours = config.total_tokens / plan.tokens_per_second * GPUS / 3600
        run = f"{RUNS}/{name}/{arm}"
        lines += [
            "",
            f"{arm}: about {hours:,.0f} GPU-hours on {GPUS} H800, by dsv3 plan",
            LAUNCH.format(nodes=GPUS // GPUS_A_NODE, each=GPUS_A_NODE, file=file, run=run),
        ]
    return "\n".join([*lines, "", wanted.afterwards])
