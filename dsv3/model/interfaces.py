"""The two seams of the model, and the records that cross them.

`LatentCache` is what serving plugs in (dsv3/infer/paged_cache.py); without one the model trains.
`TokenDispatch` is what expert parallelism plugs in; on one device it is `model/moe.py: LocalDispatch`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor

from dsv3.batch import TokenBatch


class Part(StrEnum):
    """The parts of a layer that a pipeline tells apart, to weave those of two chunks (report 3.2.1)."""

    ATTENTION = "ATTN"
    """With norms and the router; in a dense layer all of it."""
    DISPATCH = "DISPATCH"
    EXPERTS = "MLP"
    COMBINE = "COMBINE"
    """With the shared experts."""
    HEAD = "HEAD"
    """The final norms. No chunk stops after them; they only are pieces of the backward pass by themselves."""


Cut = Callable[[Any, Part], Any]
"""Ends a piece of the backward pass, which bears the name of a part: takes what the piece has made, a tensor or a
record of tensors, and returns what goes on from there. `keep_whole` cuts nothing.

Whatever is made before a cut and read after it must go over it, or a piece would be run twice."""


def keep_whole(made: Any, part: Part) -> Any:
    """Return what was made: the backward pass is one piece."""
    del part
    return made


@dataclass(frozen=True, kw_only=True)
class Routing:
    """What a router decided for each token. Expert load is read from here, never left lying in a module."""

    experts: Int[Tensor, "token chosen"]
    """Chosen experts, best biased score first."""
    gates: Float[Tensor, "token chosen"]
    """Their gate values, scaled by `routed_scaling_factor`."""
    affinity: Float[Tensor, "token expert"]
    """Unbiased scores s of all experts (FP32), with gradient: what the balance losses of eq. 17-20 are made of."""
    load: Int[Tensor, " expert"]
    """Tokens sent to each expert."""


@dataclass(frozen=True, kw_only=True)
class DispatchedTokens:
    """Token copies in the order the experts want them, and what `combine` needs to bring them home."""

    rows: Float[Tensor, "row hidden"]
    """One copy for each (token, expert) pair computed here, grouped by expert in rising order."""
    rows_per_expert: list[int]
    """Rows of each expert held here."""
    gates: Float[Tensor, " row"]
    """Gate value of each row; experts apply it before their down projection, as the report's kernels do."""
    source: Int[Tensor, " row"]
    """Token that each row is a copy of."""
    origin: Int[Tensor, "token chosen"]
    """Row that holds each (token, choice) pair: the inverse of `source`."""
    gathered_here: bool
    """Whether `rows` are `tokens[source]` of this device, so that they need not be kept for the backward pass."""


@runtime_checkable
class TokenDispatch(Protocol):
    """Brings tokens to experts and their outputs back (report 3.2.2).

    Each way is begun by one call and ended by another, so that something else can be computed while rows travel. What
    is handed from call to call is the dispatch's own affair, but for `DispatchedTokens`.
    """

    def announce(self, tokens: Float[Tensor, "token hidden"], *, routing: Routing) -> Any:
        """Begin to tell the ranks of the chosen experts how many rows they will get."""
        ...

    def send(self, announced: Any) -> Any:
        """Begin to send a copy of each token to the experts chosen for it."""
        ...

    def receive(self, sent: Any) -> DispatchedTokens:
        """Return what has come for the experts held here."""
        ...

    def send_back(self, outputs: Float[Tensor, "row hidden"], *, dispatched: DispatchedTokens) -> Any:
        """Begin to send the experts' outputs home; the gates are already in them."""
        ...

    def receive_back(self, returning: Any) -> Float[Tensor, "token hidden"]:
        """Return for each token the sum of its experts' outputs."""
        ...


@runtime_checkable
class LatentCache(Protocol):
    """Keys and values of past tokens as MLA keeps them: a normed latent and a roped key, shared by all heads.

    `layer` counts the blocks of the main model from 0; MTP module k is layer `num_hidden_layers + k`.
    `sequence` is the index of a sequence within the batch at hand; which request that is, is the cache's affair.
    """

    def append(
        self,
        latent: Float[Tensor, "token latent"],
        *,
        rope_key: Float[Tensor, "token rope"],
        layer: int,
        batch: TokenBatch,
    ) -> None:
        """Keep the entries of all tokens of the batch, each at its own position."""
        ...

    def rows(
        self, *, layer: int, sequence: int, length: int
    ) -> tuple[Float[Tensor, "past latent"], Float[Tensor, "past rope"]]:
        """Return the first `length` entries of one sequence."""
        ...


@dataclass(frozen=True, kw_only=True)
class MtpOutput:
    """What one MTP module returns."""

    batch: TokenBatch
    """The tokens it read and the targets it is to predict: one further on than its predecessor's."""
    hidden: Float[Tensor, "token hidden"]
    """After the module's own final norm: what the shared output head eats."""
    before_norm: Float[Tensor, "token hidden"]


@dataclass(frozen=True, kw_only=True)
class ModelOutput:
    """What a forward pass returns. Logits are not in it: `Transformer.logits(hidden)` makes those that are wanted."""

    hidden: Float[Tensor, "token hidden"]
    """After the final norm: what the output head eats. Where the last layers did not run, the same as `before_norm`."""
    before_norm: Float[Tensor, "token hidden"]
    """What the next layer would read."""
    mtp: tuple[MtpOutput, ...]
    """One entry for each MTP module that ran."""
    routings: tuple[Routing, ...]
    """One for each MoE block in order, MTP modules last; the order of `Transformer.routers()`."""
    routed_batches: tuple[TokenBatch, ...]
    """The batch each of `routings` was made for: an MTP module sees one token a sequence fewer."""
