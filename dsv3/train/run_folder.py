"""The folder of a run: one writer at a time, and one set of settings from its first snapshot on."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dsv3.config import PretrainConfig
from dsv3.config.files import leaves, read_config, to_dict, write_config
from dsv3.errors import ConfigError
from dsv3.runtime.hold import hold_folder
from dsv3.runtime.log import get_logger

FREE_TO_CHANGE = ("recipe", "runtime.threads", "batch.micro_batch_sequences")
"""Settings a resumed run may change: they change the rounding of sums at most. All others decide what is learned."""
FREE_GROUPS = ("snapshot.", "evaluation.", "parallel.")


@contextmanager
def open_run_folder(folder: Path, *, config: PretrainConfig) -> Iterator[None]:
    """Make the folder, hold it against other processes while the block runs, and write `config.json`.

    Raises:
        TrainingError: the folder cannot be written, or another process is training in it.
        ConfigError: a run is there already, with settings that lead elsewhere; names them all.
    """
    with hold_folder(folder, lock=".lock", doing="training"):
        _settle_config(folder, config=config)
        yield


def lend_corpus(corpus: Path, *, folder: Path) -> None:
    """Let a run in `folder`, which is made if need be, read a corpus that lies elsewhere, unless it has one already."""
    folder.mkdir(parents=True, exist_ok=True)
    link = folder / "corpus"
    if not link.exists():
        link.symlink_to(corpus, target_is_directory=True)


def _settle_config(folder: Path, *, config: PretrainConfig) -> None:
    path = folder / "config.json"
    if path.exists():
        changed = _differences(read_config(path), config)
        binding = [name for name in changed if name not in FREE_TO_CHANGE and not name.startswith(FREE_GROUPS)]
        if binding and _has_snapshots(folder):
            listed = "; ".join(
                f"{name} was {_shown(changed[name][0])} and is now {_shown(changed[name][1])}" for name in binding
            )
            raise ConfigError(
                f"the run in {folder} was started with other settings: {listed}. Put them back to go on with it, or "
                "start another run with --run FOLDER"
            )
        if not changed:
            return
        for name, (old, new) in changed.items():
            get_logger(__name__).info("%s is %s from here on, instead of %s", name, _shown(new), _shown(old))
    write_config(config, path=path)


def _differences(old: PretrainConfig, new: PretrainConfig) -> dict[str, tuple[Any, Any]]:
    """Return the settings that differ, by dotted name, with the old value and the new; None where a group is absent."""
    before, after = dict(leaves(old)), dict(leaves(new))
    names = [*before, *(name for name in after if name not in before)]
    return {name: (before.get(name), after.get(name)) for name in names if before.get(name) != after.get(name)}


def _shown(value: Any) -> str:
    """Write a value as config.json has it."""
    return json.dumps(value, default=to_dict)


def _has_snapshots(folder: Path) -> bool:
    return any((folder / "snapshots").glob("step-*"))
