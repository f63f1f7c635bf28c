"""A small V3 beside its V2 variant and a dense model of equal active FLOPs, on the same rows."""

from dsv3.plan.counts import count_parameters, training_flops_per_token
from dsv3.report.bars import Panel, draw_seeds
from dsv3.report.lines import Curve, draw_lines
from dsv3.reproduce.arms import Arm, TrainedRun, seeds_of, settings_of, small_run, smoothed, train_arms
from dsv3.reproduce.balancing import NO_MTP
from dsv3.reproduce.experiment import Ask, Outcome, Picture
from dsv3.reproduce.finding import Number, Order

V3 = Arm(name="v3", label="V3", settings=NO_MTP)
V2 = Arm(
    name="v2",
    label="V2",
    settings=NO_MTP
    | {
        "model.scoring_func": "softmax",
        "model.topk_method": "group_limited_greedy",
        "model.norm_topk_prob": "false",
        "model.routed_scaling_factor": "1.0",
        "balance.method": "v2_losses",
    },
)
"""Router and balancing of V2 with V2-Lite's scale; attention and shape are V3's, which both have."""
DENSE = Arm(
    name="dense",
    label="dense",
    # The first layer's network is as wide as a shared expert and four routed ones: all layers are now such.
    settings=NO_MTP | {"model.first_k_dense_replace": "3", "balance.method": "none"},
)
ARMS = (V3, V2, DENSE)
EQUAL = 0.02
"""Share of the FLOPs: the router's are not in the dense model."""
SMOOTHING, UNSETTLED = 0.95, 20
"""Of the picture: the weight of what was before, and the steps that are not shown."""


def run(ask: Ask) -> Outcome:
    """Train the three."""
    configs = {arm.name: small_run(ask.tokens, seed=0, settings=arm.settings) for arm in ARMS}
    flops = {
        name: training_flops_per_token(config.model, sequence_length=config.batch.sequence_length)
        for name, config in configs.items()
    }
    parameters = {name: count_parameters(config.model).total for name, config in configs.items()}
    runs = train_arms(ask, arms=ARMS)
    loss = {arm.name: seeds_of(runs[arm.name], name="loss") for arm in ARMS}
    draw_seeds(
        [Panel(title="loss of held-out text, nats", values={arm.label: loss[arm.name] for arm in ARMS})],
        title=f"Equal active FLOPs, {ask.tokens:,} tokens; a dot a seed",
        file=ask.folder / "moe.png",
    )
    _draw_course(ask, runs=runs, flops=flops[DENSE.name])
    return Outcome(
        findings=(
            Number(
                claim="FLOPs of a token: dense beside V3",
                report="the comparison is at equal compute",
                expected=1.0,
                value=flops[DENSE.name] / flops[V3.name],
                tolerance=EQUAL,
            ),
            Order(
                claim="loss: V3 below dense at equal FLOPs",
                report="37B active beat dense models of 72B and 405B (Table 3)",
                lower=loss[V3.name],
                higher=loss[DENSE.name],
            ),
            Order(
                claim="loss: V3 below V2's router and balancing",
                report="no ablation by itself; Table 3 has V2-Base below V3-Base everywhere",
                lower=loss[V3.name],
                higher=loss[V2.name],
            ),
        ),
        pictures=(
            Picture(file="moe.png", caption="Held-out loss after the same tokens at the same FLOPs a token."),
            Picture(file="moe-course.png", caption="Training loss beside the dense model's, over compute."),
        ),
        settings=settings_of(ARMS),
        data={"loss": loss, "flops_per_token": flops, "parameters": parameters},
        remark=f"The mixture holds {parameters[V3.name]:,} parameters and the dense model {parameters[DENSE.name]:,}; "
        "a token passes as many of either.",
    )


def _draw_course(ask: Ask, *, runs: dict[str, list[TrainedRun]], flops: int) -> None:
    """Draw how far the mixtures' training losses lie from the dense model's, seed by seed."""
    curves = []
    for arm in (V3, V2):
        for number, (ours, dense) in enumerate(zip(runs[arm.name], runs[DENSE.name], strict=True)):
            apart = [a - b for a, b in zip(ours.losses, dense.losses, strict=True)]
            compute = [step["tokens"] * flops / 1e12 for step in ours.steps]
            name = "" if number else arm.label
            curves.append(Curve(name=name, x=compute[UNSETTLED:], y=smoothed(apart, weight=SMOOTHING)[UNSETTLED:]))
    draw_lines(
        curves,
        x_label="training compute, TFLOPs",
        y_label="loss less the dense model's, nats",
        title="Training loss at equal compute (smoothed; a line a seed)",
        levels={"dense": 0.0},
        file=ask.folder / "moe-course.png",
    )
