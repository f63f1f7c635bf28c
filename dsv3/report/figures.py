"""Which pictures a run has, and the sentence under each that says what one should see in it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from dsv3.report.charts import (
    NUM_COLOURS,
    Chart,
    Level,
    Line,
    heat_image,
    line_chart,
    short_number,
    smooth,
)
from dsv3.report.record import Entry, RunRecord, number, numbers

MAX_HEATMAPS = 12
"""Layers with a heatmap of their own; of a deeper model these many are shown, evenly spread."""
MAX_LAYER_LINES = 8
"""Layers with a line of their own in one chart."""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A chart with its words."""

    title: str
    look_for: str
    """What one should see, and what would be a bad sign."""
    chart: Chart
    is_half: bool = False
    """Whether two of its kind stand side by side on a wide screen."""


@dataclass(frozen=True, kw_only=True)
class Heatmap:
    """Expert loads of one layer over time."""

    title: str
    image: str
    """Data URI."""
    num_experts: int
    highest: float
    """Largest load seen in the last tenth of the run, in fair shares."""
    lowest: float


def series(entries: list[Entry], key: str) -> tuple[list[float], list[float]]:
    """Return steps and values of one number of the entries; missing values are NaN."""
    return [number(entry.get("step")) for entry in entries], [number(entry.get(key)) for entry in entries]


def has_values(values: list[float]) -> bool:
    """Whether there is anything to draw."""
    return any(math.isfinite(value) for value in values)


