"""dsv3: the whole DeepSeek-V3 system as one package.

    model = dsv3.load("runs/quickstart")        # a run, an export or a published checkpoint
    model.logits([1, 2, 3])                     # float32 [token, vocab]
    model.generate("Once upon a time")
    dsv3.recipes.tiny()                         # a PretrainConfig
    dsv3.TokenBatch                             # what every forward pass eats

Names are looked up on first use, so that `import dsv3` costs nothing and `dsv3.recipes` needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dsv3 import recipes
    from dsv3.batch import TokenBatch
    from dsv3.infer.loaded import load

__all__ = ["TokenBatch", "__version__", "load", "recipes"]

__version__ = "0.1.0"

_LOCATIONS = {"TokenBatch": "dsv3.batch", "load": "dsv3.infer.loaded"}


def __getattr__(name: str) -> Any:
    if name == "recipes":
        return import_module("dsv3.recipes")
    if name in _LOCATIONS:
        return getattr(import_module(_LOCATIONS[name]), name)
    raise AttributeError(f"module 'dsv3' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return __all__
