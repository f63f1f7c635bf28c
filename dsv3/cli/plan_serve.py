"""dsv3 plan serve: how many nodes a day's traffic takes, what users wait for, and what it costs."""

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

import typer

from dsv3.cli.columns import aligned
from dsv3.cli.inspect import find_subject
from dsv3.cli.plan_experts import read_loads
from dsv3.cli.plan_text import amount
from dsv3.errors import ConfigError
from dsv3.plan.cost import DOLLARS_PER_HOUR
from dsv3.plan.expert_balance import Layers, expected_imbalance
from dsv3.plan.hardware import CUSTOM, GPUS, find_hardware
from dsv3.plan.serving import GPUS_OF_NODE, Deployment, ServingTimes
from dsv3.plan.serving_day import Day, Goals, Traffic, plan_day
from dsv3.plan.serving_lines import PUBLISHED, serving_lines

UNITS = (4, 9, 18, 40)
"""Nodes of a decoding unit that --fit tries."""
REDUNDANCY = (0, 32, 64)
"""Copies of experts that it tries: none, an eighth and a quarter of V3's 256."""


def register_plan_serve(plan_app: typer.Typer) -> None:
    """Add the verb below `dsv3 plan`."""
    plan_app.command("serve")(serve)


def serve(
    what: Annotated[
        str, typer.Argument(metavar="RECIPE", help="A recipe, a run folder, or a config.json.")
    ] = "v3_671b",
    gpu: Annotated[str, typer.Option(metavar="NAME", help=f"{', '.join(GPUS)} or {CUSTOM}.")] = "h800",
    hardware: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="Change a number of the GPU; may be repeated.")
    ] = None,
    input_tokens: Annotated[float, typer.Option(min=1, help="A day, cache hits included.")] = 608e9,
    output_tokens: Annotated[float, typer.Option(min=1, help="A day.")] = 168e9,
    hits: Annotated[float, typer.Option(min=0, max=0.99, help="Share of the input that is found in a cache.")] = 0.563,
    cached_tokens: Annotated[float, typer.Option(min=1, help="Mean length of the cache when a token is drawn.")] = 4989,
    spread: Annotated[float, typer.Option(min=0, max=3, help="Of the logarithm of lengths.")] = 1.0,
    peak: Annotated[float, typer.Option(min=1, max=2, help="Load of the busiest hour beside the mean.")] = 1.226,
    speed: Annotated[float, typer.Option(min=0.1, help="Tokens a second that each user is to get at least.")] = 20.0,
    reserve: Annotated[float, typer.Option(min=0, max=0.9, help="Share of the capacity kept free.")] = 0.05,
    prefill_unit: Annotated[int, typer.Option(min=1, help="Nodes that share experts where prompts are read.")] = 4,
    decode_unit: Annotated[int, typer.Option(min=1, help="Nodes that share experts where answers are drawn.")] = 18,
    redundant: Annotated[int, typer.Option(min=0, help="Copies of experts more than there are experts.")] = 32,
    imbalance: Annotated[
        float, typer.Option(min=0, help="Tokens of the busiest GPU's experts, as a share above the mean.")
    ] = 0.0,
    loads: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Compute the imbalance from loads of experts (dsv3 eval domains --json) and the copies.",
        ),
    ] = None,
    drafts_accepted: Annotated[float, typer.Option(min=0, help="Tokens more of a step, by MTP (0.85 to 0.9).")] = 0.0,
    dollars_per_hour: Annotated[float, typer.Option(min=0, help="Of a GPU.")] = DOLLARS_PER_HOUR,
    fit: Annotated[bool, typer.Option("--fit", help="Try units and copies, and say which needs fewest nodes.")] = False,
    picture: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw the day as a PNG.")] = None,
    seconds: Annotated[float, typer.Option(min=5, help="Of each hour that are simulated.")] = 40.0,
    seed: Annotated[int, typer.Option(help="Of what is drawn.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Plan a deployment: nodes that prefill and nodes that decode, hour by hour.

    Without options it is the day of production that DeepSeek has published, with the published numbers beside it.
    """
    if loads is not None and imbalance:
        raise ConfigError(f"--imbalance {imbalance:g} and --loads {loads} both say how even experts are; give one")
    changes = dict(_assignment(one) for one in hardware or [])
    deployment = Deployment(
        prefill_unit_nodes=prefill_unit,
        decode_unit_nodes=decode_unit,
        redundant_experts=redundant,
        imbalance=imbalance,
        drafts_accepted=drafts_accepted,
    )
    times = ServingTimes(
        model=find_subject(what, assignments=[]).model,
        gpu=find_hardware(gpu, changes=changes),
        deployment=deployment,
    )
    known = None if loads is None else _loads_of(loads, num_experts=times.model.n_routed_experts)
    if known is not None:
        times = replace(times, deployment=balanced(times.deployment, known))
    traffic = Traffic(
        input_tokens_per_day=input_tokens,
        output_tokens_per_day=output_tokens,
        hit_share=hits,
        cached_tokens=cached_tokens,
        spread=spread,
        peak=peak,
    )
    goals = Goals(tokens_per_second=speed, reserve=reserve)
    if fit:
        typer.echo(_search(traffic, times=times, goals=goals, loads=known))
        return
    day = plan_day(traffic, times=times, goals=goals, seconds=seconds, seed=seed)
    if picture is not None:
        from dsv3.report.serving_day import draw_day

        draw_day(day, file=picture)
    if as_json:
        typer.echo(json.dumps(_json(day, dollars_per_hour=dollars_per_hour), indent=2))
        return
    is_production = what == "v3_671b" and gpu == "h800" and not changes and traffic == Traffic()
    typer.echo(_text(day, dollars_per_hour=dollars_per_hour, is_production=is_production))


def _assignment(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    try:
        return name, float(value)
    except ValueError:
        raise ConfigError(f"--hardware {text}: write NAME=VALUE with a number, as network_gb_s=25") from None


def _text(day: Day, *, dollars_per_hour: float, is_production: bool) -> str:
    told = []
    for section, lines in groupby(serving_lines(day, dollars_per_hour=dollars_per_hour), key=lambda line: line.section):
        rows, reasons = [], []
        for line in lines:
            beside = PUBLISHED.get(line.name) if is_production else None
            compared = f"{amount(beside, unit=line.unit)} ({line.value / beside - 1:+.1%})" if beside else ""
            rows.append((line.name, amount(line.value, unit=line.unit), compared))
            reasons.append(f"{line.source.value}: {line.why}")
        told += ["", section + ("  (beside it: published)" if any(row[2] for row in rows) else "")]
        told += [f"  {row}  {reason}" for row, reason in zip(aligned(rows), reasons, strict=True)]
    hours = [("hour", "prefill", "decode", "busy", "batch", "first token 50/99%", "tokens/s 50/99%", "waited")]
    hours += [
        (
            f"{hour.hour:02}",
            f"{hour.prefill_nodes}",
            f"{hour.decode_nodes}",
            f"{hour.prefill_busy:.0%}",
            f"{hour.batch:.0f} of {hour.most_requests}",
            f"{hour.first_token[0]:.2f} / {hour.first_token[2]:.2f} s",
            f"{hour.tokens_per_second[0]:.1f} / {hour.tokens_per_second[2]:.1f}",
            f"{hour.waited:.1%}",
        )
        for hour in day.hours
    ]
    return "\n".join([*told[1:], "", *(f"  {row}" for row in aligned(hours))])


def _loads_of(file: Path, *, num_experts: int) -> dict[str, Layers]:
    loads = read_loads(file)
    found = len(next(iter(loads.values()))[0])
    if found != num_experts:
        raise ConfigError(
            f"{file} has loads of {found} experts a layer, and the model that is planned has {num_experts}; record "
            "them with that model"
        )
    return loads


def balanced(deployment: Deployment, loads: Mapping[str, Layers]) -> Deployment:
    """Return a deployment with the imbalance that these loads and its copies give, where prompts are read and after."""
    found = [
        expected_imbalance(loads, num_devices=nodes * GPUS_OF_NODE, copies=deployment.redundant_experts)
        for nodes in (deployment.prefill_unit_nodes, deployment.decode_unit_nodes)
    ]
    return replace(deployment, prefill_imbalance=found[0], imbalance=found[1])


def _search(traffic: Traffic, *, times: ServingTimes, goals: Goals, loads: Mapping[str, Layers] | None) -> str:
    """Try units of other sizes and other numbers of copies; say what each needs, or why it cannot be."""
    tried: list[tuple[float, tuple[str, ...]]] = []
    refused = []
    for unit in UNITS:
        for copies in REDUNDANCY:
            deployment = replace(times.deployment, decode_unit_nodes=unit, redundant_experts=copies)
            name = f"decode units of {unit} nodes, {copies} copies"
            try:
                if loads is not None:
                    deployment = balanced(deployment, loads)
                day = plan_day(traffic, times=replace(times, deployment=deployment), goals=goals, seconds=5.0)
            except ConfigError as error:
                refused.append(f"  {name}: {error}")
                continue
            needs = (
                f"{deployment.imbalance:.3f}",
                f"{day.mean_nodes:.1f}",
                f"{day.peak_nodes}",
                f"{day.hours[0].most_requests}",
            )
            tried.append((day.mean_nodes, (name, *needs, f"{day.times.weight_bytes / 1e9:.1f} GB")))
    tried.sort(key=lambda one: one[0])
    rows = [
        ("layout", "imbalance", "nodes, mean", "peak", "requests in a step", "weights of a GPU"),
        *(row for _, row in tried),
    ]
    told = [
        f"assumption: an imbalance of {times.deployment.imbalance:g} whatever the copies; --loads FILE computes it"
        if loads is None
        else "computed: the imbalance, from --loads and the copies, with experts placed for all of that traffic",
        "",
    ]
    return "\n".join([*told, *aligned(rows), *(["", "These cannot be:", *refused] if refused else [])])


def _json(day: Day, *, dollars_per_hour: float) -> dict[str, Any]:
    lines = serving_lines(day, dollars_per_hour=dollars_per_hour)
    return {
        "traffic": asdict(day.traffic),
        "deployment": asdict(day.times.deployment),
        "goals": asdict(day.goals),
        "gpu": asdict(day.times.gpu),
        "nodes_mean": day.mean_nodes,
        "nodes_peak": day.peak_nodes,
        "input_tokens_per_second_of_a_prefill_node": day.input_per_prefill_node,
        "output_tokens_per_second_of_a_decode_node": day.output_per_decode_node,
        "tokens_per_second_of_a_user": day.tokens_per_second_of_a_user,
        "dollars": day.dollars(per_gpu_hour=dollars_per_hour),
        "published": PUBLISHED,
        "hours": [asdict(hour) for hour in day.hours],
        "lines": [asdict(line) | {"source": line.source.value} for line in lines],
    }
