"""A folder in the published format, opened: its model, and its tensors one at a time.

Files are memory-mapped, and everything that can be told from their headers is checked before the first weight is
read: a 671B checkpoint that lacks one tensor of 91,991 is refused in seconds.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dsv3.checkpoint.names import PublishedTensor, published_layout, scale_name, scale_shape
from dsv3.checkpoint.published_folder import INDEX_FILE, SINGLE_FILE
from dsv3.config import ModelConfig
from dsv3.config.files import read_json
from dsv3.config.published import Fp8Blocks, model_config_from_published, quantisation_from_published
from dsv3.errors import CheckpointError, ConfigError
from dsv3.fp8.quantise import Quantised, dequantise
from dsv3.runtime.log import get_logger

PLAIN_TYPES = {"F64", "F32", "F16", "BF16"}
FP8_TYPE = "F8_E4M3"
SCALE_TYPES = {"F32", "BF16", "F16", "F8_E8M0"}
"""Types of the FP8 multipliers: FP32 in the released files; powers of two in later ones."""
NUM_NAMED = 5
"""How many names of a kind an error spells out."""


class PublishedReader:
    """An open folder whose tensors fit its config.json, all of them. FP8 weights come back dequantised.

    Raises, on construction:
        CheckpointError: a file is missing, cut short or not safetensors; or tensors are missing, unexpected,
            misshapen or of a type that is no weight's, all of them told in one message.
        ConfigError: config.json asks for what is not implemented.
    """

    config: ModelConfig
    """The model in the files. Its `num_nextn_predict_layers` is 0 when the files hold no MTP module."""
    notes: list[str]
    """What was assumed or passed over; for the user, to be logged."""
    layout: tuple[PublishedTensor, ...]
    """The tensors to read. Copies that the files leave out are not among them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        values = _read_config(folder)
        try:
            self.config, self.notes = model_config_from_published(values)
            self._blocks = quantisation_from_published(values) or Fp8Blocks()
        except ConfigError as error:
            raise ConfigError(f"{folder}: {error}") from None
        self._handles = _open_files(folder)
        self._adopt_absent_mtp()
        wanted = published_layout(self.config)
        self._check(wanted)
        self.layout = tuple(tensor for tensor in wanted if tensor.name in self._handles)

    def read(self, tensor: PublishedTensor) -> Tensor:
        """Return the tensor as it is stored, on the CPU; one stored in FP8 in FP32, times its block multipliers."""
        return dequantise(self.read_fp8(tensor)) if self.is_fp8(tensor) else self.stored(tensor.name)

    def is_fp8(self, tensor: PublishedTensor) -> bool:
        """Whether the tensor is stored in FP8, with multipliers beside it."""
        return self._type_of(tensor.name) == FP8_TYPE

    def read_fp8(self, tensor: PublishedTensor) -> Quantised:
        """Return a tensor that is stored in FP8: its bytes as they are, and its multipliers in FP32, which is exact."""
        scales = self.stored(scale_name(tensor.name)).to(torch.float32)
        return Quantised(values=self.stored(tensor.name), scales=scales, tile=self._blocks.block)

    def stored(self, name: str) -> Tensor:
        """Return the tensor without touching its bytes; they are read from the file when they are used."""
        return self._handles[name].get_tensor(name)

    def _adopt_absent_mtp(self) -> None:
        """Take the model as one without MTP where config.json has modules and the files have nothing of them.

        transformers drops them when it saves, and leaves the count in config.json.
        """
        depth, first = self.config.num_nextn_predict_layers, self.config.num_hidden_layers
        prefixes = tuple(f"model.layers.{first + k}." for k in range(depth))
        if depth and not any(name.startswith(prefixes) for name in self._handles):
            self.config = replace(self.config, num_nextn_predict_layers=0)
            self.notes.append(
                f"config.json has num_nextn_predict_layers = {depth}, but the files have no tensor that begins with "
                f"{' or '.join(prefixes)}; loaded without MTP modules (num_nextn_predict_layers = 0)"
            )

    def _check(self, wanted: tuple[PublishedTensor, ...]) -> None:
        missing = [tensor.name for tensor in wanted if tensor.name not in self._handles and not tensor.is_copy]
        misfits = [
            misfit
            for tensor in wanted
            if tensor.name in self._handles
            for misfit in self._misfits(tensor.name, shape=tensor.shape)
        ]
        known = {tensor.name for tensor in wanted}
        scales = {scale_name(name) for name in known & self._handles.keys() if self._type_of(name) == FP8_TYPE}
        known |= scales
        unexpected = [name for name in self._handles if name not in known and not _is_harmless(name)]
        problems = [
            f"{len(names):,} {what}: {', '.join(names[:NUM_NAMED])}{' and more' if len(names) > NUM_NAMED else ''}"
            for what, names in (("missing", missing), ("unexpected", unexpected), ("of the wrong kind", misfits))
            if names
        ]
        if problems:
            raise CheckpointError(
                f"the tensors in {self.folder} do not fit its config.json; {'; '.join(problems)}. "
                f"Expected are {len(wanted):,} for {self.config.num_hidden_layers} layers and "
                f"{self.config.num_nextn_predict_layers} MTP modules; use the config.json that came with the weights"
            )

    def _misfits(self, name: str, *, shape: tuple[int, ...]) -> list[str]:
        """Return what is wrong with shape or type of a stored weight, and with its multipliers if it is FP8."""
        found, kind = self._shape_of(name), self._type_of(name)
        if found != shape:
            return [f"{name} has shape {list(found)} instead of {list(shape)}"]
        if kind != FP8_TYPE:
            return [] if kind in PLAIN_TYPES else [f"{name} is stored as {kind}, which cannot be read"]
        scale = scale_name(name)
        if len(shape) != 2 or scale not in self._handles:
            return [f"{name} is stored in FP8 without {scale}"]
        blocks = scale_shape(shape, block=self._blocks.block)
        if self._shape_of(scale) != blocks:
            return [f"{scale} has shape {list(self._shape_of(scale))} instead of {list(blocks)}"]
        scale_kind = self._type_of(scale)
        return [] if scale_kind in SCALE_TYPES else [f"{scale} is stored as {scale_kind}, which cannot be read"]

    def _shape_of(self, name: str) -> tuple[int, ...]:
        return tuple(self._handles[name].get_slice(name).get_shape())

    def _type_of(self, name: str) -> str:
        return self._handles[name].get_slice(name).get_dtype()


