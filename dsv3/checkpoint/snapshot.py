"""Training snapshots: everything a run needs to go on bit for bit, or nothing.

    snapshots/step-000200/   model.safetensors and other groups of tensors, state.json, manifest.json

A snapshot is made in a folder of another name, forced to the disk, and renamed: at every moment, a kill leaves the
last good one. The manifest holds the size and SHA-256 of every file, so a file that was cut short or changed is found
out and the snapshot before it is used. Why not torch.distributed.checkpoint: docs/decisions/0001.
"""

import errno
import hashlib
import json
import logging
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from dsv3.config import SnapshotConfig
from dsv3.errors import SnapshotError
from dsv3.runtime.atomic import force_to_disk

FORMAT = 1
NAME = re.compile(r"step-(\d{6,})")
DISK_IS_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}

logger = logging.getLogger(__name__)


def save_snapshot(
    folder: Path,
    *,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    policy: SnapshotConfig,
) -> Path:
    """Write the snapshot of `step` below `folder`, then remove those that `policy` no longer keeps.

    Comes back only when the bytes are on the disk. Whatever fails, the snapshots that were there stay, and nothing
    half written is left. Snapshots of later steps, of a run that was thrown back behind them, are not counted.

    Raises:
        SnapshotError: the disk is full, or the folder cannot be written.
    """
    name = f"step-{step:06d}"
    partial = folder / f".{name}.partial"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(folder)
        _require_space(folder, tensors=tensors)
        partial.mkdir()
        _write_files(partial, tensors=tensors, state={"step": step, **state})
        _put_in_place(partial, target=folder / name)
        _retain(folder, newest=step, policy=policy)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise _explain(error, folder=folder, name=name) from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return folder / name


def latest_snapshot(folder: Path) -> Path | None:
    """Return the newest snapshot that is whole, checked byte for byte; None if there is no snapshot at all.

    A damaged one is passed over with a warning that says what is wrong with it.

    Raises:
        SnapshotError: there are snapshots and all of them are damaged. To start over would overwrite the run.
    """
    damaged = []
    for path in reversed(_snapshots(folder)):
        try:
            verify_snapshot(path)
        except SnapshotError as error:
            damaged.append(str(error))
            logger.warning("%s; going back to the snapshot before it", error)
        else:
            return path
    if damaged:
        raise SnapshotError(
            f"no snapshot in {folder} can be used: {'; '.join(damaged)}. Restore one from a copy, or use a new run "
            "folder to start over"
        )
    return None


