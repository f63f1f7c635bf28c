"""Verbs that have verbs of their own."""

import typer


def add_group(app: typer.Typer, *, name: str, told: str) -> typer.Typer:
    """Add a verb to the command line that has others below it, and return what these are added to."""
    group = typer.Typer(help=told, rich_markup_mode=None)
    group.callback()(_nothing)  # Without it, typer would make a group's only command the group itself.
    app.add_typer(group, name=name)
    return group


def _nothing() -> None:
    pass
