"""Folders of training snapshots: which there are, and which are whole. `checkpoint/snapshot.py` has what is in them."""

import hashlib
import json
import logging
import re
from pathlib import Path
from typing import Any

from dsv3.errors import SnapshotError

FORMAT = 1
NAME = re.compile(r"step-(\d{6,})")

logger = logging.getLogger(__name__)


def latest_snapshot(folder: Path) -> Path | None:
    """Return the newest snapshot that is whole, checked byte for byte; None if there is no snapshot at all.

    A damaged one is passed over with a warning that says what is wrong with it.

    Raises:
        SnapshotError: there are snapshots and all of them are damaged. To start over would overwrite the run.
    """
    damaged = []
    for path in reversed(snapshots_in(folder)):
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


def verify_snapshot(path: Path) -> list[str]:
    """Return the names of the snapshot's files, all of which have the size and SHA-256 of its manifest.

    Raises:
        SnapshotError: they have not; names the first that is wrong, and how.
    """
    manifest = read_manifest(path)
    for name, expected in manifest.items():
        file = path / name
        if not file.is_file():
            raise SnapshotError(f"the snapshot {path} is damaged: {name} is missing")
        size = file.stat().st_size
        if size != expected["bytes"]:
            raise SnapshotError(
                f"the snapshot {path} is damaged: {name} has {size:,} bytes and was written with {expected['bytes']:,}"
            )
        if sha256_of(file) != expected["sha256"]:
            raise SnapshotError(f"the snapshot {path} is damaged: the bytes of {name} are not those that were written")
    return list(manifest)


def read_manifest(path: Path) -> dict[str, dict[str, Any]]:
    """Return the size and SHA-256 of each file of a snapshot, as they were written.

    Raises:
        SnapshotError: there is no manifest, it cannot be read, or it is of another format.
    """
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


def snapshots_in(folder: Path) -> list[Path]:
    """Return the finished snapshots, oldest first."""
    found = [path for path in folder.iterdir() if NAME.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(found, key=step_of)


def step_of(path: Path) -> int:
    """Return the step that a snapshot is of."""
    return int(path.name.removeprefix("step-"))


def sha256_of(path: Path) -> str:
    """Return the digest of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
