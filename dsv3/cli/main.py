"""`dsv3`: the entry point, its verbs, and how errors reach the person at the keyboard."""

import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Annotated

import typer

from dsv3 import __version__
from dsv3.errors import Dsv3Error
from dsv3.runtime.log import show_log

VERBS = (
    "quickstart",
    "inspect",
    "schedule",
    "prepare",
    "pretrain",
    "extend",
    "sft",
    "distill",
    "reward",
    "grpo",
    "generate",
    "chat",
    "evaluate",
    "convert",
    "report",
    "serve",
    "reproduce",
    "plan",
    "data",
    "eval",
    "bench",
)
"""One file each in this folder, with a function `register(app)`; the help lists them in this order."""

USER_ERROR = 2
INTERRUPTED = 130

# typer used to depend on click and now carries its own copy, so the class is reached through a name both have.
_UsageError: type[Exception] = next(cls for cls in typer.BadParameter.__mro__ if cls.__name__ == "UsageError")


@dataclass
class Options:
    """What is said before the verb."""

    traceback: bool = False


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and leave the process: 0 when done, 2 for the user to mend, 130 after Ctrl-C.

    An error of the user's is one line on the error stream. A traceback means a bug of ours, or `--traceback`.
    """
    # Read when torch loads OpenMP. Its threads otherwise spin for milliseconds while they wait, which on a busy machine
    # made generation ten times slower; so short a wait costs an idle machine nothing (docs/log.md).
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    options = Options()
    given = list(sys.argv[1:] if arguments is None else arguments)
    sys.exit(_run(build_app(options, verbs=_needed(given)), options=options, arguments=given))


def _needed(arguments: Sequence[str]) -> tuple[str, ...]:
    """Return the verb that is asked for, so that no other one is loaded; all of them where none is."""
    first = next((argument for argument in arguments if not argument.startswith("-")), "")
    return (first,) if first in VERBS else VERBS


def build_app(options: Options, *, verbs: Sequence[str] = VERBS) -> typer.Typer:
    """Make the application with all its verbs, or with some."""
    app = typer.Typer(
        name="dsv3",
        help="DeepSeek-V3, whole: train it, look into it, talk to it.",
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"]},
    )

    def print_version(wanted: bool) -> bool:
        if wanted:
            typer.echo(f"dsv3 {__version__}")
            raise typer.Exit
        return wanted

    @app.callback()
    def before_the_verb(
        version: Annotated[  # noqa: ARG001 - its callback has printed it, before a verb could be missed
            bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print the version and stop.")
        ] = False,
        quiet: Annotated[bool, typer.Option("--quiet", help="Log warnings only.")] = False,
        traceback: Annotated[bool, typer.Option("--traceback", help="Show where an error came from.")] = False,
    ) -> None:
        options.traceback = traceback
        show_log(level=logging.WARNING if quiet else logging.INFO)

    for verb in verbs:
        import_module(f"dsv3.cli.{verb}").register(app)
    return app


def _run(app: typer.Typer, *, options: Options, arguments: Sequence[str]) -> int:
    """Run the verb and return the exit status; without any argument, print the help."""
    try:
        status = app(args=list(arguments) or ["--help"], prog_name="dsv3", standalone_mode=False)
        return status if isinstance(status, int) else 0
    except KeyboardInterrupt:
        return INTERRUPTED
    except typer.Abort as abort:
        return INTERRUPTED if isinstance(abort.__cause__, KeyboardInterrupt) else 1
    except Dsv3Error as error:
        if options.traceback:
            raise
        return _complain(str(error))
    except _UsageError as error:
        return _complain(f"{error.format_message()} ('dsv3 --help' lists what there is)")  # type: ignore[attr-defined]
    except OSError as error:
        # A full disk, a folder one may not write to: the machine's errors, which name the file themselves.
        if options.traceback or error.strerror is None:
            raise
        return _complain(f"{error.strerror}: {error.filename}" if error.filename else error.strerror)


def _complain(message: str) -> int:
    # Breaking lines where a message has them would make "one line" depend on the message.
    sys.stderr.write(f"error: {' '.join(message.split())}\n")
    return USER_ERROR


if __name__ == "__main__":
    main()
