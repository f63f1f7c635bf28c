"""Idle time and memory of pipeline schedules beside the formulas of the report's Table 2."""

from dsv3.plan.pipeline import Schedule
from dsv3.plan.schedules import SCHEDULES
from dsv3.plan.simulate import ChunkCosts, Timeline, simulate
from dsv3.report.bars import Group, draw_bars
from dsv3.reproduce.experiment import Ask, Outcome, Picture
from dsv3.reproduce.finding import Finding, Number, Order

RANKS, MICRO_BATCHES = 16, 120
"""Of the published run: 2,048 GPUs in pipelines of 16, and 15,360 rows of a step over 128 of them."""
COSTS = ChunkCosts(forward=1.0, backward=2.0, weight=1.0, woven=2.4)
"""F, B, W and F&B. Ours: Table 2 names no times. Its formula of DualPipe holds to the letter where F takes as long
as W; a woven pair takes less than its two parts, which is what weaving is for."""
FORMULAS = {
    "1f1b": ("(PP-1)(F+B)", (RANKS - 1) * (COSTS.forward + COSTS.backward)),
    "zb1p": ("(PP-1)(F+B-2W)", (RANKS - 1) * (COSTS.forward + COSTS.backward - 2 * COSTS.weight)),
    "dualpipe": ("(PP/2-1)(F&B+B-3W)", (RANKS // 2 - 1) * (2.4 + COSTS.backward - 3 * COSTS.weight)),
}
"""The bubble, as Table 2 has it and in units of F."""
ACTIVATIONS = {"1f1b": ("PP", RANKS), "zb1p": ("PP", RANKS), "dualpipe": ("PP+1", RANKS + 1)}
PARAMETERS = {"1f1b": 1, "zb1p": 1, "dualpipe": 2}


def run(ask: Ask) -> Outcome:
    """Run the schedules on paper."""
    timelines = {
        name: simulate(SCHEDULES[name](num_ranks=RANKS, num_micro_batches=MICRO_BATCHES), costs=COSTS)
        for name in FORMULAS
    }
    draw_bars(
        [Group(name=name, values=(timelines[name].bubble, FORMULAS[name][1])) for name in FORMULAS],
        labels=("run on paper", "formula of Table 2"),
        title=f"Idle time of a step: {RANKS} ranks, {MICRO_BATCHES} micro-batches",
        y_label="units of F",
        file=ask.folder / "bubbles.png",
    )
    return Outcome(
        findings=tuple(finding for name in FORMULAS for finding in _findings(name, timelines[name]))
        + tuple(
            Order(
                claim=f"idle time: {less} below {more}",
                report=f"{FORMULAS[less][0]} and {FORMULAS[more][0]}",
                lower=(timelines[less].bubble,),
                higher=(timelines[more].bubble,),
            )
            for less, more in (("dualpipe", "zb1p"), ("zb1p", "1f1b"))
        ),
        pictures=(Picture(file="bubbles.png", caption="Idle time of the rank with least work, in units of F."),),
        settings={
            "ranks": RANKS,
            "micro_batches": MICRO_BATCHES,
            "times": {"F": COSTS.forward, "B": COSTS.backward, "W": COSTS.weight, "F&B": COSTS.woven},
        },
        data={name: {"bubble": one.bubble, "time": one.duration} for name, one in timelines.items()},
    )


def _findings(name: str, timeline: Timeline) -> tuple[Finding, ...]:
    formula, bubble = FORMULAS[name]
    symbol, held = ACTIVATIONS[name]
    schedule = timeline.schedule
    return (
        Number(claim=f"bubble of {name}", report=formula, expected=bubble, value=timeline.bubble, unit="F"),
        Number(
            claim=f"activations that a rank of {name} holds at most",
            report=symbol,
            expected=held,
            value=max(timeline.peak_activations) * schedule.num_ranks / schedule.num_stages,
            unit="chunks",
        ),
        Number(
            claim=f"copies of each weight under {name}",
            report=f"{PARAMETERS[name]}x",
            expected=PARAMETERS[name],
            value=copies_of_weights(schedule),
        ),
    )


def copies_of_weights(schedule: Schedule) -> float:
    """Return how often each stage's weights are held, over all ranks."""
    return sum(len(schedule.stages_of(rank)) for rank in range(schedule.num_ranks)) / schedule.num_stages
