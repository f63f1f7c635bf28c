"""What a folder given as MODEL holds: a training run, or weights in the published layout."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsv3.checkpoint.published_folder import INDEX_FILE, SINGLE_FILE, is_published_folder
from dsv3.checkpoint.snapshot_folder import latest_snapshot
from dsv3.config.files import read_json
from dsv3.errors import CheckpointError, ConfigError

KINDS = (
    "A model is one of: a run folder (config.json of the run, and export/ or snapshots/), an export folder, or a "
    f"published checkpoint (config.json with a model_type, and {SINGLE_FILE} or {INDEX_FILE})"
)


@dataclass(frozen=True, kw_only=True)
class ModelFolder:
    """Where the weights and the tokenizer of a MODEL argument are."""

    weights: Path
    """A folder of published layout, or a snapshot of a run."""
    run: Path | None
    """The training run that the weights belong to, if they lie in one."""
    is_snapshot: bool
    tokenizer: Path | None
    """tokenizer.json, or None where there is none: such a model answers token ids only."""


def find_model(folder: str | Path, *, snapshot_only: bool = False) -> ModelFolder:
    """Find the weights: a published layout as it is, of a run its finished export, else its newest snapshot.

    With `snapshot_only` a run gives its newest snapshot even when it has an export.

    Raises:
        CheckpointError: the folder is neither; says what is in it.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        found = "it is a file" if folder.exists() else "there is no such folder"
        raise CheckpointError(f"cannot load a model from {folder}: {found}. {KINDS}")
    if is_published_folder(folder):
        place = folder.absolute()
        in_a_run = place.name == "export" and _is_run(place.parent)
        return _published(folder, run=place.parent if in_a_run else None)
    if _is_run(folder):
        return _of_run(folder, snapshot_only=snapshot_only)
    raise CheckpointError(f"cannot load a model from {folder}: {_describe(folder)}. {KINDS}")


def _of_run(folder: Path, *, snapshot_only: bool) -> ModelFolder:
    if not snapshot_only and is_published_folder(folder / "export"):
        return _published(folder / "export", run=folder)
    snapshot = latest_snapshot(folder / "snapshots")
    if snapshot is None:
        raise CheckpointError(
            f"{folder} is a training run that has written neither a snapshot nor an export yet; wait for its first "
            "snapshot, or start it again with the same command"
        )
    tokenizer = folder / "corpus" / "tokenizer" / "tokenizer.json"
    return ModelFolder(
        weights=snapshot, run=folder, is_snapshot=True, tokenizer=tokenizer if tokenizer.exists() else None
    )


def _published(folder: Path, *, run: Path | None) -> ModelFolder:
    tokenizer = folder / "tokenizer.json"
    return ModelFolder(weights=folder, run=run, is_snapshot=False, tokenizer=tokenizer if tokenizer.exists() else None)


def _is_run(folder: Path) -> bool:
    return isinstance(_read_config(folder).get("model"), dict)


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.exists():
        return {}
    try:
        return read_json(path)
    except ConfigError as error:
        raise CheckpointError(f"cannot load a model from {folder}: {error}") from error


def _describe(folder: Path) -> str:
    names = sorted(path.name + ("/" if path.is_dir() else "") for path in folder.iterdir())
    if not names:
        return "it is empty"
    has_weights = SINGLE_FILE in names or INDEX_FILE in names
    if has_weights and "config.json" not in names:
        return "it has weights but no config.json"
    if has_weights:
        return "its config.json names no model_type"
    if "model_type" in _read_config(folder):
        return f"it has the config.json of a model but neither {SINGLE_FILE} nor {INDEX_FILE}"
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return f"it holds {', '.join(names[:8])}{more}"
