"""dsv3 convert: weights between programs, types and folders."""

import re
from pathlib import Path
from typing import Annotated

import typer

from dsv3.errors import ConfigError

PROGRAMS = ("published", "gguf")
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp8": "float8_e4m3fn"}
GGUF_DTYPES = {"fp32": "f32", "fp16": "f16", "f32": "f32", "f16": "f16", "bf16": "bf16", "q8_0": "q8_0"}
UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def register(app: typer.Typer) -> None:
    """Add the verb to the command line."""
    app.command("convert")(convert)


def convert(
    source: Annotated[
        Path,
        typer.Argument(metavar="SOURCE", help="A run folder, an export, or published weights (BF16, FP32 or FP8)."),
    ],
    destination: Annotated[
        Path, typer.Argument(metavar="DESTINATION", help="The folder to write, or the file where it is GGUF.")
    ],
    to: Annotated[
        str, typer.Option(help="published: as DeepSeek publishes; gguf: one file for llama.cpp and Ollama.")
    ] = "published",
    dtype: Annotated[
        str,
        typer.Option(
            help="Type of the written weights: bf16, fp32 or fp8, the released format; in GGUF bf16, f32, f16 or q8_0."
        ),
    ] = "bf16",
    max_shard_size: Annotated[
        str | None, typer.Option(help="Size of one weight file, as 5GB (which it is unless told) or 500MB.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace DESTINATION even if it is something else.")
    ] = False,
) -> None:
    """Write a model in the published format, which transformers, serving engines and dsv3 itself read, or as GGUF.

    Of a run, the finished export is taken, else the newest snapshot. Weights saved by transformers or released in FP8
    come out complete: with the fields in config.json that other programs need. FP8 is E4M3 with a multiplier for each
    block of 128 x 128, for the matrices of layers; embedding, head, norms and routers stay in BF16. What is stored so
    already keeps its bytes.

    GGUF takes in the tokenizer and its chat template, and leaves out the MTP modules, which its readers cannot use.
    """
    if to not in PROGRAMS:
        raise ConfigError(f"--to {to}: models are written as {' or '.join(PROGRAMS)}")
    if to == "gguf":
        _to_gguf(source, file=destination, dtype=dtype, max_shard_size=max_shard_size, overwrite=overwrite)
    else:
        _to_published(
            source,
            folder=destination,
            dtype=dtype,
            max_shard_size="5GB" if max_shard_size is None else max_shard_size,
            overwrite=overwrite,
        )


def _to_published(source: Path, *, folder: Path, dtype: str, max_shard_size: str, overwrite: bool) -> None:
    type_name = parse_dtype(dtype)
    max_shard_bytes = parse_size(max_shard_size)

    import torch

    from dsv3.checkpoint.published import convert_published, save_published
    from dsv3.infer.loaded import load
    from dsv3.infer.model_folder import find_model

    found = find_model(source)
    kind = getattr(torch, type_name)
    if found.is_snapshot:
        save_published(
            load(source, weights="fp32", device="cpu", plain=True).model,
            folder=folder,
            tokenizer_folder=None if found.tokenizer is None else found.tokenizer.parent,
            dtype=kind,
            max_shard_bytes=max_shard_bytes,
            overwrite=overwrite,
        )
    else:
        convert_published(
            found.weights, folder=folder, dtype=kind, max_shard_bytes=max_shard_bytes, overwrite=overwrite
        )
    files = sorted(folder.glob("*.safetensors"))
    size = sum(file.stat().st_size for file in files)
    typer.echo(f"{folder}: {size / 1e6:,.1f} MB of {type_name} weights in {len(files)} files, from {found.weights}")


def _to_gguf(source: Path, *, file: Path, dtype: str, max_shard_size: str | None, overwrite: bool) -> None:
    if dtype not in GGUF_DTYPES:
        raise ConfigError(f"--dtype {dtype}: weights in GGUF are written in {', '.join(dict.fromkeys(GGUF_DTYPES))}")
    if max_shard_size is not None:
        raise ConfigError("--max-shard-size is of the published format; a GGUF model is one file")

    from dsv3.checkpoint.gguf import convert_gguf, save_gguf
    from dsv3.data.tokenizer import Tokenizer
    from dsv3.infer.loaded import load
    from dsv3.infer.model_folder import find_model

    found, kind = find_model(source), GGUF_DTYPES[dtype]
    if found.is_snapshot:
        tokenizer = None if found.tokenizer is None else Tokenizer.from_file(found.tokenizer)
        model = load(source, weights="fp32", device="cpu", plain=True).model
        save_gguf(model, file=file, kind=kind, tokenizer=tokenizer, overwrite=overwrite)
    else:
        convert_gguf(found.weights, file=file, kind=kind, overwrite=overwrite)
    typer.echo(f"{file}: {file.stat().st_size / 1e6:,.1f} MB of GGUF in {kind}, from {found.weights}")


def parse_dtype(text: str) -> str:
    """Return the long name of a type weights can be written in.

    Raises:
        ConfigError: another type.
    """
    if text not in DTYPES and text not in DTYPES.values():
        raise ConfigError(f"--dtype {text}: weights are written in bf16, fp32 or fp8")
    return DTYPES.get(text, text)


def parse_size(text: str) -> int:
    """Return the number of bytes that `text` stands for: a number with KB, MB, GB, KiB, MiB, GiB or nothing after it.

    Raises:
        ConfigError: it stands for none, or for less than one byte.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", text, flags=re.IGNORECASE)
    if match is None or match[2].upper() not in UNITS or float(match[1]) * UNITS[match[2].upper()] < 1:
        raise ConfigError(f"--max-shard-size {text}: give a size above zero, as 5GB, 500MB or 2GiB")
    return int(float(match[1]) * UNITS[match[2].upper()])
