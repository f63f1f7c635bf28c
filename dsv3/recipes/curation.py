"""Named preparations of a corpus: functions that return settings for `dsv3 data prepare`."""

import difflib
from collections.abc import Callable
from dataclasses import replace

from dsv3.config.curation import CurationConfig, QualityConfig
from dsv3.errors import ConfigError


def mixed() -> CurationConfig:
    """Prose, code and mathematics of any kind, each held to its own rules."""
    return CurationConfig(recipe="mixed")


def light() -> CurationConfig:
    """Text that is clean already: repaired, deduplicated and decontaminated, but not judged."""
    return replace(mixed(), recipe="light", quality=QualityConfig(enabled=False))


_RECIPES: dict[str, Callable[[], CurationConfig]] = {function.__name__: function for function in (mixed, light)}


def curation_names() -> tuple[str, ...]:
    """Return the names of all of them."""
    return tuple(_RECIPES)


def curation_by_name(name: str) -> CurationConfig:
    """Return a named one; a ConfigError names the nearest one there is."""
    if name not in _RECIPES:
        near = difflib.get_close_matches(name, _RECIPES, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"there are {', '.join(_RECIPES)}"
        raise ConfigError(f"unknown recipe '{name}'; {hint}")
    return _RECIPES[name]()