def open_published(folder: Path) -> PublishedReader:
    """Open a published folder, and log what was assumed or passed over.

    Raises:
        CheckpointError, ConfigError: as `PublishedReader`.
    """
    reader = PublishedReader(folder)
    for note in reader.notes:
        get_logger(__name__).warning("%s: %s", folder, note)
    return reader


def _read_config(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise CheckpointError(f"no folder {folder} to load weights from")
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder} has no config.json; a folder of published weights has one beside them")
    return read_json(folder / "config.json")


def _open_files(folder: Path) -> dict[str, Any]:
    """Open all weight files and return, for each tensor name, the open file that holds it."""
    placed = _read_index(folder)
    names = sorted(set(placed.values())) or [SINGLE_FILE]
    if absent := [name for name in names if not (folder / name).is_file()]:
        raise CheckpointError(
            f"{folder} lacks {len(absent)} of {len(names)} weight files: {', '.join(absent[:NUM_NAMED])}"
            f"{' and more' if len(absent) > NUM_NAMED else ''}; copy or download them again"
        )
    handles: dict[str, Any] = {}
    found: dict[str, str] = {}
    for name in names:
        handle = _open_file(folder / name)
        handles |= dict.fromkeys(handle.keys(), handle)
        found |= dict.fromkeys(handle.keys(), name)
    if lost := [f"{tensor} in {file}" for tensor, file in placed.items() if found.get(tensor) != file]:
        raise CheckpointError(
            f"{folder / INDEX_FILE} places {len(lost):,} tensors where they are not: {', '.join(lost[:NUM_NAMED])}"
            f"{' and more' if len(lost) > NUM_NAMED else ''}; the index and the weights are of different checkpoints"
        )
    return handles


def _read_index(folder: Path) -> dict[str, str]:
    """Return the file of each tensor; empty when the weights are one file without an index."""
    path = folder / INDEX_FILE
    if not path.is_file():
        if not (folder / SINGLE_FILE).is_file():
            raise CheckpointError(f"{folder} has neither {SINGLE_FILE} nor {INDEX_FILE}; weights are read from these")
        return {}
    try:
        placed = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is no index of weight files: {error!r}") from error
    # A name with a folder in it could reach outside the checkpoint.
    if not isinstance(placed, dict) or not all(isinstance(f, str) and f == Path(f).name for f in placed.values()):
        raise CheckpointError(f"{path} is no index of weight files: weight_map must map tensor names to file names")
    return placed


def _open_file(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} ({path.stat().st_size:,} bytes) cannot be read as safetensors: {error}. It is cut short or "
            "damaged; copy or download it again"
        ) from error


def _is_harmless(name: str) -> bool:
    """Whether old programs saved this although it follows from config.json."""
    return name.endswith("rotary_emb.inv_freq")
