"""dsv3 schedule: pipeline schedules on paper, beside each other."""

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dsv3.cli.columns import aligned
from dsv3.errors import ConfigError
from dsv3.plan.schedules import SCHEDULES
from dsv3.plan.simulate import ChunkCosts, Timeline, simulate

if TYPE_CHECKING:
    from dsv3.plan.pipeline import Schedule

HEADER = ("schedule", "time", "bubble", "idle", "activations", "stages a rank")


def register(app: typer.Typer) -> None:
    """Add the verb to the command line."""
    app.command("schedule")(schedule)


def schedule(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME]...", help=f"{', '.join(SCHEDULES)}; all when left out.")
    ] = None,
    ranks: Annotated[int, typer.Option(min=1, help="Ranks of the pipeline.")] = 16,
    micro_batches: Annotated[int, typer.Option(min=1, help="Micro-batches of a step.")] = 120,
    forward: Annotated[float, typer.Option(min=0, help="Time of a rank's share of the model, forward.")] = 1.0,
    backward: Annotated[float, typer.Option(min=0, help="The same backward, weights' gradients included.")] = 2.0,
    weight: Annotated[float, typer.Option(min=0, help="Of that, the weights' gradients.")] = 1.0,
    woven: Annotated[
        float | None, typer.Option(min=0, help="Forward and backward woven into each other; their sum when left out.")
    ] = None,
    send: Annotated[float, typer.Option(min=0, help="From one rank to the next.")] = 0.0,
    picture: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw one schedule's timeline as a PNG.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Work out how long a step takes under pipeline schedules, how long ranks idle, and how much they hold.

    Times are in any unit, for one micro-batch through 1/RANKS of the model; schedules that cut it into more stages
    have chunks as much shorter. Activations are counted in such shares too. The defaults are the published run's 16
    ranks and 120 micro-batches; dualpipe keeps two stages on each rank and every weight twice, as the report does.
    """
    costs = ChunkCosts(forward=forward, backward=backward, weight=weight, woven=woven, send=send)
    timelines = {}
    refused = {}
    for name in names or SCHEDULES:
        if name not in SCHEDULES:
            raise ConfigError(f"there is no schedule {name!r}; there are {', '.join(SCHEDULES)}")
        try:
            made = SCHEDULES[name](num_ranks=ranks, num_micro_batches=micro_batches)
        except ConfigError as error:
            if names:
                raise
            refused[name] = str(error)
            continue
        timelines[name] = simulate(made, costs=_of_chunks(costs, schedule=made))
    if picture is not None:
        if len(timelines) != 1:
            raise ConfigError("--picture draws one schedule; name one, as in: dsv3 schedule dualpipe --picture FILE")
        from dsv3.report.gantt import draw_timeline

        draw_timeline(next(iter(timelines.values())), file=picture)
    rows = {name: _row(timeline) for name, timeline in timelines.items()}
    if as_json:
        typer.echo(json.dumps({"schedules": rows, "refused": refused}))
        return
    typer.echo(_table(rows))
    for reason in refused.values():
        typer.echo(f"left out: {reason}")


def _of_chunks(costs: ChunkCosts, *, schedule: "Schedule") -> ChunkCosts:
    """Return the times of chunks that are a stage, from those of a rank's share of the model."""
    share = schedule.num_ranks / schedule.num_stages
    return replace(
        costs,
        forward=costs.forward * share,
        backward=costs.backward * share,
        weight=costs.weight * share,
        woven=None if costs.woven is None else costs.woven * share,
    )


def _row(timeline: Timeline) -> dict[str, float]:
    schedule = timeline.schedule
    return {
        "time": timeline.duration,
        "bubble": timeline.bubble,
        "idle_share": timeline.bubble_share,
        "activations": max(timeline.peak_activations) * schedule.num_ranks / schedule.num_stages,
        "stages_a_rank": len(schedule.stages_of(0)),
    }


def _table(rows: dict[str, dict[str, float]]) -> str:
    cells = [HEADER] + [
        (
            name,
            f"{row['time']:,.4g}",
            f"{row['bubble']:,.4g}",
            f"{row['idle_share']:.1%}",
            f"{row['activations']:.4g}",
            f"{row['stages_a_rank']:.0f}",
        )
        for name, row in rows.items()
    ]
    return "\n".join(aligned(cells))
