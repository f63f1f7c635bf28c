"""Ranks that share experts go in step: each round they agree on the pass that they all run next.

A rank is an engine of its own, which runs passes of the main model and of the MTP modules as its requests need them;
but no pass can be run without the others, who have some of its experts. So before each pass every rank says what it
wants, and the first of these in a fixed order is run: MTP modules, then the main model. Whoever wants something else
takes part without tokens of its own, and asks again. No rank waits for ever: a pass that is wanted comes next when
all others want nothing, or the same, or something that comes after it; and what comes before it ends, for the steps
of an engine do.

A rank without work takes part as long as another one has some. To begin, all are woken: with each new request they are
told the same number, and they go on until all of them want nothing and have heard the same one.

Source: the report leaves out how idle ranks take part (3.4); this is ours.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist

from dsv3.errors import RankLostError

NOTHING = 1 << 30
"""To want no pass at all."""


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What one rank says before a pass."""

    kind: int = NOTHING
    """Pass that it wants; the lowest is run."""
    tokens: int = 0
    """That it has for it."""
    woken: int = 0
    """The newest number that it was woken with."""
    order: int = 0
    """What all are to do first; only rank 0 gives orders."""
    is_busy: bool = False
    """Whether it must not sleep, though it wants nothing."""


@dataclass(frozen=True, kw_only=True)
class Round:
    """What all have said."""

    wishes: tuple[Wish, ...]
    """By rank."""

    @property
    def kind(self) -> int:
        """The pass that is run."""
        return min(wish.kind for wish in self.wishes)

    @property
    def most_tokens(self) -> int:
        """Of the rank that has most in this pass."""
        return max(wish.tokens for wish in self.wishes if wish.kind == self.kind)

    @property
    def order(self) -> int:
        """What rank 0 wants to be done."""
        return self.wishes[0].order

    @property
    def is_last(self) -> bool:
        """Whether nobody wants anything, and all know that nobody does."""
        is_quiet = not any(wish.kind != NOTHING or wish.order or wish.is_busy for wish in self.wishes)
        return is_quiet and len({wish.woken for wish in self.wishes}) == 1


def meet(wish: Wish, *, group: dist.ProcessGroup) -> Round:
    """Tell all ranks of a group what this one wants, and return what they want.

    Raises:
        RankLostError: one of them does not answer.
    """
    mine = torch.tensor([wish.kind, wish.tokens, wish.woken, wish.order, wish.is_busy])
    said = torch.empty(group.size(), len(mine), dtype=mine.dtype)
    try:
        dist.all_gather(list(said), mine, group=group)
    except RuntimeError as error:
        raise RankLostError(f"a rank that shares experts with this one has gone: {error}") from error
    return Round(
        wishes=tuple(
            Wish(kind=kind, tokens=tokens, woken=woken, order=order, is_busy=bool(is_busy))
            for kind, tokens, woken, order, is_busy in said.tolist()
        )
    )