def after_first_fall(values: Sequence[float]) -> float:
    """Return the upper end of an axis that leaves out the first twenty-fifth of a falling line.

    The loss of an untrained model would press everything that follows to the floor of the picture.
    """
    finite = [value for value in values[len(values) // 25 :] if math.isfinite(value)]
    return 1.03 * max(finite, default=1.0)


def bits_per_byte_picture(record: RunRecord) -> Picture | None:
    """Held-out bits per byte over training, with the baselines as lines to get below."""
    x, y = series(record.validations, "bits_per_byte")
    if not has_values(y):
        return None
    _, average = series(record.validations, "ema_bits_per_byte")
    lines = [Line(x=x, y=y, label="model")]
    if has_values(average):
        lines.append(Line(x=x, y=average, label="average of its weights (EMA)", colour="series-1"))
    levels = [
        Level(value=number(row.get("bits_per_byte")), label=str(row.get("title", ""))) for row in record.baselines
    ]
    finite = sorted(value for value in [*y, *average] if math.isfinite(value))
    marks = [level.value for level in levels if math.isfinite(level.value)]
    # The first values, of an untrained model, would press everything that follows to the floor.
    top = max([finite[len(finite) * 3 // 4], *marks]) * 1.12 if len(finite) > 3 else max([*finite, *marks]) * 1.05
    bottom = min([*finite, *marks]) * 0.93
    return Picture(
        title="Bits per byte of text never trained on",
        look_for=(
            "The curve should cross the dashed lines one after another and still be falling gently at the end. "
            "Lower is better; one bit per byte is the size of the text compressed eight times. "
            + (
                "An average of the weights lags behind at first and should end a little lower. "
                if has_values(average)
                else ""
            )
            + "A curve that turns upwards means the model is memorising its training text."
        ),
        chart=line_chart(lines, name="bpb", y_label="bits per byte", levels=levels, y_limits=(bottom, top)),
    )


def source_picture(record: RunRecord) -> Picture | None:
    """Held-out bits per byte of each source."""
    by_source = [entry.get("by_source") for entry in record.validations]
    names = sorted({str(name) for part in by_source if isinstance(part, dict) for name in part})
    if len(names) < 2:
        return None
    steps = [number(entry.get("step")) for entry in record.validations]
    sources = record.corpus.sources if record.corpus else ()
    order = {source.name: place for place, source in enumerate(sources)}
    names.sort(key=lambda name: order.get(name, len(order)))
    lines = [
        Line(
            x=steps,
            y=[number(part.get(name)) if isinstance(part, dict) else math.nan for part in by_source],
            label=name,
            colour=f"series-{place % NUM_COLOURS}",
        )
        for place, name in enumerate(names)
    ]
    finite = sorted(value for line in lines for value in line.y if math.isfinite(value))
    top = finite[int(len(finite) * 0.85)] * 1.15 if len(finite) > 3 * len(names) else None
    return Picture(
        title="The same, source by source",
        look_for=(
            "Every line should fall. They end at different heights because texts differ: generated arithmetic is "
            "predictable, verse and names are not, and a Chinese character is three bytes but few tokens."
        ),
        chart=line_chart(lines, name="sources", y_label="bits per byte", y_limits=(None, top)),
    )


def loss_picture(record: RunRecord) -> Picture | None:
    """Training loss, raw and averaged."""
    x, y = series(record.steps, "loss")
    if not has_values(y):
        return None
    average = smooth(y)
    lines = [Line(x=x, y=y, is_faint=True), Line(x=x, y=average, label="next token, running average")]
    return Picture(
        title="Training loss",
        look_for=(
            "A steep fall while the model learns which tokens are frequent, then a long slope. The pale line is each "
            "step by itself: its jitter shrinks as the batch grows. Spikes that heal within a few steps are harmless."
        ),
        chart=line_chart(
            lines, name="loss", y_label="nats per token", y_limits=(None, after_first_fall(average)), is_half=True
        ),
        is_half=True,
    )


def mtp_picture(record: RunRecord) -> Picture | None:
    """Loss of the multi-token-prediction modules beside that of the next token."""
    x = [number(entry.get("step")) for entry in record.steps]
    losses = [numbers(entry.get("mtp_loss")) for entry in record.steps]
    depth = max((len(values) for values in losses), default=0)
    if not depth:
        return None
    _, main = series(record.steps, "loss")
    lines = [Line(x=x, y=smooth(main), label="next token")]
    for k in range(depth):
        y = [values[k] if k < len(values) else math.nan for values in losses]
        lines.append(
            Line(
                x=x,
                y=smooth(y),
                label="MTP module" if depth == 1 else f"MTP module {k + 1}",
                colour=f"series-{(k + 1) % NUM_COLOURS}",
            )
        )
    return Picture(
        title="Multi-token prediction",
        look_for=(
            "A module predicts a token one further on than the main model does at the same place, from the main "
            "model's state there and the token in between. Its line should fall with the other and end near it: a deep "
            "model's a little above, a shallow one's even below, since the module is a layer more and misses nothing."
        ),
        chart=line_chart(
            lines,
            name="mtp",
            y_label="nats per token",
            y_limits=(None, max(after_first_fall(line.y) for line in lines)),
            is_half=True,
        ),
        is_half=True,
    )


def schedule_pictures(record: RunRecord) -> list[Picture]:
    """Learning rate and batch size over the steps."""
    pictures = []
    x, rate = series(record.steps, "learning_rate")
    if has_values(rate):
        chart = line_chart(
            [Line(x=x, y=rate)], name="rate", y_label="learning rate", y_limits=(0.0, None), is_half=True
        )
        pictures.append(
            Picture(
                title="Learning rate",
                look_for=(
                    "Warm-up, a long plateau, a cosine descent, then two short constants: the shape of the report's "
                    "4.2, squeezed into this run."
                ),
                chart=chart,
                is_half=True,
            )
        )
    x, batch = series(record.steps, "batch_sequences")
    if has_values(batch):
        chart = line_chart(
            [Line(x=x, y=batch)], name="batch", y_label="sequences in a step", y_limits=(0.0, None), is_half=True
        )
        pictures.append(
            Picture(
                title="Batch size",
                look_for="It grows in stairs over the first part of the text and then stays.",
                chart=chart,
                is_half=True,
            )
        )
    return pictures


def health_pictures(record: RunRecord) -> list[Picture]:
    """Gradient norm and speed over the steps."""
    pictures = []
    x, norm = series(record.steps, "grad_norm")
    if has_values(norm):
        positive = [value if value > 0 else math.nan for value in norm]
        chart = line_chart(
            [Line(x=x, y=positive, is_faint=True), Line(x=x, y=smooth(positive), label="running average")],
            name="norm",
            y_label="gradient norm before clipping",
            is_logarithmic=has_values(positive),
            is_half=True,
        )
        pictures.append(
            Picture(
                title="Gradient norm",
                look_for=(
                    "High at first, then quiet, with no growing trend. A slow climb over many steps is the usual "
                    "herald of a run that is about to diverge."
                ),
                chart=chart,
                is_half=True,
            )
        )
    x, speed = series(record.steps, "tokens_per_second")
    if has_values(speed):
        chart = line_chart(
            [Line(x=x, y=speed, is_faint=True), Line(x=x, y=smooth(speed), label="running average")],
            name="speed",
            y_label="tokens per second",
            y_limits=(0.0, None),
            is_half=True,
        )
        pictures.append(
            Picture(
                title="Speed",
                look_for="Level, or rising with the batch. Dips are other work on the same machine.",
                chart=chart,
                is_half=True,
            )
        )
    return pictures


def answer_pictures(record: RunRecord) -> list[Picture]:
    """Rewards, distance, entropy and length over the iterations of GRPO."""
    if not record.iterations:
        return []
    x = [number(entry.get("iteration")) for entry in record.iterations]
    names = [name for name in record.iterations[-1].get("scores", {}) if isinstance(name, str)]
    lines = []
    for place, name in enumerate(names):
        colour = f"series-{place % NUM_COLOURS}"
        drawn = [number((entry.get("scores") or {}).get(name)) for entry in record.iterations]
        held_out = [number((entry.get("scores") or {}).get(name)) for entry in record.trials]
        at = [number(entry.get("iteration")) for entry in record.trials]
        lines.append(Line(x=x, y=drawn, is_faint=True, colour=colour))
        lines.append(Line(x=at, y=held_out, label=f"{name}, held out", colour=colour))
    pictures = [
        Picture(
            title="Rewards",
            look_for=(
                "Pale: the mean over answers drawn in training. Strong: held-out problems, answered greedily. Both "
                "should rise together; training alone rising means that problems are learned by heart."
            ),
            chart=line_chart(lines, name="rewards", y_label="mean reward", x_label="iteration"),
        )
    ]
    for key, title, label, look_for in (
        ("kl", "Distance", "KL to the reference", "A slow rise. A jump means that the policy left what it was taught."),
        (
            "entropy",
            "Entropy",
            "nats a token",
            "Falling as answers become certain; near 0 nothing new is tried any more.",
        ),
        ("length", "Length", "tokens an answer", "Sane: neither grown to the limit nor shrunk to nothing."),
        (
            "alike_groups",
            "Groups that teach nothing",
            "share of groups",
            "Groups whose answers are all worth the same.",
        ),
    ):
        values = [number(entry.get(key)) for entry in record.iterations]
        if has_values(values) and any(values):
            lines = [Line(x=x, y=values, is_faint=True), Line(x=x, y=smooth(values), label="running average")]
            chart = line_chart(lines, name=key, y_label=label, x_label="iteration", y_limits=(0.0, None), is_half=True)
            pictures.append(Picture(title=title, look_for=look_for, chart=chart, is_half=True))
    return pictures


def violation_picture(record: RunRecord) -> Picture | None:
    """MaxVio of each layer over the steps."""
    x = [number(entry.get("step")) for entry in record.steps]
    rows = [numbers(entry.get("max_violation")) for entry in record.steps]
    num_layers = max((len(row) for row in rows), default=0)
    if not num_layers:
        return None
    lines = []
    for place, layer in enumerate(spread(num_layers, at_most=MAX_LAYER_LINES)):
        y = [row[layer] if layer < len(row) else math.nan for row in rows]
        name = layer_name(record, layer)
        lines.append(Line(x=x, y=smooth(y), label=name, colour=f"series-{place % NUM_COLOURS}"))
    finite = sorted(value for line in lines for value in line.y if math.isfinite(value))
    top = max(finite[int(len(finite) * 0.97)] * 1.15, 0.5) if finite else None
    return Picture(
        title="Imbalance (MaxVio)",
        look_for=(
            "How far the busiest expert of a step lies above its fair share: 0 is perfect, 1 is twice the share. It "
            "should drop soon after the start and stay low; how low depends on the tokens in a step, since a small "
            "batch cannot be even. A line that stays high is a layer whose router has collapsed onto few experts."
        ),
        chart=line_chart(lines, name="maxvio", y_label="MaxVio, running average", y_limits=(0.0, top)),
    )


def heatmaps(record: RunRecord) -> list[Heatmap]:
    """Expert load over time, one picture a layer."""
    tables = [entry.get("load") for entry in record.loads]
    if not tables or not isinstance(tables[-1], list):
        return []
    shown = []
    for layer in spread(len(tables[-1]), at_most=MAX_HEATMAPS):
        rows = [numbers(table[layer]) for table in tables if isinstance(table, list) and layer < len(table)]
        rows = [row for row in rows if row and len(row) == len(rows[-1]) and sum(row) > 0]
        if not rows:
            continue
        loads = np.array(rows)
        loads = loads / loads.mean(axis=1, keepdims=True)
        late = loads[-max(len(loads) // 10, 1) :].mean(axis=0)
        shown.append(
            Heatmap(
                title=layer_name(record, layer),
                image=heat_image(loads),
                num_experts=loads.shape[1],
                highest=float(late.max()),
                lowest=float(late.min()),
            )
        )
    return shown


def layer_name(record: RunRecord, place: int) -> str:
    """Name the MoE block that is number `place` in metrics: main layers by their number, MTP modules after them."""
    model = record.config.get("model", {})
    first, layers = model.get("first_k_dense_replace", 0), model.get("num_hidden_layers")
    if not isinstance(layers, int) or first + place < layers:
        return f"layer {first + place}"
    modules = model.get("num_nextn_predict_layers", 1)
    return "MTP module" if modules == 1 else f"MTP module {first + place - layers + 1}"


def spread(count: int, *, at_most: int) -> list[int]:
    """Return all of `count` places, or `at_most` of them from the first to the last, evenly spread."""
    if count <= at_most:
        return list(range(count))
    return [round(place * (count - 1) / (at_most - 1)) for place in range(at_most)]


def position_picture(record: RunRecord) -> Picture | None:
    """Perplexity at each distance from the beginning of a text, before and after the context was lengthened."""
    curves = record.extension.get("curves")
    lines = [
        Line(
            x=[(begin + end) / 2 for begin, end in pairwise(numbers(curve.get("edges")))],
            y=numbers(curve.get("perplexity")),
            label=str(curve.get("name", "")),
            colour=f"series-{place % NUM_COLOURS}",
        )
        for place, curve in enumerate(curves if isinstance(curves, list) else [])
        if isinstance(curve, dict)
    ]
    lines = [line for line in lines if has_values(list(line.y)) and len(line.x) == len(line.y)]
    if not lines:
        return None
    trained = short_number(number(record.extension.get("trained")))
    lengths = " and ".join(short_number(length) for length in numbers(record.extension.get("lengths")))
    return Picture(
        title="Perplexity by position in a long text",
        look_for=(
            f"Pre-training has shown the model rows of {trained} tokens, so its curve should rise beyond them. The "
            f"extension has trained on over rows of {lengths} tokens with YaRN; its curves should stay as low as they "
            "were, or fall further, to the end. All have read the same held-out rows."
        ),
        chart=line_chart(
            lines,
            name="positions",
            y_label="perplexity",
            x_label="position, in tokens",
            is_logarithmic=True,
            x_is_logarithmic=True,
        ),
    )
