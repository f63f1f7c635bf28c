"""DualPipe's timeline as in the report's Figure 5, and its counts beside those of the published code."""

from dsv3.plan.pipeline import Kind, Schedule
from dsv3.plan.schedules import dualpipe
from dsv3.plan.simulate import ChunkCosts, simulate
from dsv3.report.bars import DPI
from dsv3.report.gantt import draw_timeline
from dsv3.reproduce.experiment import Ask, Outcome, Picture
from dsv3.reproduce.finding import Number

FIGURE = (8, 20)
"""Ranks and micro-batches of Figure 5."""
PUBLISHED_RUN = (16, 120)
PUBLISHED_WOVEN = {0: 97, 7: 103}
"""Woven pairs of the first rank and of a middle one, as the published code has them for 16 ranks and 120
micro-batches."""


def run(ask: Ask) -> Outcome:
    """Draw the schedule and count its pairs."""
    ranks, micro_batches = FIGURE
    timeline = simulate(dualpipe(num_ranks=ranks, num_micro_batches=micro_batches), costs=ChunkCosts())
    draw_timeline(timeline, file=ask.folder / "schedule.png", dpi=DPI)
    large = dualpipe(num_ranks=PUBLISHED_RUN[0], num_micro_batches=PUBLISHED_RUN[1])
    findings = [
        Number(
            claim=f"woven pairs of rank {rank} of {ranks}, {micro_batches} micro-batches",
            report="the eight steps of the published code",
            expected=woven_by_the_published_code(rank, ranks=ranks, micro_batches=micro_batches),
            value=woven_pairs(timeline.schedule, rank=rank),
        )
        for rank in range(ranks // 2)
    ]
    findings += [
        Number(
            claim=f"woven pairs of rank {rank} of {PUBLISHED_RUN[0]}, {PUBLISHED_RUN[1]} micro-batches",
            report=f"{pairs}, counted in the published code",
            expected=pairs,
            value=woven_pairs(large, rank=rank),
        )
        for rank, pairs in PUBLISHED_WOVEN.items()
    ]
    findings += [
        Number(
            claim="activations that a rank holds at most",
            report="PP+1 (Table 2)",
            expected=ranks + 1,
            value=max(timeline.peak_activations),
            unit="chunks",
        ),
        Number(
            claim="chunks that go forward through all ranks together",
            report="each micro-batch through each stage once",
            expected=ranks * micro_batches,
            value=sum(
                action.kind is Kind.FORWARD for steps in timeline.schedule.steps for step in steps for action in step
            ),
        ),
    ]
    caption = (
        f"DualPipe, {ranks} ranks, {micro_batches} micro-batches, half of them from each end; F = W, B = 2F, F&B = 3F. "
        "The numbers are micro-batches."
    )
    return Outcome(
        findings=tuple(findings),
        pictures=(Picture(file="schedule.png", caption=caption),),
        settings={"ranks": ranks, "micro_batches": micro_batches},
        data={"idle_share": timeline.bubble_share, "peak_activations": list(timeline.peak_activations)},
    )


def woven_pairs(schedule: Schedule, *, rank: int) -> int:
    """Return the steps of a rank in which a forward and a backward chunk are woven into each other."""
    return sum(len(step) == 2 for step in schedule.steps[rank])


def woven_by_the_published_code(rank: int, *, ranks: int, micro_batches: int) -> int:
    """Return the pairs of steps 4 and 5 of the published code's eight; on middle ranks the first is not woven.

    Source: deepseek-ai/DualPipe, `DualPipe.step`.
    """
    near = min(rank, ranks - 1 - rank)
    steady = 2 * (micro_batches // 2 - ranks + near + 1)
    return steady + ranks // 2 - near - 1 - (near == ranks // 2 - 1)
