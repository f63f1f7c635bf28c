"""The memory of a planned run as a picture: a bar for each place of the pipeline, and what a GPU has."""

from pathlib import Path

from dsv3.plan.training import TrainingPlan
from dsv3.report.picture import picture

COLOURS = {
    "weights": "#4c72b0",
    "master": "#7f9fd1",
    "gradients": "#dd8452",
    "moments": "#f2bf9a",
    "activations": "#55a868",
    "FP8 caches": "#a4d3ae",
    "buffers and system": "#b0b0b0",
}


def draw_memory(plan: TrainingPlan, *, file: Path) -> None:
    """Write a PNG.

    Raises:
        ConfigError: the file cannot be written.
    """
    places = plan.places
    kinds = {
        "weights": [place.weights for place in places],
        "master": [place.master for place in places],
        "gradients": [place.gradients for place in places],
        "moments": [place.moments for place in places],
        "activations": [place.activations - place.fp8_cache for place in places],
        "FP8 caches": [place.fp8_cache for place in places],
        "buffers and system": [place.messages + plan.buffers.total for place in places],
    }
    with picture(file, width=max(6.0, 1.6 + 0.42 * len(places)), height=3.8) as figure:
        axes = figure.add_subplot()
        across = range(len(places))
        bottom = [0.0] * len(places)
        for name, values in kinds.items():
            heights = [value / 1e9 for value in values]
            axes.bar(across, heights, bottom=bottom, width=0.8, color=COLOURS[name], label=name)
            bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
        capacity = plan.gpu.memory_gb
        axes.axhline(
            capacity, color="#c44e52", linewidth=1.2, linestyle="--", label=f"{plan.gpu.name}: {capacity:.1f} GB"
        )
        axes.set_ylim(0, 1.08 * max(capacity, *bottom))
        axes.set_xticks(list(across))
        axes.set_xlabel("place in the pipeline")
        axes.set_ylabel("GB of a rank, at its fullest")
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, reverse=True)
        axes.set_title(f"{plan.config.recipe or 'run'} on {plan.world:,} {plan.gpu.name}", loc="left", fontsize=9)
