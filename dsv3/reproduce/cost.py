"""GPU-hours and dollars of the published run, planned phase by phase, beside the report's Table 1."""

from dsv3.plan.hardware import H800
from dsv3.plan.published_run import PUBLISHED_RUN, Published
from dsv3.plan.training import plan_training
from dsv3.recipes import v3_671b
from dsv3.report.bars import Group, draw_bars
from dsv3.reproduce.experiment import Ask, Outcome, Picture
from dsv3.reproduce.finding import Number, shown
from dsv3.reproduce.recipe_cost import recipe_cost

WORLD = 2048
TOLERANCE = 0.05


def run(ask: Ask) -> Outcome:
    """Plan the run and hold it against what is published."""
    plan = plan_training(v3_671b(), gpu=H800, world=WORLD)
    cost = recipe_cost(plan)
    seen = {
        "pre-training": (cost.pretrain_hours, "GPU-hours"),
        "longer context": (cost.context_hours, "GPU-hours"),
        "all GPU-hours": (cost.total_hours, "GPU-hours"),
        "price": (cost.dollars, "dollars"),
        "step": (plan.step_seconds, "s"),
        "tokens a second": (plan.tokens_per_second, "tokens/s"),
        "MFU, causal": (plan.mfu(causal=True), ""),
    }
    draw_bars(
        [
            Group(name=name, values=(seen[name][0] / 1e3, PUBLISHED_RUN[name].value / 1e3))
            for name in ("pre-training", "longer context", "all GPU-hours")
        ],
        labels=("planned", "report, Table 1"),
        title="DeepSeek-V3 on 2,048 H800",
        y_label="thousand GPU-hours",
        file=ask.folder / "cost.png",
    )
    return Outcome(
        findings=tuple(
            _finding(name, value=value, unit=unit, published=PUBLISHED_RUN[name])
            for name, (value, unit) in seen.items()
        ),
        pictures=(
            Picture(file="cost.png", caption="GPU-hours by phase. The 5,000 of post-training are taken as given."),
        ),
        settings={"gpu": plan.gpu.name, "gpus": plan.world, "fitted": {"imbalance": plan.imbalance}},
        data={name: value for name, (value, _) in seen.items()},
        remark="One number is fitted, to the time of woven chunks and to nothing else: how unevenly experts are loaded "
        "(docs/planning.md has the reason for every line). Post-training is not planned but taken from the report.",
    )


def _finding(name: str, *, value: float, unit: str, published: Published) -> Number:
    return Number(
        claim=name,
        report=f"{shown(published.value)} ({published.where})",
        expected=published.value,
        value=value,
        tolerance=TOLERANCE,
        unit=unit,
    )
