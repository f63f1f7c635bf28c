"""The picture of a day of serving: nodes, first tokens, speed."""

from pathlib import Path

from matplotlib.ticker import ScalarFormatter

from dsv3.plan.serving_day import Day
from dsv3.report.picture import picture

PLACES = ("50%", "90%", "99%")


def draw_day(day: Day, *, file: Path) -> None:
    """Draw nodes hour by hour, how busy they are, what users wait for, and how fast they get their tokens.

    Raises:
        ConfigError: the file cannot be written.
    """
    hours = [hour.hour for hour in day.hours]
    with picture(file, width=8, height=5) as figure:
        (nodes, busy), (first, speed) = figure.subplots(2, 2, sharex=True)
        prefill, decode = [hour.prefill_nodes for hour in day.hours], [hour.decode_nodes for hour in day.hours]
        nodes.bar(hours, decode, width=1.0, label="decode", color="#4c72b0")
        nodes.bar(hours, prefill, bottom=decode, width=1.0, label="prefill", color="#8fb3e0")
        nodes.axhline(day.mean_nodes, color="black", linewidth=0.8, linestyle="--", label=f"mean {day.mean_nodes:.0f}")
        nodes.set_ylabel("nodes")
        busy.plot(hours, [100 * hour.prefill_busy for hour in day.hours], label="prefill: GPUs' time")
        taken = [100 * hour.batch / hour.most_requests for hour in day.hours]
        busy.plot(hours, taken, label="decode: places in a step")
        busy.set_ylabel("percent in use")
        busy.set_ylim(0, 105)
        for place, name in enumerate(PLACES):
            first.plot(hours, [hour.first_token[place] for hour in day.hours], label=f"{name} wait no longer")
            speed.plot(hours, [hour.tokens_per_second[place] for hour in day.hours], label=f"{name} get at least")
        first.set_ylabel("seconds to the first token")
        first.set_yscale("log")
        for axis in (first.yaxis.set_major_formatter, first.yaxis.set_minor_formatter):
            axis(ScalarFormatter())
        speed.set_ylabel("tokens a second of a user")
        speed.set_ylim(bottom=0)
        for axes in (first, speed):
            axes.set_xlabel("hour")
        for axes in (nodes, busy, first, speed):
            axes.legend(frameon=False)
            axes.spines[["top", "right"]].set_visible(False)
