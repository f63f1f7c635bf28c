"""Named runs: functions that return a config. Imports no torch.

dsv3.recipes.tiny()               # the quickstart
dsv3.recipes.by_name("v3_671b")   # the published run
"""

import difflib
from collections.abc import Callable

from dsv3.config import PretrainConfig
from dsv3.errors import ConfigError
from dsv3.recipes.small import small
from dsv3.recipes.tiny import tiny
from dsv3.recipes.v2 import v3_16b, v3_236b
from dsv3.recipes.v3_671b import v3_671b

__all__ = ["by_name", "names", "small", "tiny", "v3_16b", "v3_236b", "v3_671b"]

_RECIPES: dict[str, Callable[[], PretrainConfig]] = {
    function.__name__: function for function in (tiny, small, v3_16b, v3_236b, v3_671b)
}


def names() -> tuple[str, ...]:
    """Return the names of all recipes, smallest model first."""
    return tuple(_RECIPES)


def by_name(name: str) -> PretrainConfig:
    """Return the config of a named recipe; a ConfigError names the nearest one there is."""
    if name not in _RECIPES:
        near = difflib.get_close_matches(name, _RECIPES, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"there are {', '.join(_RECIPES)}"
        raise ConfigError(f"unknown recipe '{name}'; {hint}")
    return _RECIPES[name]()
