"""Folders in the published layout: what their files are called, and which folders are such."""

from pathlib import Path

from dsv3.config.files import read_json
from dsv3.errors import ConfigError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


def is_published_folder(folder: Path) -> bool:
    """Whether the folder has safetensors weights and a `config.json` with a model type, so that it can be opened."""
    try:
        values = read_json(folder / "config.json")
    except ConfigError:
        return False
    return "model_type" in values and any((folder / name).is_file() for name in (SINGLE_FILE, INDEX_FILE))
