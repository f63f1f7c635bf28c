"""dsv3 convert: weights between programs, types and folders."""

import re
from pathlib import Path
from typing import Annotated

import typer

from dsv3.errors import ConfigError

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp8": "float8_e4m3fn"}
UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def register(app: typer.Typer) -> None:
    """Add the verb to the command line."""
    app.command("convert")(convert)


def convert(
    source: Annotated[
        Path,
        typer.Argument(metavar="SOURCE", help="A run folder, an export, or published weights (BF16, FP32 or FP8)."),
    ],
    destination: Annotated[Path, typer.Argument(metavar="DESTINATION", help="The folder to write.")],
    dtype: Annotated[
        str, typer.Option(help="Type of the written weights: bf16, fp32 or fp8, the released format.")
    ] = "bf16",
    max_shard_size: Annotated[str, typer.Option(help="Size of one weight file, as 5GB or 500MB.")] = "5GB",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace DESTINATION even if something else is in it.")
    ] = False,
) -> None:
    """Write a model in the published format, which transformers, serving engines and dsv3 itself read.

    Of a run, the finished export is taken, else the newest snapshot. Weights saved by transformers or released in FP8
    come out complete: with the fields in config.json that other programs need. FP8 is E4M3 with a multiplier for each
    block of 128 x 128, for the matrices of layers; embedding, head, norms and routers stay in BF16. What is stored so
    already keeps its bytes.
    """
    type_name = parse_dtype(dtype)
    max_shard_bytes = parse_size(max_shard_size)

    import torch

    from dsv3.checkpoint.published import convert_published, save_published
    from dsv3.infer.loaded import load
    from dsv3.infer.model_folder import find_model

    found = find_model(source)
    kind = getattr(torch, type_name)
    if found.is_snapshot:
        model = load(source, weights="fp32", device="cpu", plain=True).model
        save_published(
            model,
            folder=destination,
            tokenizer_folder=None if found.tokenizer is None else found.tokenizer.parent,
            dtype=kind,
            max_shard_bytes=max_shard_bytes,
            overwrite=overwrite,
        )
    else:
        convert_published(
            found.weights, folder=destination, dtype=kind, max_shard_bytes=max_shard_bytes, overwrite=overwrite
        )
    files = sorted(destination.glob("*.safetensors"))
    size = sum(file.stat().st_size for file in files)
    typer.echo(
        f"{destination}: {size / 1e6:,.1f} MB of {type_name} weights in {len(files)} files, from {found.weights}"
    )


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
