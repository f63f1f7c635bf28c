"""Load of devices by redundancy as a picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from dsv3.plan.expert_balance import Balance, Devices, Layers, device_loads, in_order
from dsv3.report.picture import picture

COLOURS = ("#4c72b0", "#dd8452", "#55a868", "#c44e52", "#8172b3", "#937860", "#da8bc3", "#8c8c8c")


def draw_balance(
    found: Sequence[Balance],
    *,
    loads: Mapping[str, Layers],
    known: Mapping[str, Layers],
    devices: Devices,
    redundancy: Sequence[float],
    file: Path,
) -> None:
    """Write a PNG: left what `balances` found, right each device of the layer that is worst in order, met as placed
    for `known`.

    Raises:
        ConfigError: the file cannot be written.
    """
    with picture(file, width=9, height=3.6) as figure:
        over, each = figure.subplots(1, 2)
        places = range(1 + len(redundancy))
        for colour, name in zip(COLOURS * len(loads), loads, strict=False):
            unplaced, *placed = [one for one in found if one.traffic == name]
            own = [unplaced, *placed[: len(redundancy)]]
            over.plot(places, [one.mean for one in own], color=colour, marker="o", label=name)
            together = placed[len(redundancy) :]
            if together:
                over.plot(places[1:], [one.mean for one in together], color=colour, marker="x", linestyle=":")
        over.axhline(1, color="black", linewidth=0.6)
        over.set_xticks(places, ["in order", *(f"placed,\n{share:.1%} copies" for share in redundancy)])
        over.set_ylabel("largest device over the mean")
        over.set_title("mean of layers" + (" (dotted: placed for all)" if len(loads) > 1 else ""), fontsize=8)
        worst = max((one for one in found if one.placed_for is None), key=lambda one: one.worst)
        layer = worst.layers.index(worst.worst)
        load = loads[worst.traffic][layer]
        mean = sum(load) / devices.num_devices
        each.plot(_falling(in_order(load, devices=devices), mean), color="black", label="in order")
        for colour, share in zip(COLOURS * len(redundancy), redundancy, strict=False):
            placed_loads = device_loads(load, placed_for=known[worst.traffic][layer], devices=devices, share=share)
            each.plot(_falling(placed_loads, mean), color=colour, label=f"{share:.1%} copies")
        each.set_ylim(bottom=0)
        each.set_xlabel("device, the busiest first")
        each.set_ylabel("load over the mean")
        each.set_title(f"{worst.traffic}, layer {layer} of those with experts (worst in order)", fontsize=8)
        for axes in (over, each):
            axes.legend(frameon=False)
            axes.spines[["top", "right"]].set_visible(False)


def _falling(loads: Sequence[float], mean: float) -> list[float]:
    return [load / mean for load in sorted(loads, reverse=True)]
