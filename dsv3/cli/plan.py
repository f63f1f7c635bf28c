"""`dsv3 plan`: what a run would take on a cluster, before it is paid for.

`dsv3 plan RECIPE` plans a training run; other plans are verbs below it.
"""

import json
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from math import lcm
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup
from typer.main import get_group

from dsv3.cli.inspect import find_subject
from dsv3.cli.plan_text import describe_plan, describe_search, json_of_plan, json_of_search
from dsv3.config import PretrainConfig
from dsv3.errors import ConfigError
from dsv3.plan.cost import DOLLARS_PER_HOUR
from dsv3.plan.hardware import CUSTOM, GPUS, find_hardware
from dsv3.plan.layout_search import search_layouts, wire_of
from dsv3.plan.step_time import LARGEST_SIMULATED, usable_micro_batches
from dsv3.plan.training import FITTED_IMBALANCE, TrainingPlan, plan_training
from dsv3.reproduce.recipe_cost import recipe_cost

OF_A_RUN = "run"
"""Name of the verb that plans a training run; it is left out on the command line."""
BELOW = ("plan_serve", "plan_experts")
"""Files of this folder, plan_VERB, with a function `register_plan_VERB(plan_app)` that adds VERB below `dsv3 plan`."""


class PlanGroup(TyperGroup):
    """A verb with others below it that takes a recipe where none of these is named."""

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        """Return the context of the verb below that `args` begin with, and of the plan of a run otherwise.

        Verbs below are loaded when one is asked for, or help, which lists them.
        """
        args = args or ["--help"]
        is_below = f"plan_{args[0]}" in BELOW
        of_a_run = self.commands[OF_A_RUN]
        if is_below or not {"-h", "--help"}.isdisjoint(args):
            below = _verbs_below()
            self.commands.update(below)
            others = [f"  dsv3 plan {name}  {one.get_short_help_str()}" for name, one in below.items()]
            of_a_run.epilog = "\n\n".join(["Other plans:", *others]) if others else None
        if is_below:
            return super().make_context(info_name, args, parent=parent, **extra)
        return of_a_run.make_context(info_name, args, parent=parent, **extra)


def _verbs_below() -> dict[str, Any]:
    """Return the verbs of `BELOW` by name, as click has them."""
    app = typer.Typer(rich_markup_mode=None)
    for name in BELOW:
        if find_spec(f"dsv3.cli.{name}") is not None:
            getattr(import_module(f"dsv3.cli.{name}"), f"register_{name}")(app)
    return dict(get_group(app).commands) if app.registered_commands else {}


def register(app: typer.Typer) -> None:
    """Add the verb."""
    plan_app = typer.Typer(
        cls=PlanGroup, help="Plan a training run: memory, time, cost.", rich_markup_mode=None, no_args_is_help=True
    )
    plan_app.command(OF_A_RUN, hidden=True)(plan)
    app.add_typer(plan_app, name="plan")


