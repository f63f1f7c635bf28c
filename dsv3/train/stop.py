"""Ctrl-C and SIGTERM: the first asks for a stop between two steps, the second stops at once."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from dsv3.runtime.log import get_logger

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass
class StopRequest:
    """Whether a stop has been asked for."""

    requested: bool = False


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """While the block runs, let the first signal set `requested`; a second one raises KeyboardInterrupt where it is.

    Outside the main thread nothing can catch signals, and nothing is requested.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def catch(number: int, _frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if request.requested:
            raise KeyboardInterrupt(f"{name} for the second time")
        request.requested = True
        get_logger(__name__).warning("%s: finishing this step, then saving; once more stops at once", name)

    before = {number: signal.signal(number, catch) for number in SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
