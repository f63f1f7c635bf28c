"""From `data_card.json` of a prepared corpus to a page: what came in, what went and why, and what is there."""

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment
from matplotlib.axes import Axes

from dsv3.errors import DataError
from dsv3.report.charts import short_number
from dsv3.report.picture import picture
from dsv3.runtime.atomic import whole_file

CARD, PICTURE, PAGE = "data_card.json", "data_card.png", "data_card.html"
MAX_BARS = 12
BLUE, ORANGE, GREY = "#3257c9", "#d8691a", "#c9ccd2"
STEPS = {
    "read": "read",
    "repair": "after repair",
    "language": "in a language",
    "mask": "after masking",
    "quality": "of good quality",
    "decontaminate": "not in evaluations",
    "copies": "not copies",
}


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One bar of a picture."""

    name: str
    value: int


def write_card(output: Path) -> Path:
    """Write `data_card.html` and its picture beside `data_card.json`, and return the page's path.

    Raises:
        DataError: the folder holds no corpus, or one that was made before there were cards.
    """
    file = output / CARD
    if not file.is_file():
        raise DataError(f"there is no {file}; it is written at the end of dsv3 data prepare, and of dsv3 prepare")
    card = json.loads(file.read_text(encoding="utf-8"))
    draw(card, file=output / PICTURE)
    package = resources.files("dsv3.report")
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["short"] = short_number
    page = environment.from_string((package / "data_card.html").read_text(encoding="utf-8")).render(
        card=card,
        name=output.resolve().name,
        tiles=tiles(card),
        dropped=dropped(card),
        picture=base64.b64encode((output / PICTURE).read_bytes()).decode(),
        style=(package / "style.css").read_text(encoding="utf-8"),
        inputs=card["settings"]["inputs"],
        settings=json.dumps(card["settings"], indent=2),
    )
    with whole_file(output / PAGE) as opened:
        opened.write(page.encode())
    return output / PAGE


def step(card: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Return the account of a step."""
    found: Mapping[str, Any] = next(one for one in card["steps"] if one["name"] == name)
    return found


