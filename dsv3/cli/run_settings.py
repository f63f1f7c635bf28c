"""Which run a command line means: its settings, and its folder."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import typer

from dsv3 import recipes
from dsv3.config import PretrainConfig, SourceConfig
from dsv3.config.files import read_config
from dsv3.config.override import apply_overrides
from dsv3.errors import ConfigError
from dsv3.runtime.log import get_logger

RecipeArgument = Annotated[
    str | None,
    typer.Argument(metavar="[RECIPE]", help=f"{', '.join(recipes.names())}; left out with --config, or to go on."),
]
MoreData = Annotated[list[str] | None, typer.Argument(hidden=True)]
RunOption = Annotated[
    Path | None, typer.Option("--run", metavar="FOLDER", help="Folder of the run; runs/RECIPE when left out.")
]
DataOption = Annotated[
    list[str] | None,
    typer.Option(
        "--data",
        metavar="PATH...",
        help="Text instead of the recipe's: files or folders of .txt .md .py .jsonl .jsonl.gz .parquet, or hf://NAME.",
    ),
]
ConfigOption = Annotated[
    Path | None, typer.Option("--config", metavar="FILE", help="Settings from the config.json of a run.")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="Change a setting, such as optim.learning_rate.peak=1e-3."),
]


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """What is to be run, and where."""

    config: PretrainConfig
    folder: Path


def run_settings(
    recipe: str | None,
    *,
    more_data: list[str] | None,
    run: Path | None,
    data: list[str] | None,
    config_file: Path | None,
    assignments: list[str] | None,
) -> RunSettings:
    """Return the settings of a recipe, of a file, or of the run already in `run`, changed as asked.

    `--data` takes several paths, and all but the first arrive as words of their own, in the place of a recipe where
    none is given.

    Raises:
        ConfigError: no recipe, two sources of settings, an unknown recipe or setting.
    """
    words = [*([recipe] if recipe else []), *(more_data or [])]
    recorded = None if run is None else run / "config.json"
    goes_on = recorded is not None and recorded.exists() and not (words and words[0] in recipes.names())
    if config_file is not None:
        base = read_config(config_file)
    elif words and not (goes_on and data):
        base = recipes.by_name(words.pop(0))
    elif goes_on and recorded is not None:
        base = read_config(recorded)
    else:
        raise ConfigError(
            f"which run? Give a recipe ({', '.join(recipes.names())}), --config FILE, or with --run the folder of a "
            "run that was started before"
        )
    if words and not data:
        both = f"both '{words[0]}' and --config" if config_file else f"'{words[0]}' after the recipe"
        raise ConfigError(f"{both} cannot be obeyed; text to train on is given as --data PATH")
    if data:
        sources = tuple(SourceConfig(path=_absolute(path)) for path in [*data, *words])
        base = replace(base, data=replace(base.data, sources=sources))
    config = apply_overrides(base, assignments=assignments or [])
    _mention_cut_schedule(config)
    return RunSettings(config=config, folder=run or Path("runs") / (config.recipe or "run"))


def _mention_cut_schedule(config: PretrainConfig) -> None:
    """Warn of a run that ends before its learning rate has come down: a shorter total_tokens moves nothing else."""
    end = config.optim.learning_rate.cosine_until_tokens
    if config.total_tokens < end:
        get_logger(__name__).warning(
            "total_tokens = %s ends the run before the learning rate has come down "
            "(optim.learning_rate.cosine_until_tokens = %s); the schedules are not scaled with it",
            f"{config.total_tokens:,}",
            f"{end:,}",
        )


def _absolute(path: str) -> str:
    """Return a path that means the same from any folder; `hf://` and `builtin://` names stay as they are."""
    return path if "://" in path else str(Path(path).expanduser().absolute())
