"""Verbs that have verbs of their own."""

import typer
from typer.core import TyperGroup


def add_group(app: typer.Typer, *, name: str, told: str, usual: str = "") -> typer.Typer:
    """Add a verb to the command line that has others below it, and return what these are added to.

    What is neither one of these nor a call for help is given to `usual`, the one that may be left out.
    """
    group = typer.Typer(cls=_with_usual(usual) if usual else TyperGroup, help=told, rich_markup_mode=None)
    group.callback()(_nothing)  # Without it, typer would make a group's only command the group itself.
    app.add_typer(group, name=name)
    return group


def _nothing() -> None:
    pass


def _with_usual(usual: str) -> type[TyperGroup]:
    class Group(TyperGroup):
        def parse_args(self, ctx, args):  # type: ignore[no-untyped-def]  # typer's own copy of click has no stable name
            if args and args[0] not in {*self.commands, *self.get_help_option_names(ctx)}:
                args = [usual, *args]
            return super().parse_args(ctx, args)

    return Group
