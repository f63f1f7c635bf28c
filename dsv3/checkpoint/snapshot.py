"""Training snapshots: everything a run needs to go on bit for bit, or nothing.

    snapshots/step-000200/   model.safetensors and other groups of tensors, state.json, manifest.json

Many ranks write a file each (model-00003.safetensors) with what they hold; a tensor that no rank has whole lies there
in pieces, named NAME[FIRST:END] by the rows of its first dim. Whoever reads asks for tensors or rows of them, and need
not know how many ranks there were.

A snapshot is made in a folder of another name, forced to the disk, and renamed: at every moment, a kill leaves the
last good one. The manifest holds the size and SHA-256 of every file, so a file that was cut short or changed is found
out and the snapshot before it is used. Why not torch.distributed.checkpoint: docs/decisions/0001.
"""

import errno
import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dsv3.checkpoint.snapshot_folder import (
    FORMAT,
    read_manifest,
    sha256_of,
    snapshots_in,
    step_of,
    verify_snapshot,
)
from dsv3.config import SnapshotConfig
from dsv3.errors import SnapshotError
from dsv3.parallel.ranks import Alone
from dsv3.runtime.atomic import force_to_disk

RANK_FILE = re.compile(r"-\d{5,}$")
PIECE = re.compile(r"(?P<name>.*)\[(?P<first>\d+):\d+\]")
DISK_IS_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def save_snapshot(
    folder: Path,
    *,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    policy: SnapshotConfig,
    ranks: Alone | None = None,
) -> Path:
    """Write the snapshot of `step` below `folder`, then remove those that `policy` no longer keeps.

    Comes back only when the bytes are on the disk. Whatever fails, the snapshots that were there stay, and nothing
    half written is left. Snapshots of later steps, of a run that was thrown back behind them, are not counted. Of
    several ranks all must call it, each with the tensors and pieces that it is to write, in one folder.

    Raises:
        SnapshotError: the disk is full, or the folder cannot be written; every rank raises the same.
    """
    return Saving(folder, step=step, tensors=tensors, state=state, policy=policy, ranks=ranks or Alone()).finish()


