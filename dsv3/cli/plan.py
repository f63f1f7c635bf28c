"""`dsv3 plan`: what a run would take on a cluster, before it is paid for.

`dsv3 plan RECIPE` plans a training run; other plans are verbs below it, which are registered in `register`.
"""

import json
from importlib import import_module
from importlib.util import find_spec
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from dsv3.cli.inspect import find_subject
from dsv3.errors import ConfigError

OF_A_RUN = "run"
"""Name of the verb that plans a training run; it is left out on the command line."""
BELOW = ("plan_serve",)
"""Files of this folder with a function `register_NAME(plan_app)` that adds a verb below `dsv3 plan`."""


class PlanGroup(TyperGroup):
    """A verb with others below it that takes a recipe where none of these is named."""

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        """Return the context of the verb below that `args` begin with, and of the plan of a run otherwise."""
        if args and args[0] in self.commands and args[0] != OF_A_RUN:
            return super().make_context(info_name, args, parent=parent, **extra)
        of_a_run = self.commands[OF_A_RUN]
        others = [f"  dsv3 plan {name}  {one.get_short_help_str()}" for name, one in self.commands.items()]
        of_a_run.epilog = "\n\n".join(["Other plans:", *others[1:]]) if others[1:] else None
        return of_a_run.make_context(info_name, args or ["--help"], parent=parent, **extra)


def register(app: typer.Typer) -> None:
    """Add the verb and those below it."""
    plan_app = typer.Typer(
        cls=PlanGroup, help="Plan a training run: memory, time, cost.", rich_markup_mode=None, no_args_is_help=True
    )
    plan_app.command(OF_A_RUN, hidden=True)(plan)
    for name in BELOW:
        if find_spec(f"dsv3.cli.{name}") is not None:
            getattr(import_module(f"dsv3.cli.{name}"), f"register_{name}")(plan_app)
    app.add_typer(plan_app, name="plan")


def plan(
    what: Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe, a run folder, or the config.json of a run.")],
    assignments: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="Change a setting first; may be repeated.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as one JSON object.")] = False,
) -> None:
    """Plan a training run: memory of a rank, traffic, time of a step, GPU-hours and dollars, each with its reasons."""
    subject = find_subject(what, assignments=assignments or [])
    if subject.run is None:
        raise ConfigError(f"{what} has a model but no training settings; name a recipe or a run")
    typer.echo(json.dumps({"recipe": subject.run.recipe}) if as_json else subject.run.recipe)
