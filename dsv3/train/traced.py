"""What a training step saw, found again from its number: rows are a pure function of the settings and the corpus."""

from collections.abc import Iterator
from pathlib import Path

from dsv3.config import PretrainConfig
from dsv3.config.files import read_config
from dsv3.data.loader import Location, RowLoader
from dsv3.data.prepared import load_prepared
from dsv3.errors import ConfigError
from dsv3.train.schedule import batch_sequences, total_steps


def rows_of_step(run: Path, *, step: int) -> Iterator[tuple[int, list[Location]]]:
    """Yield the number of every row of an optimizer step, and what lies in it from left to right.

    Raises:
        ConfigError: the run has no such step, or the folder is none of a run.
        DataError: its corpus is missing or damaged.
    """
    config = read_config(run / "config.json")
    if step > (steps := total_steps(config)):
        raise ConfigError(f"step {step} was asked for; the run in {run} has {steps:,}")
    loader = RowLoader(
        load_prepared(run / "corpus"),
        config=config,
        sequence_length=config.batch.sequence_length,
        seed=config.runtime.seed,
    )
    for row in step_rows(config, step=step):
        yield row, loader.locate(row)


def step_rows(config: PretrainConfig, *, step: int) -> range:
    """Return the numbers of the rows of an optimizer step, counted from 1."""
    first = 0
    for _ in range(step - 1):
        first += batch_sequences(config.batch, tokens=first * config.batch.sequence_length)
    return range(first, first + batch_sequences(config.batch, tokens=first * config.batch.sequence_length))
