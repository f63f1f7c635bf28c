"""Weights in the published format: files to model, model to files, files to files.

The names of tensors are in `names.py`, reading and its checks in `reader.py`, writing in `writer.py`.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from dsv3.checkpoint.names import BLOCK, PublishedTensor, scale_name
from dsv3.checkpoint.reader import PublishedReader, open_published
from dsv3.checkpoint.writer import FP8, quantise_finite, write_published
from dsv3.config import ModelConfig
from dsv3.config.files import read_json
from dsv3.errors import CheckpointError
from dsv3.fp8.formats import is_fp8
from dsv3.fp8.quantise import Quantised, dequantise
from dsv3.model.transformer import Transformer
from dsv3.runtime.device import choose_dtype
from dsv3.runtime.log import get_logger

__all__ = ["assemble", "convert_published", "load_published", "save_published"]

MAX_SHARD_BYTES = 5_000_000_000
"""Five gigabytes a file, the size of most published checkpoints."""


def load_published(folder: Path, *, dtype: torch.dtype, device: torch.device | str) -> Transformer:
    """Return the model in `folder`, its weights in `dtype` and its router biases in FP32.

    Tensor by tensor, from memory-mapped files: the model is never held twice. FP8 weights are dequantised, unless
    `dtype` is torch.float8_e4m3fn: then what is published in FP8 is kept so, byte for byte, or rounded to it from
    another type; all else is in the type that is computed in on `device`, and the model is for use, not for training.
    A model that transformers saved has lost its MTP modules and comes back with `num_nextn_predict_layers` = 0; what
    was assumed is logged. The files order eh_proj embedding first, and so does the model that comes back.

    Raises:
        CheckpointError: a file is missing or damaged, or tensors are missing, unexpected or misshapen; or a weight
            that is to be rounded to FP8 has NaN or infinity in it.
        ConfigError: config.json asks for what is not implemented.
    """
    reader = open_published(Path(folder))
    for tensor in reader.layout:
        if tensor.is_copy:
            _compare_copy(reader, tensor=tensor)
    return assemble(
        reader.config,
        layout=[tensor for tensor in reader.layout if not tensor.is_copy],
        read=lambda tensor: _value_for(dtype, reader=reader, tensor=tensor),
        dtype=dtype,
        device=device,
    )


def assemble(
    config: ModelConfig,
    *,
    layout: Sequence[PublishedTensor],
    read: Callable[[PublishedTensor], Tensor | Quantised],
    dtype: torch.dtype,
    device: torch.device | str,
) -> Transformer:
    """Return the model whose weights `read` returns one by one, in types as `load_published` describes them."""
    plain = choose_dtype("auto", device=torch.device(device)) if dtype == FP8 else dtype
    with torch.device("meta"):
        model = Transformer(config)
        if dtype == FP8:
            model.make_room_in_fp8()
    room = model.state_dict()
    tensors: dict[str, Tensor] = {}

    def fill(name: str, *, part: Callable[[Tensor], Tensor], value: Tensor, kept: torch.dtype) -> None:
        if name not in tensors:
            tensors[name] = torch.empty(room[name].shape, dtype=kept, device=device)
        part(tensors[name]).copy_(value)

    for tensor in layout:
        value = read(tensor)
        if dtype == FP8 and tensor.in_fp8:
            stored = value if isinstance(value, Quantised) else quantise_finite(value, name=tensor.name)
            fill(tensor.source, part=tensor.part_of, value=stored.values, kept=FP8)
            scales = scale_name(tensor.source)
            fill(scales, part=tensor.part_of_scales, value=stored.scales, kept=torch.float32)
        else:
            assert isinstance(value, Tensor)
            kept = torch.float32 if tensor.stays_float32 else plain
            fill(tensor.source, part=tensor.part_of, value=value, kept=kept)
    model.load_state_dict(tensors, assign=True)
    return model


def save_published(
    model: Transformer,
    *,
    folder: Path,
    tokenizer_folder: Path | None,
    dtype: torch.dtype = torch.bfloat16,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    overwrite: bool = False,
) -> None:
    """Write the model to `folder` in the published format, with index, config.json and tokenizer files.

    The folder appears whole or not at all. An earlier export there is replaced; a folder with anything else in it is
    refused unless `overwrite`. A model with `mtp_concat_order = 'hidden_first'` is written in the published order:
    the halves of eh_proj are exchanged, which changes nothing that it computes. With torch.float8_e4m3fn the files are
    in the released FP8 format: matrices of layers in E4M3 blocks, all else in BF16; weights that are in FP8 already are
    written byte for byte.

    Raises:
        CheckpointError: the folder is in use, cannot be written, or the disk is full; or a weight that is to be
            rounded to FP8 has NaN or infinity in it.
    """
    state = model.state_dict()
    write_published(
        Path(folder),
        config=model.config,
        read=lambda tensor: published_value(tensor, state=state, dtype=dtype),
        dtype=dtype,
        max_shard_bytes=max_shard_bytes,
        tokenizer_folder=tokenizer_folder,
        overwrite=overwrite,
    )


def convert_published(
    source: Path,
    *,
    folder: Path,
    dtype: torch.dtype,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    overwrite: bool = False,
) -> None:
    """Write the published folder `source` again as `folder`: in another type, complete in its config.json.

    No model is made and at most one shard is in memory, so a checkpoint larger than memory can be converted. FP8
    becomes `dtype`; where that is FP8 too and the blocks are those of 128 x 128, the bytes are passed on as they are
    (a NaN among them too), and multipliers in a narrower type than FP32 are widened. Tokenizer files and generation
    settings come along.

    Raises:
        CheckpointError: `source` cannot be read, or `folder` cannot be written; or a weight that is to be rounded to
            FP8 has NaN or infinity in it.
    """
    if folder.resolve() == source.resolve():
        raise CheckpointError(f"{source} cannot be converted onto itself; give another folder")
    reader = open_published(source)
    main = {tensor.source: tensor for tensor in reader.layout if not tensor.is_copy}
    generation = source / "generation_config.json"
    write_published(
        folder,
        config=reader.config,
        # A copy that the source has left out, or has let drift, is written from the tensor it repeats.
        read=lambda tensor: _value_for(dtype, reader=reader, tensor=main[tensor.source] if tensor.is_copy else tensor),
        dtype=dtype,
        max_shard_bytes=max_shard_bytes,
        tokenizer_folder=source if (source / "tokenizer.json").is_file() else None,
        generation_config=read_json(generation) if generation.is_file() else None,
        overwrite=overwrite,
    )


def _value_for(dtype: torch.dtype, *, reader: PublishedReader, tensor: PublishedTensor) -> Tensor | Quantised:
    """Return a tensor as it is best written in `dtype`: in FP8 where it is so already and is to be so again.

    Multipliers of other programs have more bits than ours, so that quantising anew could move a value.
    """
    if dtype == FP8 and tensor.in_fp8 and reader.is_fp8(tensor):
        quantised = reader.read_fp8(tensor)
        if quantised.tile == BLOCK:
            return quantised
    return reader.read(tensor)


def published_value(tensor: PublishedTensor, *, state: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor | Quantised:
    """Return a published tensor from our state dict: in FP8 only where it is held so and `dtype` is FP8."""
    part = tensor.part_of(state[tensor.source])
    if is_fp8(part):
        scales = tensor.part_of_scales(state[scale_name(tensor.source)])
        stored = Quantised(values=part.cpu(), scales=scales.cpu(), tile=BLOCK)
        return stored if dtype == FP8 else dequantise(stored)
    return exchange_halves(part) if tensor.swapped_halves else part


def exchange_halves(weight: Float[Tensor, "hidden two_hidden"]) -> Float[Tensor, "hidden two_hidden"]:
    """Return eh_proj for its two inputs in the other order."""
    left, right = weight.chunk(2, dim=1)
    return torch.cat((right, left), dim=1)


def _compare_copy(reader: PublishedReader, *, tensor: PublishedTensor) -> None:
    """Say so when the file's copy of embedding or head, for the MTP modules, is not what the main model has."""
    main = next(other for other in reader.layout if other.source == tensor.source and not other.is_copy)
    if not torch.equal(reader.stored(main.name), reader.stored(tensor.name)):
        get_logger(__name__).warning(
            "%s: %s differs from %s, of which it should be a copy; the latter is used",
            reader.folder,
            tensor.name,
            main.name,
        )
