"""A long command as a list of stages, each of which is done once and never again.

What is done stands in `stages.json` of the run folder. After Ctrl-C, a kill or an error, the same command goes on
with the first stage that is not done; that stage itself goes on from what it has left on disk.
"""

import errno
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from dsv3.cli.progress import Progress
from dsv3.errors import ConfigError, TrainingError
from dsv3.runtime.atomic import write_json
from dsv3.runtime.hold import hold_folder

RECORD = "stages.json"


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One part of a long command."""

    name: str
    title: str
    """What it does, for the list on the screen."""
    run: Callable[[], str]
    """Does it, and returns a few words on what came of it. It is called again if it was interrupted."""
    is_done: Callable[[], bool]
    """Whether what it makes is still there; a stage whose result was removed is done again."""


@dataclass
class StageRecord:
    """What `stages.json` holds."""

    settings: dict[str, Any] = field(default_factory=dict)
    """By dotted name."""
    done: dict[str, dict[str, Any]] = field(default_factory=dict)
    """For each finished stage its note and its seconds."""


def run_stages(
    stages: Sequence[Stage],
    *,
    folder: Path,
    settings: dict[str, Any],
    may_change: Callable[[str, set[str]], bool],
    progress: Progress,
) -> None:
    """Run the stages that are not done yet, in order. When one has to run, all those after it run too.

    `may_change` is asked about each setting that differs from the earlier sitting, with the names of the stages that
    are done.

    Raises:
        ConfigError: the folder was begun with other settings, cannot be written to, or is in use by another process.
    """
    with hold_folder(folder, lock=".stages.lock", doing="at work"), interrupt_on_sigterm():
        record = read_record(folder / RECORD)
        check_settings(record, settings=settings, may_change=may_change, folder=folder)
        record.settings = settings
        must_run = False
        for place, stage in enumerate(stages):
            if not must_run and stage.name in record.done and stage.is_done():
                progress.skip(stage.name, note=str(record.done[stage.name].get("note", "")))
                continue
            must_run = True
            for later in stages[place:]:
                record.done.pop(later.name, None)
            write_record(record, path=folder / RECORD)
            record.done[stage.name] = run_stage(stage, progress=progress)
            write_record(record, path=folder / RECORD)


def run_stage(stage: Stage, *, progress: Progress) -> dict[str, Any]:
    """Run one stage and return what is recorded of it.

    Raises:
        TrainingError: the disk is full, or may not be written to; says that the command can be run again.
    """
    started = time.monotonic()
    progress.start(stage.name)
    try:
        note = stage.run()
    except OSError as error:
        progress.stop(stage.name)
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise
        raise TrainingError(
            f"stage '{stage.name}' stopped: {error.strerror}{f' ({error.filename})' if error.filename else ''}. Make "
            "room or make the folder writable, then run the same command again: it goes on with this stage"
        ) from error
    except BaseException:
        progress.stop(stage.name)
        raise
    progress.finish(stage.name, note=note)
    return {"note": note, "seconds": round(time.monotonic() - started, 1)}


def check_settings(
    record: StageRecord, *, settings: dict[str, Any], may_change: Callable[[str, set[str]], bool], folder: Path
) -> None:
    """Raise ConfigError when something done was done with other settings, naming each of them."""
    if not record.done:
        return
    names = [*record.settings, *(name for name in settings if name not in record.settings)]
    changed = [
        f"{name} was {json.dumps(record.settings.get(name))} and is now {json.dumps(settings.get(name))}"
        for name in names
        if record.settings.get(name) != settings.get(name) and not may_change(name, set(record.done))
    ]
    if changed:
        raise ConfigError(
            f"{folder} was begun with other settings: {'; '.join(changed)}. Give the same ones to go on with it, or "
            "start afresh in another folder with --run FOLDER"
        )


def read_record(path: Path) -> StageRecord:
    """Read what is done; a missing file means nothing.

    Raises:
        ConfigError: the file is damaged, which no interruption of ours leaves behind.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return StageRecord(settings=dict(values["settings"]), done=dict(values["done"]))
    except FileNotFoundError:
        return StageRecord()
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is damaged ({error}); remove it to have every stage looked at again") from error


def write_record(record: StageRecord, *, path: Path) -> None:
    """Write what is done, whole or not at all."""
    write_json({"settings": record.settings, "done": record.done}, path=path)


@contextmanager
def interrupt_on_sigterm() -> Iterator[None]:
    """Let SIGTERM end the block as Ctrl-C does, so that the terminal is left in order."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
        raise KeyboardInterrupt(signal.Signals(number).name)

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
