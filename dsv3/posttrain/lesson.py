"""What every run of teaching has: a folder, weights to begin with, a log, snapshots and in the end an export.

The folder is that of any run, so that every verb reads it. What is taught stands in a file of its own beside
`config.json`, and decides with the data whether a snapshot may be gone on from.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dsv3.checkpoint.published import load_published, save_published
from dsv3.config import PretrainConfig
from dsv3.config.files import from_dict, read_json, to_dict, write_config
from dsv3.data.tokenizer import Tokenizer
from dsv3.errors import ConfigError
from dsv3.infer.model_folder import ModelFolder, find_model
from dsv3.native import choose_cpu_kernels
from dsv3.parallel.ranks import Alone
from dsv3.runtime.device import set_threads
from dsv3.runtime.log import get_logger
from dsv3.train.metrics import MetricsLog, UnwrittenLog
from dsv3.train.resume import new_state, newest_snapshot, restore_state, take_weights, whole_model, write_state
from dsv3.train.run_folder import open_run_folder
from dsv3.train.step import TrainState


@dataclass(kw_only=True)
class Lesson:
    """An open run of teaching."""

    folder: Path
    config: PretrainConfig
    state: TrainState
    tokenizer: Tokenizer
    log: MetricsLog
    data: str
    """Hash of what is taught, and how."""
    snapshot: Path | None
    saved_step: int

    def save(self) -> None:
        """Write a snapshot, unless the newest is of this step."""
        if self.saved_step == self.state.step:
            return
        self.log.force_to_disk()
        saving = write_state(self.state, folder=self.folder / "snapshots", data=self.data)
        self.snapshot, self.saved_step = saving.finish(), self.state.step

    def export(self) -> Path:
        """Write the taught model in the published format, unless an earlier call has."""
        folder = self.folder / "export"
        if self.state.ranks.rank == 0 and not (folder / "config.json").exists():
            assert self.snapshot is not None
            save_published(
                whole_model(self.state, path=self.snapshot),
                folder=folder,
                tokenizer_folder=tokenizer_folder(self.folder),
                dtype=self.state.model.dtype,
            )
        self.state.ranks.gather(None)  # It is there for all of them.
        return folder


@contextmanager
def open_lesson(
    config: PretrainConfig, *, lesson: Any, name: str, data: str, folder: Path, ranks: Alone
) -> Iterator[Lesson]:
    """Begin a lesson with the weights of `config.start_from`, or take it up at its newest snapshot.

    `lesson` is written to `NAME.json`; `data` is a hash of what it names.

    Raises:
        ConfigError: the run was started with other settings.
        SnapshotError: it was taught something else, or no snapshot can be read.
        CheckpointError: there are no weights to begin with.
    """
    held = open_run_folder(folder, config=config) if ranks.rank == 0 else None
    if held is not None:
        held.__enter__()
    try:
        base = find_model(config.start_from)
        if ranks.rank == 0:
            _settle(lesson, path=folder / f"{name}.json")
            _bring_tokenizer(base, folder=folder)
        ranks.gather(None)
        set_threads(config.runtime.threads)
        choose_cpu_kernels(config.runtime.cpu_kernels)
        state = new_state(config, ranks=ranks)
        digest = hashlib.sha256(f"{json.dumps(_chosen(lesson), sort_keys=True)} {data}".encode()).hexdigest()
        newest = newest_snapshot(folder, ranks=ranks)
        if newest is not None:
            restore_state(state, path=newest, data=digest)
            get_logger(__name__).info("going on after step %d, from %s", state.step, newest)
        else:
            begin_with(state, base=base)
        log = MetricsLog(folder, resumed_step=state.step) if ranks.rank == 0 else UnwrittenLog()
        try:
            yield Lesson(
                folder=folder,
                config=config,
                state=state,
                tokenizer=Tokenizer.from_file(tokenizer_folder(folder)),
                log=log,
                data=digest,
                snapshot=newest,
                saved_step=state.step if newest is not None else -1,
            )
        finally:
            log.close()
    finally:
        if held is not None:
            held.__exit__(None, None, None)


def begin_with(state: TrainState, *, base: ModelFolder) -> None:
    """Give a new state the weights of a run's newest snapshot, or of a model in the published format.

    Raises:
        CheckpointError, SnapshotError: there are none, or they are of another model.
    """
    if base.run is not None and newest_snapshot(base.run, ranks=state.ranks) is not None:
        take_weights(state, folder=base.run)
        return
    if state.ranks.size > 1:
        raise ConfigError(f"{base.weights} is begun with by one rank only; several begin with a run that has snapshots")
    model = load_published(base.weights, dtype=torch.float32, device="cpu")
    weights = model.state_dict()
    state.optimizer.load_weights({name: weights[name] for name in state.optimizer.parameters})
    with torch.no_grad():
        for name, buffer in state.model.named_buffers():
            buffer.copy_(weights[name])


def tokenizer_folder(folder: Path) -> Path:
    """Return where a run keeps its tokenizer."""
    return folder / "corpus" / "tokenizer"


def _chosen(lesson: Any) -> dict[str, Any]:
    """Return the settings that are not as they are by default: so a new one does not make old snapshots strange."""
    defaults = to_dict(type(lesson)())
    return {name: value for name, value in to_dict(lesson).items() if value != defaults[name]}


def _bring_tokenizer(base: ModelFolder, *, folder: Path) -> None:
    if base.tokenizer is None:
        raise ConfigError(f"{base.weights} has no tokenizer.json, and nothing can be taught without one")
    target = tokenizer_folder(folder)
    if (target / "tokenizer.json").exists():
        return
    partial = target.with_name(".tokenizer.partial")
    shutil.rmtree(partial, ignore_errors=True)
    Tokenizer.from_file(base.tokenizer).save(partial)
    partial.rename(target)


def _settle(lesson: Any, *, path: Path) -> None:
    """Write what is taught, or hold it against what was written when the run began."""
    if path.exists():
        before = from_dict(type(lesson), read_json(path))
        now, then = to_dict(lesson), to_dict(before)
        changed = [f"{name} was {then[name]!r} and is now {now[name]!r}" for name in now if now[name] != then[name]]
        if changed and any((path.parent / "snapshots").glob("step-*")):
            raise ConfigError(
                f"the run in {path.parent} was started otherwise: {'; '.join(changed)}. Put that back to go on with "
                "it, or start another with --run FOLDER"
            )
    write_config(lesson, path=path)
