"""Training in FP8 beside the original precision: the difference of the losses (report 3.3, B.1, Figure 10)."""

from collections.abc import Sequence

from dsv3.report.lines import Curve, draw_lines
from dsv3.reproduce.arms import Arm, settings_of, smoothed, train_arms
from dsv3.reproduce.experiment import Ask, Outcome, Picture
from dsv3.reproduce.finding import Limit

CALM = {
    "optim.learning_rate.peak": "5e-4",
    "optim.learning_rate.cosine_floor": "5e-5",
    "optim.learning_rate.final": "1.7e-5",
}
"""A rate at which two runs that differ in the order of their sums alone stay closer than 0.25% (docs/log.md): with
`tiny`'s own they come 0.6% apart, and no precision could be told from another."""
ORIGINAL = Arm(name="original", label="original precision", settings=CALM)
FP8 = Arm(name="fp8_v3", label="FP8 as published", settings=CALM | {"precision.recipe": "fp8_v3"})
CONTROL = Arm(name="control", label="control: other order of sums", settings=CALM | {"runtime.cpu_kernels": "torch"})
ARMS = (ORIGINAL, FP8, CONTROL)
SMOOTHING = 0.9
"""Of the report's curves (Figure 10)."""
LIMIT = 0.25
"""Percent (report 3.3)."""


def run(ask: Ask) -> Outcome:
    """Train in each precision."""
    runs = train_arms(ask, arms=ARMS)
    differences = {
        arm.name: [
            difference(run.losses, original.losses)
            for run, original in zip(runs[arm.name], runs[ORIGINAL.name], strict=True)
        ]
        for arm in (FP8, CONTROL)
    }
    worst = {name: tuple(max(map(abs, one)) for one in each) for name, each in differences.items()}
    draw_lines(
        [
            Curve(name=arm.label if number == 0 else "", x=range(1, len(values) + 1), y=values)
            for arm in (FP8, CONTROL)
            for number, values in enumerate(differences[arm.name])
        ],
        x_label="step of 2,048 tokens",
        y_label="loss, relative to the original precision's, %",
        title=f"FP8 training, same weights and rows (average {SMOOTHING})",
        levels={"report 3.3: within 0.25%": LIMIT, "": -LIMIT},
        file=ask.folder / "fp8.png",
    )
    return Outcome(
        findings=(
            Limit(
                claim="largest relative difference of the smoothed loss, FP8 from the original precision",
                report="below 0.25% throughout (3.3, Figure 10)",
                bound=LIMIT,
                values=worst[FP8.name],
                unit="%",
            ),
            Limit(
                claim="the same of two runs that differ in the order of sums alone",
                report="no number; a larger one would say nothing about FP8",
                bound=LIMIT,
                values=worst[CONTROL.name],
                unit="%",
            ),
        ),
        pictures=(
            Picture(file="fp8.png", caption="Above zero FP8 is worse. The control says how much means nothing."),
        ),
        settings=settings_of(ARMS),
        data={
            "largest_difference_percent": worst,
            "last_difference_percent": {name: [one[-1] for one in each] for name, each in differences.items()},
        },
        remark="FP8's formats, tiles and sums are emulated on the CPU, bit for bit what a GPU's kernels give; the "
        "original precision is FP32 here, where the report's is BF16.",
    )


def difference(losses: Sequence[float], original: Sequence[float]) -> list[float]:
    """Return how much higher smoothed losses are than the original ones, in percent, step by step."""
    pairs = zip(smoothed(list(losses), weight=SMOOTHING), smoothed(list(original), weight=SMOOTHING), strict=False)
    return [100 * (ours - theirs) / theirs for ours, theirs in pairs]
