"""A folder in the published format, written: safetensors shards with an index, config.json, tokenizer files.

One shard at a time is in memory. The folder is made under another name and renamed when it is whole, so a reader
finds the old export or the new one.
"""

import errno
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from dsv3.checkpoint.names import BLOCK, PublishedTensor, published_layout, scale_name, scale_shape
from dsv3.checkpoint.published_folder import INDEX_FILE
from dsv3.config import ModelConfig
from dsv3.config.published import notes_for_peers, published_from_model_config
from dsv3.errors import CheckpointError, ConfigError, TokenizerError
from dsv3.fp8.choose import kernels_for
from dsv3.fp8.quantise import BLOCKS, Quantised
from dsv3.runtime.atomic import force_to_disk
from dsv3.runtime.log import get_logger

PRODUCER = "dsv3"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
FP8 = torch.float8_e4m3fn
DTYPES = (torch.float32, torch.bfloat16, torch.float16, FP8)
DISK_IS_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def write_published(
    folder: Path,
    *,
    config: ModelConfig,
    read: Callable[[PublishedTensor], Tensor | Quantised],
    dtype: torch.dtype,
    max_shard_bytes: int,
    tokenizer_folder: Path | None,
    generation_config: dict[str, Any] | None = None,
    overwrite: bool = False,
) -> None:
    """Write the model whose tensors `read` returns, as `folder`.

    Weights are cast to `dtype`; router biases stay in FP32, as in the released files. With torch.float8_e4m3fn the
    files are as the released ones: matrices of layers in FP8 with multipliers in FP32 beside them, all else in BF16.
    What `read` returns in FP8 already is written byte for byte. A folder that an earlier call wrote is replaced; any
    other that has something in it is refused, unless `overwrite`.

    Raises:
        CheckpointError: the folder is in use, cannot be written, or the disk is full; or a weight that is to be
            rounded to FP8 has NaN or infinity in it. Nothing in FP8 could stand for one value of that kind: its whole
            block would become NaN.
        ConfigError: a dtype that weights are not published in.
        TokenizerError: `tokenizer_folder` has no tokenizer.json.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"weights cannot be written in {dtype}; use {', '.join(str(known) for known in DTYPES)}")
    if tokenizer_folder is not None and not (tokenizer_folder / "tokenizer.json").is_file():
        raise TokenizerError(f"{tokenizer_folder} has no tokenizer.json to write beside the weights")
    folder = folder.resolve()
    _require_free(folder, overwrite=overwrite)
    for note in notes_for_peers(config):
        get_logger(__name__).warning("%s", note)
    partial = folder.with_name(f".{folder.name}.partial")
    layout = published_layout(config)
    if dtype == FP8:
        _warn_of_cut_blocks(layout)
    try:
        _make_empty(partial)
        require_space(partial, needed=sum(_num_bytes(tensor, dtype=dtype) for tensor in layout))
        _write_weights(partial, layout=layout, read=read, dtype=dtype, max_shard_bytes=max_shard_bytes)
        most = str(torch.bfloat16 if dtype == FP8 else dtype).removeprefix("torch.")
        published = published_from_model_config(config, dtype=most, quantized=dtype == FP8)
        _write_json(partial / "config.json", values=published)
        tokens = {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id}
        _write_json(partial / "generation_config.json", values=generation_config or tokens)
        if tokenizer_folder is not None:
            _copy_tokenizer(tokenizer_folder, target=partial)
        _put_in_place(partial, target=folder)
    except (OSError, SafetensorError) as error:
        raise explain_failure(error, target=folder) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def shards_of(
    layout: Sequence[PublishedTensor], *, dtype: torch.dtype, max_shard_bytes: int
) -> list[list[PublishedTensor]]:
    """Return the tensors of each shard, in order, none over the limit but for a tensor that is so by itself.

    The multipliers of an FP8 weight are counted with it and lie in the same shard.
    """
    shards: list[list[PublishedTensor]] = [[]]
    room = max_shard_bytes
    for tensor in layout:
        size = _num_bytes(tensor, dtype=dtype)
        if size > room and shards[-1]:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(tensor)
        room -= size
    return shards


def _write_weights(
    folder: Path,
    *,
    layout: Sequence[PublishedTensor],
    read: Callable[[PublishedTensor], Tensor | Quantised],
    dtype: torch.dtype,
    max_shard_bytes: int,
) -> None:
    shards = shards_of(layout, dtype=dtype, max_shard_bytes=max_shard_bytes)
    placed: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors: dict[str, Tensor] = {}
        for tensor in shard:
            tensors |= _to_store(read(tensor), tensor=tensor, dtype=dtype)
        save_file(tensors, folder / name, metadata={"format": "pt"})
        placed |= dict.fromkeys(tensors, name)
    total = sum(_num_bytes(tensor, dtype=dtype) for tensor in layout)
    index = {"metadata": {"total_size": total, "producer": PRODUCER}, "weight_map": dict(sorted(placed.items()))}
    _write_json(folder / INDEX_FILE, values=index)


def _to_store(value: Tensor | Quantised, *, tensor: PublishedTensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return what the file holds of a tensor: itself, or in FP8 itself and its multipliers."""
    kind = _stored_type(tensor, dtype=dtype)
    if kind == FP8:
        quantised = value if isinstance(value, Quantised) else quantise_finite(value, name=tensor.name)
        assert (tuple(quantised.values.shape), quantised.tile) == (tensor.shape, BLOCK), tensor.name
        return {tensor.name: quantised.values.contiguous(), scale_name(tensor.name): quantised.scales.contiguous()}
    assert isinstance(value, Tensor)
    assert tuple(value.shape) == tensor.shape, tensor.name
    stored = value.detach().to("cpu", kind).contiguous()
    # Within a file no two tensors may share memory, and a copy shares that of what it repeats.
    shares = tensor.is_copy and stored.data_ptr() == value.data_ptr()
    return {tensor.name: stored.clone() if shares else stored}


