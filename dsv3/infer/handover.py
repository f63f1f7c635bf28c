"""A request that one engine reads and another continues: what goes over (report 3.4, prefill and decoding apart).

The latent cache goes page by page while the prompt is read on; what remains goes with the first token. Nothing of an
answer depends on where it is made: see docs/decisions/0008-deployment.md.
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class MtpHandover:
    """How far one MTP module has followed the request."""

    done: int
    """Positions whose entries are in step."""
    unread: Float[Tensor, "token hidden"] | None
    """States from position `done` on that the module is yet to read."""


@dataclass(frozen=True, kw_only=True)
class Handover:
    """All that is left to know of a request once its pages are there."""

    token: int
    """Drawn last: the first one that the other engine has to read."""
    num_computed: int
    """Positions with entries: prompt, and the tokens of `Request.answer_ids`."""
    mtp: tuple[MtpHandover, ...] = ()
    """By module; none where nothing is drafted."""


@runtime_checkable
class PageSink(Protocol):
    """The way to the engine that will continue a request."""

    @property
    def first_page(self) -> int:
        """The first page of the text that is lacking there; those before it are found in its prefix cache."""
        ...

    def send(self, entries: Float[Tensor, "layer page token entry"], *, first_page: int) -> None:
        """Send pages on their way, number `first_page` of the text and those that follow it. `entries` are a copy."""
        ...

    def finish(self, handover: Handover) -> None:
        """Send what remains. Nothing comes after it."""
        ...
