"""What a grammar must offer so that decoding can obey it, drafts included. Grammars are made in `serve/grammar.py`."""

from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool


@runtime_checkable
class Constraint(Protocol):
    """The state of one request's grammar. It moves with the tokens, and back when drafts are turned down."""

    @property
    def finished(self) -> bool:
        """Whether the text is complete and nothing but the end token may follow."""
        ...

    def allowed(self, *, vocab_size: int) -> Bool[np.ndarray, " vocab"]:
        """Return which of `vocab_size` tokens may come next, the end token among them where the text may end."""
        ...

    def advance(self, token: int) -> bool:
        """Take one token; False, and no move, if the grammar does not allow it."""
        ...

    def roll_back(self, count: int) -> None:
        """Take back the last `count` tokens."""
        ...
