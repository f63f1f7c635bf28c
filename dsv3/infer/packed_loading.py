"""From a model's folder to the engine's layout, tensor by tensor out of memory-mapped files."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dsv3.checkpoint.names import PublishedTensor, published_layout
from dsv3.checkpoint.reader import PublishedReader
from dsv3.config import ModelConfig
from dsv3.fp8.quantise import Quantised
from dsv3.infer.model_folder import ModelFolder
from dsv3.infer.packed_model import PackedModel, pack_from_state, pack_model
from dsv3.infer.packed_weights import formats_named
from dsv3.runtime.log import get_logger

log = get_logger(__name__)


def load_packed(
    found: ModelFolder, *, weights: str, run_config: ModelConfig | None, read_state: Callable[[], dict[str, Tensor]]
) -> PackedModel:
    """Return the model of a folder in the format `weights`; 'auto' keeps what the files are in.

    Nothing is held twice but one tensor at a time. A run's snapshot comes by `read_state`, with `run_config`.

    Raises:
        CheckpointError: a file is missing or damaged, or the tensors do not fit config.json.
        ConfigError: there is no such format.
    """
    if found.is_snapshot:
        assert run_config is not None
        return pack_from_state(
            read_state(),
            config=run_config,
            layout=published_layout(run_config),
            formats=formats_named("fp32" if weights == "auto" else weights),
        )
    reader = PublishedReader(found.weights)
    for note in reader.notes:
        log.warning("%s: %s", found.weights, note)
    name = stored_format(reader) if weights == "auto" else weights
    source = _Source(reader)
    return pack_model(reader.config, layout=reader.layout, read=source.read, formats=formats_named(name))


def stored_format(reader: PublishedReader) -> str:
    """Return the format that keeps a checkpoint's weights as they are, in as few bytes as they take."""
    matrices = [tensor for tensor in reader.layout if tensor.in_fp8]
    if any(reader.is_fp8(tensor) for tensor in matrices):
        return "fp8"
    is_bf16 = all(reader.stored(tensor.name).dtype == torch.bfloat16 for tensor in matrices)
    return "bf16" if is_bf16 else "fp32"


@dataclass(frozen=True)
class _Source:
    reader: PublishedReader

    def read(self, tensor: PublishedTensor) -> Tensor | Quantised:
        """Return a tensor with its FP8 blocks left as they are; packing wants them so, or dequantises them itself."""
        return self.reader.read_fp8(tensor) if self.reader.is_fp8(tensor) else self.reader.read(tensor)
