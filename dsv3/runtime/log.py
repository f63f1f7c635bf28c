"""What the program says while it works: standard logging under the name `dsv3`, silent until a program turns it on."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.logging import RichHandler

ROOT = "dsv3"


def get_logger(name: str) -> logging.Logger:
    """Return the logger of a module; pass `__name__`. A name outside the package is put under it."""
    return logging.getLogger(name if name == ROOT or name.startswith(f"{ROOT}.") else f"{ROOT}.{name}")


@cache
def say_once(message: str, *, level: int = logging.INFO) -> None:
    """Log a message the first time it is given in this process, such as a choice that every module makes again."""
    get_logger(ROOT).log(level, message)


def show_log(*, level: int = logging.INFO) -> None:
    """Print the log to the terminal's error stream, through rich. For programs; a library leaves this to its user."""
    logger = get_logger(ROOT)
    logger.setLevel(level)
    if not any(isinstance(handler, _ThroughRich) for handler in logger.handlers):
        logger.addHandler(_ThroughRich())
        logger.propagate = False


class _ThroughRich(logging.Handler):
    """Loads rich with the first line there is to print: it takes longer than many verbs that print none."""

    @cached_property
    def rich(self) -> "RichHandler":
        """What prints."""
        from rich.console import Console
        from rich.logging import RichHandler

        return RichHandler(console=Console(stderr=True), show_path=False, show_level=False, show_time=False)

    def emit(self, record: logging.LogRecord) -> None:
        """Print a line."""
        self.rich.emit(record)


@contextmanager
def log_through(console: "Console") -> Iterator[None]:
    """Print the log by way of `console` while the block runs: above its live picture instead of through it."""
    handlers = [handler.rich for handler in get_logger(ROOT).handlers if isinstance(handler, _ThroughRich)]
    before = [handler.console for handler in handlers]
    for handler in handlers:
        handler.console = console
    try:
        yield
    finally:
        for handler, its_own in zip(handlers, before, strict=True):
            handler.console = its_own