def tiles(card: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the numbers at the head of the page."""
    groups = card["groups"].values()
    read, copies = step(card, "read"), step(card, "copies")
    contaminated = sum(count for count, _ in step(card, "decontaminate")["dropped"].values())
    return [
        ("documents read", f"{read['documents']:,}"),
        ("of text read", f"{read['bytes'] / 1e6:,.1f} MB"),
        ("documents kept", f"{copies['kept_documents']:,}"),
        ("of text kept", f"{copies['kept_bytes'] / 1e6:,.1f} MB"),
        ("tokens", short_number(sum(group["tokens"] for group in groups))),
        ("copies dropped", f"{copies['documents'] - copies['kept_documents']:,}"),
        ("had an evaluation's item", f"{contaminated:,}"),
        ("masked", f"{sum(step(card, 'mask')['noted'].values()):,}"),
    ]


def dropped(card: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return each reason to drop a document, most frequent first, with samples."""
    reasons = [
        {
            "step": one["name"],
            "reason": reason,
            "documents": documents,
            "bytes": size,
            "samples": [{"name": name, "text": text} for _, name, text in one["samples"].get(reason, [])],
        }
        for one in card["steps"]
        for reason, (documents, size) in one["dropped"].items()
    ]
    return sorted(reasons, key=lambda reason: -reason["documents"])


def draw(card: Mapping[str, Any], *, file: Path) -> None:
    """Draw the six pictures of the card."""
    with picture(file, width=11.0, height=9.5) as figure:
        axes = figure.subplots(3, 2)
        funnel = [
            Bar(name=STEPS[one["name"]], value=one["kept_bytes"])
            for one in card["steps"]
            if one["name"] in STEPS and one["name"] not in card.get("not_applied", ())
        ]
        bars(axes[0][0], funnel, title="What is left after each step, bytes", colour=BLUE)
        domains = grouped(card["groups"])
        bars(axes[0][1], domains, title="Tokens by domain", colour=BLUE)
        languages = most(card["before_copies"]["languages"])
        bars(axes[1][0], languages, title="Languages, bytes before copies are dropped", colour=BLUE)
        lengths(axes[1][1], card["before_copies"]["lengths"])
        copies(axes[2][0], card["copies"]["sizes"])
        found = most({name: count for name, (count, _) in step(card, "decontaminate")["dropped"].items()})
        bars(axes[2][1], found, title="Documents that had an evaluation's item, by evaluation", colour=ORANGE)


def grouped(groups: Mapping[str, Mapping[str, Any]]) -> list[Bar]:
    """Return the tokens of each domain."""
    totals: dict[str, int] = {}
    for name, group in groups.items():
        domain = name.rsplit("/", 1)[1]
        totals[domain] = totals.get(domain, 0) + group["tokens"]
    return most(totals)


def most(counts: Mapping[str, int]) -> list[Bar]:
    """Return the largest counts as bars, and the others as one."""
    ordered = sorted(counts.items(), key=lambda one: -one[1])
    shown = [Bar(name=name, value=value) for name, value in ordered[:MAX_BARS]]
    if len(ordered) > MAX_BARS:
        others = ordered[MAX_BARS:]
        shown.append(Bar(name=f"{len(others)} others", value=sum(value for _, value in others)))
    return shown


def bars(axes: Axes, shown: Sequence[Bar], *, title: str, colour: str) -> None:
    """Draw bars from left to right, each with its number."""
    axes.set_title(title, loc="left", fontweight="bold")
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.set_xticks([])
    if not shown:
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.text(0.5, 0.5, "none", ha="center", va="center", transform=axes.transAxes, color="#6b6f76")
        return
    places = range(len(shown))
    axes.barh(places, [bar.value for bar in shown], color=colour, height=0.7)
    axes.set_yticks(places, [bar.name for bar in shown])
    axes.set_ylim(max(len(shown), 7) - 0.5, -0.5)
    largest = max(bar.value for bar in shown) or 1
    axes.set_xlim(0, largest * 1.15)
    for place, bar in zip(places, shown, strict=True):
        axes.text(bar.value + largest * 0.01, place, short_number(bar.value), va="center")


def lengths(axes: Axes, counts: Mapping[str, int]) -> None:
    """Draw how long documents are, by powers of two of bytes."""
    bits = sorted(map(int, counts))
    axes.set_title("Documents by length, bytes", loc="left", fontweight="bold")
    axes.spines[["top", "right"]].set_visible(False)
    every = range(bits[0], bits[-1] + 1) if bits else range(0)
    axes.bar(list(every), [counts.get(str(bit), 0) for bit in every], color=BLUE, width=0.9)
    axes.set_xticks(list(every)[::2], [short_number(2 ** (bit - 1)) for bit in list(every)[::2]])
    axes.yaxis.set_major_formatter(lambda value, _: short_number(value))


def copies(axes: Axes, sizes: Sequence[Sequence[int]]) -> None:
    """Draw how many groups of copies there are of each size."""
    axes.set_title("Groups of copies, by documents in a group", loc="left", fontweight="bold")
    axes.spines[["top", "right"]].set_visible(False)
    counts: dict[int, int] = {}
    for size, groups in sizes:
        counts[size.bit_length()] = counts.get(size.bit_length(), 0) + groups
    if not counts:
        axes.axis("off")
        axes.text(0.5, 0.5, "none", ha="center", va="center", transform=axes.transAxes, color="#6b6f76")
        return
    every = range(2, max(counts) + 1)
    axes.bar(list(every), [counts.get(bit, 0) for bit in every], color=ORANGE, width=0.9)
    labels = [f"{2 ** (bit - 1)}-{2**bit - 1}" for bit in every]
    axes.set_xticks(list(every), labels, rotation=30 if len(labels) > 8 else 0)
    axes.set_yscale("symlog", linthresh=10)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(lambda value, _: short_number(value))
