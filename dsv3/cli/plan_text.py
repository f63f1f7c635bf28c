"""A plan as `dsv3 plan` prints it: lines to read, or one JSON object."""

from dataclasses import asdict
from itertools import groupby
from typing import Any

from dsv3.cli.columns import aligned
from dsv3.plan.cost import Cost
from dsv3.plan.counts import count_parameters
from dsv3.plan.layout_search import Candidate, Search, lighter_split
from dsv3.plan.ranks import RankPlan
from dsv3.plan.reason import Line
from dsv3.plan.training import TrainingPlan
from dsv3.plan.training_lines import published_beside, training_lines

LISTED = 10
"""Layouts that a search prints."""
SIZES = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def describe_plan(plan: TrainingPlan, *, cost: Cost) -> str:
    """Return the plan, a line for each number, with the published ones beside it where it is the report's run."""
    parallel, beside = plan.config.parallel, published_beside(plan)
    told = [
        f"{plan.config.recipe or 'run'} on {plan.world:,} {plan.gpu.name}: {plan.data} pipelines of "
        f"{parallel.pipeline}, experts over {parallel.expert}, schedule {parallel.schedule}, {plan.micro_batches} "
        "micro-batches each",
        "",
        "in short",
        *(f"  {name:<14}{told}" for name, told in _in_short(plan, cost=cost)),
    ]
    for section, lines in groupby(training_lines(plan, cost=cost), key=lambda line: line.section):
        rows, reasons, why = [], [], ""
        for line in lines:
            published = beside.get(line.name)
            compared = (
                f"{amount(published.value, unit=line.unit)} ({line.value / published.value - 1:+.1%})"
                if published
                else ""
            )
            rows.append((line.name, amount(line.value, unit=line.unit), compared))
            before, why = why, f"{line.source.value}: {line.why}"
            reasons.append((why if why != before else "as above") + (f" [{published.where}]" if published else ""))
        told += ["", f"{section}" + ("  (beside it: published)" if any(row[2] for row in rows) else "")]
        told += [f"  {row}  {reason}" for row, reason in zip(aligned(rows), reasons, strict=True)]
    return "\n".join([*told, *_advice(plan)])


def _in_short(plan: TrainingPlan, *, cost: Cost) -> list[tuple[str, str]]:
    """Return what is asked first: whether it fits, how fast it is, what it costs."""
    beside = published_beside(plan)

    def published(name: str, value: float, *, unit: str) -> str:
        if name not in beside:
            return ""
        return f" (published: {amount(beside[name].value, unit=unit)}, {value / beside[name].value - 1:+.1%})"

    step, hours, dollars = plan.step_seconds, cost.total_hours, cost.dollars
    needed = amount(plan.bytes_of(plan.fullest), unit="bytes")
    return [
        (
            "memory",
            f"{needed} on the fullest rank, of {amount(plan.gpu.memory_gb * 1e9, unit='bytes')}: "
            + ("fits" if plan.fits else "DOES NOT FIT; see the end"),
        ),
        ("a step", amount(step, unit="seconds") + published("step", step, unit="seconds")),
        (
            "speed",
            f"{amount(plan.tokens_per_second, unit='tokens/s')}, {plan.mfu(causal=True):.1%} of the peak of BF16"
            + published("MFU, causal", plan.mfu(causal=True), unit="share"),
        ),
        ("pre-training", f"{cost.pretrain.seconds / 86_400:,.1f} days"),
        ("GPU-hours", amount(hours, unit="GPU-hours") + published("all GPU-hours", hours, unit="GPU-hours")),
        ("price", amount(dollars, unit="USD") + published("price", dollars, unit="USD")),
    ]


def _advice(plan: TrainingPlan) -> list[str]:
    """Return what would help a plan that does not fit."""
    if plan.fits:
        return []
    full = [place for place in plan.places if plan.bytes_of(place) > plan.gpu.memory_gb * 1e9]
    told = [
        "",
        f"It does not fit: {_ranks(full)} need up to {plan.bytes_of(plan.fullest) / 1e9:.1f} GB, and a GPU has "
        f"{plan.gpu.memory_gb:.1f}.",
    ]
    lighter = lighter_split(plan)
    if lighter is None:
        return [*told, "--fit looks for a layout that does."]
    split = ",".join(map(str, lighter.config.parallel.stage_layers))
    return [
        *told,
        f"--set parallel.stage_layers=[{split}] would: {lighter.bytes_of(lighter.fullest) / 1e9:.1f} GB, and "
        f"{lighter.step_seconds:.2f} s a step. How the report's run splits its layers is not published.",
    ]


def _ranks(places: list[RankPlan]) -> str:
    named = [f"{one.start}-{one.stop - 1}" if len(one) > 1 else str(one.start) for one in (p.ranks for p in places)]
    return f"ranks {', '.join(named[:4])}" + (f" and {len(named) - 4} places more" if len(named) > 4 else "")