def read_snapshot(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Return the groups of named tensors and the state of one snapshot, after checking every byte of it.

    Tensors are on the CPU, in the types they were saved in.

    Raises:
        SnapshotError: a file is missing, cut short or changed, or comes from a version with another format.
    """
    names = verify_snapshot(path)
    try:
        tensors = {
            name.removesuffix(".safetensors"): safetensors.torch.load_file(path / name)
            for name in names
            if name.endswith(".safetensors")
        }
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    except (OSError, SafetensorError, ValueError) as error:
        raise SnapshotError(f"cannot read the snapshot {path}: {error}") from error
    return tensors, state


def verify_snapshot(path: Path) -> list[str]:
    """Return the names of the snapshot's files, all of which have the size and SHA-256 of its manifest.

    Raises:
        SnapshotError: they have not; names the first that is wrong, and how.
    """
    manifest = _read_manifest(path)
    for name, expected in manifest.items():
        file = path / name
        if not file.is_file():
            raise SnapshotError(f"the snapshot {path} is damaged: {name} is missing")
        size = file.stat().st_size
        if size != expected["bytes"]:
            raise SnapshotError(
                f"the snapshot {path} is damaged: {name} has {size:,} bytes and was written with {expected['bytes']:,}"
            )
        if _digest(file) != expected["sha256"]:
            raise SnapshotError(f"the snapshot {path} is damaged: the bytes of {name} are not those that were written")
    return list(manifest)


def _read_manifest(path: Path) -> dict[str, dict[str, Any]]:
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        files = {
            name: {"bytes": entry["bytes"], "sha256": entry["sha256"]} for name, entry in manifest["files"].items()
        }
        found = manifest["format"]
    except FileNotFoundError as error:
        raise SnapshotError(f"{path} is not a whole snapshot: it has no manifest.json") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SnapshotError(f"the snapshot {path} is damaged: its manifest.json cannot be read ({error!r})") from error
    if found != FORMAT:
        raise SnapshotError(
            f"the snapshot {path} has format {found}; this version of dsv3 reads format {FORMAT}: use the version "
            "that wrote it"
        )
    if "state.json" not in files:
        raise SnapshotError(f"the snapshot {path} is damaged: its manifest does not name state.json")
    return files


def _write_files(partial: Path, *, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> None:
    """Write all files and force them to the disk, the manifest last."""
    for group, named in tensors.items():
        here = {name: tensor.detach().contiguous() for name, tensor in named.items()}
        safetensors.torch.save_file(here, partial / f"{group}.safetensors")
    _write_text(partial / "state.json", text=json.dumps(state, indent=2))
    names = sorted(path.name for path in partial.iterdir())
    files = {name: {"bytes": (partial / name).stat().st_size, "sha256": _digest(partial / name)} for name in names}
    _write_text(partial / "manifest.json", text=json.dumps({"format": FORMAT, "files": files}, indent=2))
    for path in (*partial.iterdir(), partial):
        force_to_disk(path)


def _put_in_place(partial: Path, *, target: Path) -> None:
    """Give the finished folder its name. One already there is a damaged one that this run has caught up with."""
    if target.exists():
        aside = target.with_name(f".{target.name}.replaced.partial")
        target.rename(aside)
    partial.rename(target)
    force_to_disk(target.parent)
    _remove_leftovers(target.parent)


def _retain(folder: Path, *, newest: int, policy: SnapshotConfig) -> None:
    kept = [path for path in _snapshots(folder) if _step(path) <= newest]
    for path in kept[: -policy.keep_last]:
        if policy.keep_every_steps and _step(path) % policy.keep_every_steps == 0:
            continue
        # First out of the way by a rename: a kill while files are being deleted must not leave half a snapshot.
        doomed = path.with_name(f".{path.name}.removed.partial")
        path.rename(doomed)
        shutil.rmtree(doomed)


def _remove_leftovers(folder: Path) -> None:
    """Delete what a kill has left: folders that were never finished, or were on their way out."""
    for path in folder.glob(".step-*.partial"):
        shutil.rmtree(path)


def _require_space(folder: Path, *, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Refuse before writing what cannot fit; the system's own error, should the disk fill meanwhile, means the same."""
    needed = sum(tensor.nbytes for named in tensors.values() for tensor in named.values())
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(errno.ENOSPC, f"{needed / 1e6:,.0f} MB are needed and {free / 1e6:,.0f} MB are free")


def _explain(error: Exception, *, folder: Path, name: str) -> SnapshotError:
    good = [path.name for path in _snapshots(folder) if path.name != name]
    stays = f"the last good one, {good[-1]}, is untouched" if good else "there was none before it"
    full = isinstance(error, OSError) and error.errno in DISK_IS_FULL
    if full or any(f"os error {code}" in str(error) for code in DISK_IS_FULL):
        detail = error.strerror if isinstance(error, OSError) else error
        return SnapshotError(
            f"the disk is full: snapshot {name} could not be written to {folder} ({detail}); {stays}. Make room and "
            "run the same command again, or keep fewer with --set snapshot.keep_last=1"
        )
    return SnapshotError(
        f"snapshot {name} could not be written to {folder}: {error}; {stays}. Make the folder writable and run the "
        "same command again"
    )


def _snapshots(folder: Path) -> list[Path]:
    """Return the finished snapshots, oldest first."""
    found = [path for path in folder.iterdir() if NAME.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(found, key=_step)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _write_text(path: Path, *, text: str) -> None:
    path.write_text(text + "\n", encoding="utf-8")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
