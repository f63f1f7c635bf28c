"""What the training mixture weighs: the documents of one source in one domain."""

import re
from pathlib import Path

from dsv3.config.curation import CurationConfig


def group_name(config: CurationConfig, *, source: int, domain: str) -> str:
    """Return the name of a group."""
    return f"{config.inputs[source].name}/{domain}"


def group_folder(output: Path, *, name: str) -> Path:
    """Return the folder of a group's shards."""
    return output / "sources" / re.sub(r"[^A-Za-z0-9._-]+", "-", name)[:100]
