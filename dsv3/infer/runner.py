"""What the engine needs of a model: three calls over a paged latent cache.

`TorchRunner` (below) serves every device and type with the very model that trains. `infer/packed_runner.py` computes
the same on a CPU from weights laid out for it, in FP32 or fewer bits.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dsv3.batch import TokenBatch
from dsv3.config import ModelConfig
from dsv3.infer.paged_cache import BoundPages, PagedLatentCache
from dsv3.model.transformer import Transformer


@dataclass(frozen=True, kw_only=True)
class States:
    """What a pass leaves of each token."""

    hidden: Float[Tensor, "token hidden"]
    """After the final norm: what the output head eats."""
    handed_on: Float[Tensor, "token hidden"]
    """What the next MTP module reads, by `mtp_hidden_source`."""
    experts: Int[Tensor, "token layer chosen"] | None = None
    """Where tokens went in each layer that has experts, if that was asked; on the CPU."""


@runtime_checkable
class Runner(Protocol):
    """A model with room for `num_pages` pages of latent cache.

    A batch holds pieces of sequences laid end to end; each piece has consecutive positions and goes on where its pages
    are filled up to. `pages[i]` lists the pages of the i-th piece, the one with positions 0 to page_tokens - 1 first;
    it reaches at least to the piece's last position. An entry that is already there is replaced. Pages start with
    anything in them: what has not been written for a sequence is never read for it.
    """

    @property
    def config(self) -> ModelConfig:
        """The architecture."""
        ...

    @property
    def num_mtp_modules(self) -> int:
        """MTP modules that can draft here."""
        ...

    @property
    def device(self) -> torch.device:
        """Where it computes, and states lie."""
        ...

    @property
    def bytes_per_token(self) -> int:
        """Bytes of latent cache that one token takes, over all layers, MTP modules included."""
        ...

    def make_pages(self, *, num_pages: int, page_tokens: int) -> None:
        """Make room for the latent cache, in place of what was there."""
        ...

    def forward(self, batch: TokenBatch, *, pages: Sequence[Sequence[int]], with_experts: bool = False) -> States:
        """Read tokens through the main model, and say if asked where they went."""
        ...

    def predict_ahead(
        self, state: Float[Tensor, "token hidden"], *, depth: int, batch: TokenBatch, pages: Sequence[Sequence[int]]
    ) -> States:
        """Run MTP module `depth` on the states before it; `batch` has, in each place, the token one further on.

        Positions are those of `state`. Its entries lie in the same pages, in a layer of their own.
        """
        ...

    def logits(self, hidden: Float[Tensor, "token hidden"]) -> Float[Tensor, "token vocab"]:
        """Return FP32 logits of the rows asked for, on the CPU."""
        ...

    def read_pages(self, pages: Sequence[int]) -> Float[Tensor, "layer page token entry"]:
        """Return a copy of what pages hold, layers of MTP modules last, on the CPU."""
        ...

    def write_pages(self, pages: Sequence[int], *, entries: Float[Tensor, "layer page token entry"]) -> None:
        """Put into pages what `read_pages` of the same model gave elsewhere."""
        ...


class TorchRunner:
    """The model that trains, used: any device, any type that it computes in."""

    def __init__(self, model: Transformer) -> None:
        self._model = model
        self._precision = model.stored_precision()
        self._cache: PagedLatentCache | None = None

    @property
    def config(self) -> ModelConfig:
        """The architecture."""
        return self._model.config

    @property
    def num_mtp_modules(self) -> int:
        """MTP modules that can draft here."""
        return len(self._model.mtp)

    @property
    def bytes_per_token(self) -> int:
        """Bytes of latent cache that one token takes, over all layers, MTP modules included."""
        width = self.config.kv_lora_rank + self.config.qk_rope_head_dim
        layers = self.config.num_hidden_layers + self.num_mtp_modules
        return width * layers * self._model.embed_tokens.weight.dtype.itemsize

    def make_pages(self, *, num_pages: int, page_tokens: int) -> None:
        """Make room for the latent cache, in place of what was there."""
        weight = self._model.embed_tokens.weight
        self._cache = PagedLatentCache(
            self.config,
            num_pages=num_pages,
            page_tokens=page_tokens,
            num_mtp_modules=self.num_mtp_modules,
            dtype=weight.dtype,
            device=weight.device,
        )

    def forward(self, batch: TokenBatch, *, pages: Sequence[Sequence[int]], with_experts: bool = False) -> States:
        """Read tokens through the main model, and say if asked where they went."""
        output = self._model(batch.to(self.device), cache=self._bound(batch, pages=pages), precision=self._precision)
        states = self._states(output.hidden, before_norm=output.before_norm)
        if not (with_experts and output.routings):
            return states
        return replace(states, experts=torch.stack([one.experts for one in output.routings], dim=1).cpu())

    def predict_ahead(
        self, state: Float[Tensor, "token hidden"], *, depth: int, batch: TokenBatch, pages: Sequence[Sequence[int]]
    ) -> States:
        """Run MTP module `depth` on the states before it; `batch` has, in each place, the token one further on."""
        output, _ = self._model.predict_ahead(
            state,
            depth=depth,
            batch=batch.to(self.device),
            cache=self._bound(batch, pages=pages),
            precision=self._precision,
        )
        return self._states(output.hidden, before_norm=output.before_norm)

    def logits(self, hidden: Float[Tensor, "token hidden"]) -> Float[Tensor, "token vocab"]:
        """Return logits of the rows asked for, in FP32 at least, on the CPU."""
        return self._model.logits(hidden).cpu()

    def read_pages(self, pages: Sequence[int]) -> Float[Tensor, "layer page token entry"]:
        """Return a copy of what pages hold, layers of MTP modules last, on the CPU."""
        assert self._cache is not None, "make_pages comes first"
        return self._cache.by_page()[:, torch.tensor(pages)].cpu()

    def write_pages(self, pages: Sequence[int], *, entries: Float[Tensor, "layer page token entry"]) -> None:
        """Put into pages what `read_pages` of the same model gave elsewhere."""
        assert self._cache is not None, "make_pages comes first"
        self._cache.by_page()[:, torch.tensor(pages)] = entries.to(self.device)

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self._model.embed_tokens.weight.device

    def _bound(self, batch: TokenBatch, *, pages: Sequence[Sequence[int]]) -> BoundPages:
        assert self._cache is not None, "make_pages comes first"
        return self._cache.bound_to(pages, batch=batch)

    def _states(self, hidden: Tensor, *, before_norm: Tensor) -> States:
        return States(hidden=hidden, handed_on=hidden if self.config.mtp_hidden_source == "post_norm" else before_norm)