def describe_search(search: Search) -> str:
    """Return the fastest layouts and why the others lose."""
    rows = [("layout", "step", "fullest rank", "")]
    rows += [_row(candidate) for candidate in search.running[:LISTED]]
    told = [f"{len(search.running)} layouts run; the fastest:", *aligned([row[:3] for row in rows])]
    told = [told[0], *(f"  {line}  {row[3]}" for line, row in zip(told[1:], rows, strict=True))]
    for problem in ("memory", "divisibility"):
        refused = [candidate for candidate in search.refused if candidate.problem == problem]
        if refused:
            told.append(f"{len(refused)} lose by {problem}; such as {refused[-1].name}: {refused[-1].why}")
    return "\n".join(told)


def _row(candidate: Candidate) -> tuple[str, str, str, str]:
    assert candidate.plan is not None
    needed = candidate.plan.bytes_of(candidate.plan.fullest)
    return (candidate.name, f"{candidate.plan.step_seconds:.3g} s", f"{needed / 1e9:.1f} GB", candidate.why)


def json_of_plan(plan: TrainingPlan, *, cost: Cost) -> dict[str, Any]:
    """Return the plan as plain data; every number of `lines` has its source and reason."""
    lines = training_lines(plan, cost=cost)
    beside = published_beside(plan)
    fullest = _bytes(plan, place=plan.fullest)
    return {
        "recipe": plan.config.recipe,
        "gpu": asdict(plan.gpu),
        "gpus": plan.world,
        "parallel": asdict(plan.config.parallel),
        "parameters": asdict(count_parameters(plan.config.model))
        | {"total": count_parameters(plan.config.model).total, "active": count_parameters(plan.config.model).active},
        "bytes_per_rank": fullest | {"capacity": round(plan.gpu.memory_gb * 1e9), "fits": plan.fits},
        "bytes_of_places": [_bytes(plan, place=place) for place in plan.places],
        "flops_per_token": {line.name.strip(): line.value for line in lines if line.section == "work"},
        "bytes_per_link": [
            {"name": flow.name, "link": flow.link, "bytes": flow.num_bytes, "beside_computing": flow.is_hidden}
            for flow in plan.flows
        ],
        "micro_batches": plan.micro_batches,
        "step_seconds": plan.step_seconds,
        "step_parts": asdict(plan.pipeline) | {"optimizer": plan.optimizer_seconds},
        "tokens_per_second": plan.tokens_per_second,
        "mfu_causal": plan.mfu(causal=True),
        "mfu_not_causal": plan.mfu(causal=False),
        "bubble_fraction": plan.bubble_fraction,
        "gpu_hours": {
            "pretrain": cost.pretrain_hours,
            "context": cost.context_hours,
            "post": cost.post_hours,
            "total": cost.total_hours,
        },
        "dollars": cost.dollars,
        "lines": [_line(line) | {"published": _published(line, beside=beside)} for line in lines],
        "advice": " ".join(_advice(plan)).strip(),
    }


def json_of_search(search: Search) -> dict[str, Any]:
    """Return what a search has tried."""
    return {
        "layouts": [
            {
                "layout": candidate.name,
                "step_seconds": candidate.plan.step_seconds if candidate.plan and not candidate.problem else None,
                "problem": candidate.problem,
                "why": candidate.why,
            }
            for candidate in (*search.running, *search.refused)
        ]
    }


def _line(line: Line) -> dict[str, Any]:
    return asdict(line) | {"name": line.name.strip(), "source": line.source.value}


def _published(line: Line, *, beside: dict[str, Any]) -> dict[str, Any] | None:
    return asdict(beside[line.name]) if line.name in beside else None


def _bytes(plan: TrainingPlan, *, place: RankPlan) -> dict[str, int]:
    room = plan.buffers
    return {
        "first_rank": place.ranks.start,
        "weights": place.weights,
        "master": place.master,
        "gradients": place.gradients,
        "moments": place.moments,
        "activations": place.activations - place.fp8_cache,
        "fp8_caches": place.fp8_cache,
        "buffers": place.messages + room.total - room.system,
        "system": room.system,
        "total": plan.bytes_of(place),
    }


def amount(value: int | float, *, unit: str) -> str:
    """Return a number with its unit for reading."""
    if unit == "share":
        return f"{value:.1%}"
    if unit == "USD":
        return f"${value:,.0f}" if value >= 100 else f"${value:.2g}"
    if unit == "GPU-hours":
        return f"{value:,.0f} h" if value >= 100 else f"{value:.3g} h"
    if unit == "seconds":
        return _scaled(value, unit="s", sizes=((1.0, ""), (1e-3, "m"), (1e-6, "u")))
    if unit == "" and value < 1000:
        return f"{value:.4g}"
    if unit == "":
        return f"{value:,.0f}"
    short = {"bytes": "B", "bytes/s": "B/s", "tokens/s": "tok/s"}.get(unit, unit)
    return _scaled(value, unit=short, sizes=SIZES)


def _scaled(value: int | float, *, unit: str, sizes: tuple[tuple[float, str], ...]) -> str:
    size, letter = next((one for one in sizes if abs(value) >= one[0]), (1.0, ""))
    if value == 0:
        return f"0 {unit}"
    number = value / size
    return f"{number:.{max(0, 2 if number < 100 else 1)}f} {letter}{unit}"
