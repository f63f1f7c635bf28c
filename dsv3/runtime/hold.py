"""A run folder held by one process at a time."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dsv3.errors import TrainingError


@contextmanager
def hold_folder(folder: Path, *, lock: str, doing: str, option: str = "--run") -> Iterator[None]:
    """Make the folder and hold it against other processes that ask for the same `lock` while the block runs.

    The lock is the kernel's: it goes with the process, however that ends. `doing` completes "another process is ...",
    `option` is what names another folder.

    Raises:
        TrainingError: the folder cannot be written, or another process holds it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / lock).open("a")
    except OSError as error:
        raise TrainingError(
            f"cannot write to the run folder {folder}: {error.strerror}; choose another with {option} FOLDER, or make "
            "this one writable"
        ) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise TrainingError(
                f"another process is {doing} in {folder}; wait for it, stop it, or choose another folder with {option}"
            ) from error
        yield
