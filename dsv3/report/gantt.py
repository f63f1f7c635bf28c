"""A pipeline's timeline as a picture: a row for each rank, a box for each chunk, as the report's Figure 5."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.patches import Patch, Rectangle

from dsv3.plan.pipeline import Action, Kind
from dsv3.plan.simulate import Span, Timeline
from dsv3.report.picture import picture

COLOURS = {
    Kind.FORWARD: ("#f4b183", "#fbe0cc"),
    Kind.BACKWARD: ("#6fae5f", "#bcdcb2"),
    Kind.INPUT: ("#6c9bd2", "#bcd3ee"),
    Kind.WEIGHT: ("#9c9c9c", "#d0d0d0"),
}
"""Of one direction or stage, and of the other."""
NAMES = {
    Kind.FORWARD: "forward",
    Kind.BACKWARD: "backward",
    Kind.INPUT: "backward for inputs",
    Kind.WEIGHT: "backward for weights",
}
LARGEST_LABELLED = 1200
"""Chunks of all ranks, beyond which their numbers could not be read."""


def draw_timeline(timeline: Timeline, *, file: Path, dpi: int = 120) -> None:
    """Write a PNG. A box has the number of its micro-batch; of a woven pair the forward chunk is drawn above.

    Raises:
        ConfigError: the file cannot be written.
    """
    schedule = timeline.schedule
    width = min(40.0, max(8.0, 0.16 * timeline.duration / _shortest(timeline)))
    with picture(file, width=width, height=0.9 + 0.34 * schedule.num_ranks, dpi=dpi) as figure:
        axes = figure.add_subplot()
        is_labelled = sum(len(step) for steps in schedule.steps for step in steps) <= LARGEST_LABELLED
        for rank, spans in enumerate(timeline.spans):
            for span in spans:
                for place, action in enumerate(span.step):
                    _draw_box(axes, span, action=action, rank=rank, place=place, timeline=timeline)
                    if is_labelled:
                        height = 1 / len(span.step)
                        axes.text(
                            (span.start + span.end) / 2,
                            rank + (place + 0.5) * height,
                            str(action.micro_batch),
                            ha="center",
                            va="center",
                            fontsize=6 if len(span.step) == 1 else 4.5,
                        )
        axes.set_xlim(0, timeline.duration)
        axes.set_ylim(schedule.num_ranks, 0)
        axes.set_yticks([rank + 0.5 for rank in range(schedule.num_ranks)])
        axes.set_yticklabels([f"rank {rank}" for rank in range(schedule.num_ranks)])
        axes.tick_params(left=False)
        axes.set_xlabel("time")
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
        used = [kind for kind in Kind if any(a.kind is kind for steps in schedule.steps for s in steps for a in s)]
        axes.legend(
            handles=[Patch(facecolor=COLOURS[kind][0], label=NAMES[kind]) for kind in used],
            loc="lower left",
            bbox_to_anchor=(0, 1.0),
            ncols=len(used),
            frameon=False,
        )
        axes.set_title(
            f"{schedule.name}: {schedule.num_ranks} ranks, {schedule.num_micro_batches} micro-batches, "
            f"{timeline.bubble_share:.1%} idle",
            loc="right",
            fontsize=9,
        )


def _draw_box(axes: Axes, span: Span, *, action: Action, rank: int, place: int, timeline: Timeline) -> None:
    height = 1 / len(span.step)
    other_way = timeline.schedule.direction(action.micro_batch) or action.stage >= timeline.schedule.num_ranks
    axes.add_patch(
        Rectangle(
            (span.start, rank + place * height + 0.03),
            span.end - span.start,
            height - 0.06,
            facecolor=COLOURS[action.kind][bool(other_way)],
            edgecolor="white",
            linewidth=0.5,
        )
    )


def _shortest(timeline: Timeline) -> float:
    times = [span.end - span.start for spans in timeline.spans for span in spans if span.end > span.start]
    return min(times, default=1.0)