def plan(
    what: Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe, a run folder, or the config.json of a run.")],
    gpus: Annotated[
        int | None, typer.Option(min=1, help="GPUs of the cluster; as few as the layout takes when left out.")
    ] = None,
    gpu: Annotated[str, typer.Option(metavar="NAME", help=f"{', '.join(GPUS)} or {CUSTOM}.")] = "h800",
    hardware: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=VALUE", help="Change a number of the GPU, as network_gb_s=25; may be repeated."),
    ] = None,
    pp: Annotated[int | None, typer.Option(min=1, help="Ranks of a pipeline (parallel.pipeline).")] = None,
    ep: Annotated[int | None, typer.Option(min=1, help="Ranks that share the experts (parallel.expert).")] = None,
    dp: Annotated[int | None, typer.Option(min=1, help="Pipelines; with --pp it gives the number of GPUs.")] = None,
    cp: Annotated[int | None, typer.Option(min=1, help="Ranks that share each row (parallel.context).")] = None,
    schedule: Annotated[
        str | None, typer.Option(metavar="NAME", help="Of the pipeline (parallel.schedule); dsv3 schedule lists them.")
    ] = None,
    fit: Annotated[bool, typer.Option("--fit", help="Look for the best layout, and say why others lose.")] = False,
    imbalance: Annotated[
        float, typer.Option(min=0, help="Tokens of the busiest experts' rank, as a share above the mean.")
    ] = FITTED_IMBALANCE,
    dollars_per_hour: Annotated[float, typer.Option(min=0, help="Price of a GPU-hour.")] = DOLLARS_PER_HOUR,
    post_hours: Annotated[
        float | None, typer.Option(min=0, help="GPU-hours of post-training; the report's 5,000 for v3_671b, else 0.")
    ] = None,
    gantt: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw a step's timeline as a PNG.")] = None,
    memory: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw the memory of all ranks as a PNG.")] = None,
    assignments: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="Change a setting first; may be repeated.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as one JSON object.")] = False,
) -> None:
    """Plan a training run: memory of a rank, traffic, time of a step, GPU-hours and dollars, each with its reasons.

    Every line says where its number comes from: computed, published, an assumption of ours, or fitted to another
    published number. docs/planning.md tells how to read it.
    """
    subject = find_subject(what, assignments=assignments or [])
    if subject.run is None:
        raise ConfigError(f"{what} has a model but no training settings; name a recipe or a run")
    config = _laid_out(subject.run, pp=pp, ep=ep, cp=cp, schedule=schedule)
    device = find_hardware(gpu, changes=_numbers(hardware or []))
    world = _world(config, gpus=gpus, dp=dp)
    search = None
    if fit:
        if {pp, ep, cp, schedule, dp} != {None}:
            raise ConfigError("--fit looks for a layout; leave out --pp, --ep, --dp, --cp and --schedule")
        search = search_layouts(config, gpu=device, world=world, imbalance=imbalance)
        config = search.best.config
    found = plan_training(config, gpu=device, world=world, imbalance=imbalance)
    cost = recipe_cost(found, dollars_per_hour=dollars_per_hour, post_hours=post_hours)
    if gantt is not None:
        _draw_gantt(found, file=gantt)
    if memory is not None:
        _draw_memory(found, file=memory)
    if as_json:
        told = json_of_plan(found, cost=cost) | (json_of_search(search) if search else {})
        typer.echo(json.dumps(told, indent=2))
        return
    if search is not None:
        typer.echo(describe_search(search) + "\n")
    typer.echo(describe_plan(found, cost=cost))


def _laid_out(
    config: PretrainConfig, *, pp: int | None, ep: int | None, cp: int | None, schedule: str | None
) -> PretrainConfig:
    parallel = config.parallel
    expert = parallel.expert if ep is None else ep
    of_same_stages = pp in (None, parallel.pipeline) and schedule in (None, parallel.schedule)
    changed = replace(
        parallel,
        pipeline=parallel.pipeline if pp is None else pp,
        expert=expert,
        context=parallel.context if cp is None else cp,
        schedule=parallel.schedule if schedule is None else schedule,
        stage_layers=parallel.stage_layers if of_same_stages else (),  # those of a recipe are for its own pipeline
        wire=parallel.wire if ep is None else wire_of(config, expert=expert),
    )
    return replace(config, parallel=changed)


def _numbers(assignments: list[str]) -> dict[str, float]:
    found = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        try:
            found[name.strip()] = float(text)
        except ValueError:
            equals = ""
        if not equals:
            raise ConfigError(f"cannot read --hardware '{assignment}'; write it as NAME=NUMBER, as memory_gb=141")
    return found


def _world(config: PretrainConfig, *, gpus: int | None, dp: int | None) -> int:
    parallel = config.parallel
    if dp is not None:
        world = dp * parallel.pipeline
        if gpus not in (None, world):
            raise ConfigError(
                f"{dp} pipelines of {parallel.pipeline} are {world} GPUs, not {gpus}; leave out --dp or --gpus"
            )
        return world
    if gpus is not None:
        return gpus
    return parallel.pipeline * lcm(parallel.expert, parallel.context)


def _draw_gantt(plan: TrainingPlan, *, file: Path) -> None:
    from dsv3.report.gantt import draw_timeline

    number, stages = plan.micro_batches, len(plan.stages.layers)
    if number * stages > LARGEST_SIMULATED:
        number = usable_micro_batches(plan.config, wanted=4 * plan.config.parallel.pipeline)
        typer.echo(f"{file} has the first {number} of {plan.micro_batches} micro-batches.", err=True)
    draw_timeline(plan.clock.timeline(micro_batches=number, data=plan.data), file=file)


def _draw_memory(plan: TrainingPlan, *, file: Path) -> None:
    from dsv3.report.memory import draw_memory

    draw_memory(plan, file=file)
