"""Published checkers, loaded by themselves: their package takes eight seconds to import."""

import importlib.metadata
import importlib.util
import sys
import types
import warnings
from functools import cache
from pathlib import Path

import pytest
import yaml


@cache
def harness() -> Path:
    """Folder of the tasks of lm-eval; tests that need it skip without it."""
    found = importlib.util.find_spec("lm_eval")
    if found is None:
        pytest.skip("needs lm-eval (pip install dsv3[eval])")
    return Path(found.origin).parent / "tasks"


@cache
def published(name):
    """Load `lm_eval.tasks.NAME` without its package, such as 'ifeval.instructions'."""
    folder = name.rpartition(".")[0]
    packages = {"lm_eval": [], "lm_eval.tasks": [], f"lm_eval.tasks.{folder}": [str(harness() / folder)]}
    before = set(sys.modules)
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for package, path in packages.items():
            stub = types.ModuleType(package)
            stub.__path__ = path
            patch.setitem(sys.modules, package, stub)
        if folder == "ifeval":
            patch.setattr(pytest.importorskip("nltk").data, "find", lambda *_: None)  # Else it begins a download.
        # It wants another release of a parser, for a function that we leave alone.
        real = importlib.metadata.version
        patch.setattr(importlib.metadata, "version", lambda one: "4.11" if one.startswith("antlr4") else real(one))
        module = importlib.import_module(f"lm_eval.tasks.{name}")
    for loaded in {one for one in sys.modules if one.startswith("lm_eval.")} - before:
        del sys.modules[loaded]
    return module


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
    """YAML whose functions are left as their names."""


_Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))


def published_settings(path):
    """Return the settings of a task of lm-eval."""
    return yaml.load((harness() / path).read_text(encoding="utf-8"), Loader=_Loader)
