"""Whether two machines have the same model, without reading hundreds of gigabytes."""

import hashlib
from collections.abc import Mapping
from pathlib import Path

from dsv3.infer.model_folder import ModelFolder

SAMPLE_BYTES = 1 << 16
"""Of the beginning and of the end of each file of weights: names and shapes of tensors, and numbers of the last."""


def digest_of(model: ModelFolder) -> dict[str, str]:
    """Return a digest of each part: settings and tokenizer as a whole, weights by names, sizes and samples of files."""
    weights = hashlib.sha256()
    for file in sorted(model.weights.glob("*.safetensors")):
        weights.update(f"{file.name} {file.stat().st_size}\n".encode())
        weights.update(_sample(file))
    of = {"weights": weights.hexdigest()[:32]}
    settings = (model.run if model.is_snapshot and model.run else model.weights) / "config.json"
    for name, path in (("config.json", settings), ("tokenizer.json", model.tokenizer)):
        of[name] = hashlib.sha256(path.read_bytes()).hexdigest()[:32] if path is not None and path.is_file() else ""
    return of


def differences(one: Mapping[str, str], other: Mapping[str, str]) -> str:
    """Return in words which parts differ; empty if none do."""
    unlike = [part for part in sorted({*one, *other}) if one.get(part) != other.get(part)]
    return f"{' and '.join(unlike)} differ" if unlike else ""


def _sample(file: Path) -> bytes:
    with file.open("rb") as opened:
        begin = opened.read(SAMPLE_BYTES)
        opened.seek(max(len(begin), file.stat().st_size - SAMPLE_BYTES))
        return begin + opened.read()