def quantise_finite(value: Tensor, *, name: str) -> Quantised:
    """Return a matrix in FP8, in blocks as they are published, on the CPU.

    Raises:
        CheckpointError: it has NaN or infinity in it.
    """
    wide = value.detach().to("cpu", torch.float32)
    quantised = kernels_for(wide.device).quantise(wide, form=BLOCKS)
    if not quantised.scales.isfinite().all():
        raise CheckpointError(
            f"{name} cannot be in FP8: {int((~value.isfinite()).sum()):,} of its values are NaN or infinite, and each "
            "would make its whole block of 128 x 128 NaN. Look for the step at which training broke, or take "
            "bfloat16, which keeps them as they are"
        )
    return quantised


def _warn_of_cut_blocks(layout: Sequence[PublishedTensor]) -> None:
    """Say which matrices transformers 5.23 misreads: it divides a matrix by the number of its multipliers, evenly.

    The released checkpoint has such matrices too, of 576 rows.
    """
    cut = [
        tensor
        for tensor in layout
        if tensor.in_fp8 and any(side > most and side % most for side, most in zip(tensor.shape, BLOCK, strict=True))
    ]
    if cut:
        get_logger(__name__).warning(
            "where transformers dequantises FP8 weights, as it does without a GPU, it takes all blocks of a matrix to "
            "be of one size, and would refuse or misread %s of this model, such as %s of %s; write bf16 for it",
            f"{len(cut):,} matrices",
            cut[0].name,
            list(cut[0].shape),
        )


def _stored_type(tensor: PublishedTensor, *, dtype: torch.dtype) -> torch.dtype:
    if tensor.stays_float32:
        return torch.float32
    return torch.bfloat16 if dtype == FP8 and not tensor.in_fp8 else dtype


def _num_bytes(tensor: PublishedTensor, *, dtype: torch.dtype) -> int:
    kind = _stored_type(tensor, dtype=dtype)
    multipliers = torch.Size(scale_shape(tensor.shape)).numel() if kind == FP8 else 0
    return torch.Size(tensor.shape).numel() * kind.itemsize + multipliers * torch.float32.itemsize


def _copy_tokenizer(source: Path, *, target: Path) -> None:
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def _write_json(path: Path, *, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _make_empty(folder: Path) -> None:
    """Make the folder, without what a killed call may have left in it."""
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)


def _require_free(folder: Path, *, overwrite: bool) -> None:
    """Refuse a folder whose contents somebody would miss: anything but an empty one or an earlier export of ours."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is a file; give the name of a folder to write")
    names = sorted(path.name for path in folder.iterdir())
    if overwrite or not names or _is_ours(folder, names=names):
        return
    raise CheckpointError(
        f"{folder} already holds {', '.join(names[:5])}{' and more' if len(names) > 5 else ''}, which dsv3 did not "
        "write there; give another folder, or allow it with overwrite (--overwrite)"
    )


def _is_ours(folder: Path, *, names: list[str]) -> bool:
    try:
        index = json.loads((folder / INDEX_FILE).read_text(encoding="utf-8"))
        written = {*index["weight_map"].values(), INDEX_FILE, "config.json", "generation_config.json", *TOKENIZER_FILES}
        return index["metadata"]["producer"] == PRODUCER and written.issuperset(names)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def require_space(folder: Path, *, needed: int) -> None:
    """Raise OSError, as the system would in the middle of it, where `needed` bytes are more than are free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(errno.ENOSPC, f"{needed / 1e6:,.1f} MB are needed and {free / 1e6:,.1f} MB are free")


def _put_in_place(partial: Path, *, target: Path) -> None:
    """Force the finished folder to the disk and give it its name; only then does what had the name go."""
    for path in (*partial.iterdir(), partial):
        force_to_disk(path)
    aside = target.with_name(f".{target.name}.replaced")
    shutil.rmtree(aside, ignore_errors=True)
    if target.exists():
        target.rename(aside)
    partial.rename(target)
    force_to_disk(target.parent)
    shutil.rmtree(aside, ignore_errors=True)


def explain_failure(error: Exception, *, target: Path) -> CheckpointError:
    """Return what to tell the user of a file or folder that could not be written."""
    detail = (error.strerror if isinstance(error, OSError) else None) or str(error)
    full = isinstance(error, OSError) and error.errno in DISK_IS_FULL
    if full or any(f"os error {code}" in str(error) for code in DISK_IS_FULL):
        return CheckpointError(
            f"the disk is full: {target} was not written ({detail}); make room or give another place"
        )
    return CheckpointError(f"{target} was not written: {detail}; give a place that can be written")