class Saving:
    """A snapshot that is being written. With `in_background` this rank's files are, while the caller goes on."""

    def __init__(
        self,
        folder: Path,
        *,
        step: int,
        tensors: Mapping[str, Mapping[str, Tensor]],
        state: Mapping[str, Any],
        policy: SnapshotConfig,
        ranks: Alone,
        in_background: bool = False,
    ) -> None:
        """Begin; every rank must.

        What is written in the background is copied first, so that training may change it.

        Raises:
            SnapshotError: there is no room on the disk, or the folder cannot be written.
        """
        self.step = step
        self._folder, self._state, self._policy, self._ranks = folder, {"step": step, **state}, policy, ranks
        self._name = f"step-{step:06d}"
        self._partial = folder / f".{self._name}.partial"
        [needed] = ranks.total([sum(tensor.nbytes for named in tensors.values() for tensor in named.values())])
        self._agree(self._make_folder, int(needed))
        self._failed: Exception | None = None
        self._entries: dict[str, dict[str, Any]] = {}
        copied = {
            group: {name: tensor.detach().clone() if in_background else tensor for name, tensor in named.items()}
            for group, named in tensors.items()
        }
        self._thread = Thread(target=self._write_own, args=(copied,), name=f"snapshot of step {step}")
        self._thread.start()

    @property
    def is_written(self) -> bool:
        """Whether this rank's files are, or have failed to be."""
        return not self._thread.is_alive()

    def finish(self) -> Path:
        """Wait for the files of all ranks and give the snapshot its name; return its path. Every rank must.

        Raises:
            SnapshotError: it could not be written.
        """
        self._thread.join()
        entries = self._agree(self._own_entries)
        files = {name: entry for own in entries for name, entry in own.items()}
        self._agree(self._put_in_place, files)
        return self._folder / self._name

    def _write_own(self, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Write this rank's files."""
        suffix = "" if self._ranks.size == 1 else f"-{self._ranks.rank:05d}"
        try:
            for group, named in tensors.items():
                if named:
                    path = self._partial / f"{group}{suffix}.safetensors"
                    safetensors.torch.save_file(
                        {name: tensor.detach().contiguous() for name, tensor in named.items()}, path
                    )
                    self._entries[path.name] = _entry(path)
        except Exception as error:  # told by `finish`, in the caller's thread
            self._failed = error

    def _own_entries(self) -> dict[str, dict[str, Any]]:
        if self._failed is not None:
            raise self._failed
        return self._entries

    def _make_folder(self, needed: int) -> None:
        if self._ranks.rank == 0:
            self._folder.mkdir(parents=True, exist_ok=True)
            _remove_leftovers(self._folder)
            _require_space(self._folder, needed=needed)
            self._partial.mkdir()

    def _put_in_place(self, files: Mapping[str, Mapping[str, Any]]) -> None:
        if self._ranks.rank == 0:
            _write_text(self._partial / "state.json", text=json.dumps(self._state, indent=2))
            files = {**files, "state.json": _entry(self._partial / "state.json")}
            manifest = {"format": FORMAT, "files": dict(sorted(files.items()))}
            _write_text(self._partial / "manifest.json", text=json.dumps(manifest, indent=2))
            force_to_disk(self._partial / "manifest.json")
            force_to_disk(self._partial)
            _rename(self._partial, target=self._folder / self._name)
            _retain(self._folder, newest=self.step, policy=self._policy)

    def _agree(self, do: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Do something on every rank; if it fails on any, clean up and raise on all."""
        result, error = None, None
        try:
            result = do(*arguments)
        except (OSError, SafetensorError) as problem:
            error = _explain(problem, folder=self._folder, name=self._name)
            error.__cause__ = problem
        except BaseException:
            shutil.rmtree(self._partial, ignore_errors=True)
            raise
        told = self._ranks.gather((result, None if error is None else str(error)))
        first = next((message for _, message in told if message is not None), None)
        if first is not None:
            if self._ranks.rank == 0:
                shutil.rmtree(self._partial, ignore_errors=True)
            raise error or SnapshotError(first)
        return [one for one, _ in told]


def read_snapshot(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Return the groups of named tensors and the state of one snapshot, after checking every byte of it.

    Tensors are on the CPU, whole, in the types they were saved in.

    Raises:
        SnapshotError: a file is missing, cut short or changed, or comes from a version with another format.
    """
    verify_snapshot(path)
    snapshot = OpenSnapshot(path)
    tensors = {group: {name: snapshot.read(group, name) for name in snapshot.names(group)} for group in snapshot.groups}
    return tensors, snapshot.state


class OpenSnapshot:
    """A snapshot of which tensors, or rows of them, can be read one by one. Its bytes are not checked."""

    def __init__(self, path: Path) -> None:
        """Look what is there.

        Raises:
            SnapshotError: its files cannot be read, or pieces of a tensor are missing.
        """
        self.path = path
        self._pieces: dict[str, dict[str, list[_Piece]]] = {}
        try:
            self.state: dict[str, Any] = json.loads((path / "state.json").read_text(encoding="utf-8"))
            for name in read_manifest(path):
                if name.endswith(".safetensors"):
                    self._look_into(path / name)
        except (OSError, SafetensorError, ValueError) as error:
            raise SnapshotError(f"cannot read the snapshot {path}: {error}") from error
        for group, named in self._pieces.items():
            for name, pieces in named.items():
                pieces.sort(key=lambda piece: piece.first)
                ends = [0, *(piece.end for piece in pieces)]
                if [piece.first for piece in pieces] != ends[:-1]:
                    raise SnapshotError(f"the snapshot {path} is damaged: rows of {name} are missing from {group}")

    @property
    def groups(self) -> list[str]:
        """Groups of tensors."""
        return list(self._pieces)

    def names(self, group: str) -> list[str]:
        """Return the tensors of a group, none where there is no such group."""
        return list(self._pieces.get(group, {}))

    def read(self, group: str, name: str, *, first: int = 0, count: int | None = None) -> Tensor:
        """Return a tensor, or `count` rows of it."""
        pieces = self._pieces[group][name]
        end = pieces[-1].end if count is None else first + count
        wanted = [piece for piece in pieces if piece.first < end and piece.end > first]
        try:
            if first >= end:
                return pieces[0].read(pieces[0].first, pieces[0].end)[:0]
            parts = [piece.read(max(first, piece.first), min(end, piece.end)) for piece in wanted]
        except (OSError, SafetensorError) as error:
            raise SnapshotError(f"cannot read the snapshot {self.path}: {error}") from error
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _look_into(self, file: Path) -> None:
        group = RANK_FILE.sub("", file.name.removesuffix(".safetensors"))
        named = self._pieces.setdefault(group, {})
        with safe_open(file, framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118 (not a dict)
                found = PIECE.fullmatch(key)
                shape = opened.get_slice(key).get_shape()
                first = int(found["first"]) if found else 0
                rows = shape[0] if shape else 1
                piece = _Piece(file=file, key=key, first=first, end=first + rows)
                named.setdefault(found["name"] if found else key, []).append(piece)


@dataclass(frozen=True, kw_only=True)
class _Piece:
    """Consecutive rows of a tensor, in a file."""

    file: Path
    key: str
    first: int
    end: int

    def read(self, first: int, end: int) -> Tensor:
        """Return rows, counted as those of the whole tensor."""
        with safe_open(self.file, framework="pt") as opened:
            if (first, end) == (self.first, self.end):
                return opened.get_tensor(self.key)
            return opened.get_slice(self.key)[first - self.first : end - self.first]


def piece_name(name: str, *, first: int, end: int) -> str:
    """Return the name of consecutive rows of a tensor."""
    return f"{name}[{first}:{end}]"


def _entry(path: Path) -> dict[str, Any]:
    """Force a file to the disk, and return what the manifest says of it."""
    force_to_disk(path)
    return {"bytes": path.stat().st_size, "sha256": sha256_of(path)}


def _rename(partial: Path, *, target: Path) -> None:
    """Give the finished folder its name. One already there is a damaged one that this run has caught up with."""
    if target.exists():
        aside = target.with_name(f".{target.name}.replaced.partial")
        target.rename(aside)
    partial.rename(target)
    force_to_disk(target.parent)
    _remove_leftovers(target.parent)


def _retain(folder: Path, *, newest: int, policy: SnapshotConfig) -> None:
    kept = [path for path in snapshots_in(folder) if step_of(path) <= newest]
    for path in kept[: -policy.keep_last]:
        if policy.keep_every_steps and step_of(path) % policy.keep_every_steps == 0:
            continue
        # First out of the way by a rename: a kill while files are being deleted must not leave half a snapshot.
        doomed = path.with_name(f".{path.name}.removed.partial")
        path.rename(doomed)
        shutil.rmtree(doomed)


def _remove_leftovers(folder: Path) -> None:
    """Delete what a kill has left: folders that were never finished, or were on their way out."""
    for path in folder.glob(".step-*.partial"):
        shutil.rmtree(path)


def _require_space(folder: Path, *, needed: int) -> None:
    """Refuse before writing what cannot fit; the system's own error, should the disk fill meanwhile, means the same."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(errno.ENOSPC, f"{needed / 1e6:,.0f} MB are needed and {free / 1e6:,.0f} MB are free")


def _explain(error: Exception, *, folder: Path, name: str) -> SnapshotError:
    good = [path.name for path in snapshots_in(folder) if path.name != name]
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


def _write_text(path: Path, *, text: str) -> None:
    path.write_text(text + "\n", encoding="utf-8")
