"""What a folder given as MODEL holds: a training run, or weights in the published layout."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsv3.checkpoint.snapshot import latest_snapshot
from dsv3.errors import CheckpointError

WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json")
"""Either of them makes a folder one of published weights: one file, or the index of several."""
KINDS = (
    "MODEL is one of: a run folder (config.json of the run, and export/ or snapshots/), "
    "an export folder or a published checkpoint (config.json with the model's sizes, and model.safetensors or "
    "model.safetensors.index.json)"
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


def find_model(folder: str | Path) -> ModelFolder:
    """Find the weights: a published layout as it is, of a run its finished export, else its newest snapshot.

    Raises:
        CheckpointError: the folder is neither; says what is in it.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        found = "it is a file" if folder.exists() else "there is no such folder"
        raise CheckpointError(f"cannot load a model from {folder}: {found}. {KINDS}")
    if _is_published(folder):
        run = folder.absolute().parent
        return _published(folder, run=run if folder.name == "export" and _is_run(run) else None)
    if _is_run(folder):
        return _of_run(folder)
    raise CheckpointError(f"cannot load a model from {folder}: {_describe(folder)}. {KINDS}")


def _of_run(folder: Path) -> ModelFolder:
    export, snapshot = folder / "export", latest_snapshot(folder / "snapshots")
    if _is_published(export):
        return _published(export, run=folder)
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


def _is_published(folder: Path) -> bool:
    has_weights = any((folder / name).exists() for name in WEIGHT_FILES)
    return has_weights and "hidden_size" in _read_config(folder)


def _is_run(folder: Path) -> bool:
    return isinstance(_read_config(folder).get("model"), dict)


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.exists():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}); restore it, or load another folder") from error
    return values if isinstance(values, dict) else {}


def _describe(folder: Path) -> str:
    names = sorted(path.name + ("/" if path.is_dir() else "") for path in folder.iterdir())
    if not names:
        return "it is empty"
    if "hidden_size" in _read_config(folder):
        return f"it has a config.json but neither {' nor '.join(WEIGHT_FILES)}"
    if any((folder / name).exists() for name in WEIGHT_FILES) and "config.json" not in names:
        return "it has weights but no config.json"
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return f"it holds {', '.join(names[:8])}{more}"
