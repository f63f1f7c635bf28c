"""From a folder of published weights to the engine's layout, tensor by tensor out of memory-mapped files."""

from pathlib import Path

import torch
from torch import Tensor

from dsv3.checkpoint.names import PublishedTensor
from dsv3.checkpoint.reader import PublishedReader, open_published
from dsv3.fp8.quantise import Quantised
from dsv3.infer.packed_model import PackedModel, pack_model


def load_packed(folder: Path, *, weights: str) -> PackedModel:
    """Return the model of a folder in the format `weights`; 'auto' keeps what the files are in.

    Nothing is held twice but one tensor at a time.

    Raises:
        CheckpointError: a file is missing or damaged, or the tensors do not fit config.json.
        ConfigError: there is no such format.
    """
    reader = open_published(folder)

    def read(tensor: PublishedTensor) -> Tensor | Quantised:
        # FP8 blocks stay as they are: packing wants them so, or dequantises them itself.
        return reader.read_fp8(tensor) if reader.is_fp8(tensor) else reader.read(tensor)

    name = stored_format(reader) if weights == "auto" else weights
    return pack_model(reader.config, layout=reader.layout, read=read, name=name)


def stored_format(reader: PublishedReader) -> str:
    """Return the format that keeps a checkpoint's weights as they are, in as few bytes as they take."""
    matrices = [tensor for tensor in reader.layout if tensor.in_fp8]
    if any(reader.is_fp8(tensor) for tensor in matrices):
        return "fp8"
    is_bf16 = all(reader.stored(tensor.name).dtype == torch.bfloat16 for tensor in matrices)
    return "bf16" if is_bf16 else "fp32"
