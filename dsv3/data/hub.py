"""Datasets of the Hugging Face hub, read as a stream: `hf://OWNER/NAME`, `hf://OWNER/NAME?config=NAME&split=train`."""

from collections.abc import Iterator
from typing import Any
from urllib.parse import parse_qsl

from dsv3.data.document import Document, ReadingLog
from dsv3.data.record import read_record
from dsv3.errors import DataError, MissingExtraError

HUB = "hf://"
OPTIONS = ("config", "split")


def hub_documents(path: str, *, log: ReadingLog) -> Iterator[Document]:
    """Yield the records of a dataset as documents, as they arrive; nothing but the current ones is kept.

    Raises:
        MissingExtraError: `datasets` is not installed.
        DataError: the dataset cannot be opened, or breaks off.
    """
    name, _ = _read_path(path)
    for number, record in enumerate(open_hub(path), start=1):
        yield from read_record(record, name=f"{name}#{number}", log=log)


def open_hub(path: str) -> Iterator[Any]:
    """Yield the records of a dataset as they arrive. Raises as `hub_documents`."""
    name, options = _read_path(path)
    try:
        import datasets
    except ImportError as error:
        raise MissingExtraError(package="datasets", extra="data", purpose=f"reading {path}") from error
    try:
        yield from datasets.load_dataset(
            name, name=options.get("config"), split=options.get("split", "train"), streaming=True
        )
    except DataError:
        raise
    except Exception as error:  # The library raises dozens of classes, of its own and of those below it.
        raise DataError(
            f"cannot read {path} ({type(error).__name__}: {error}); check the name, the network, and that the split "
            "exists (hf://NAME?config=CONFIG&split=SPLIT), or download the dataset and give the folder"
        ) from error


def _read_path(path: str) -> tuple[str, dict[str, str]]:
    name, _, query = path.removeprefix(HUB).partition("?")
    options = dict(parse_qsl(query))
    unknown = [option for option in options if option not in OPTIONS]
    if unknown or not name:
        found = f"the option '{unknown[0]}'" if unknown else "no name"
        raise DataError(
            f"{path} has {found}; write hf://NAME?config=CONFIG&split=SPLIT, where both options may be left out"
        )
    return name, options
