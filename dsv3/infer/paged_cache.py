"""The latent cache in pages: all that decoding remembers of past tokens (report 2.1.1).

MLA keeps one normed latent and one roped key for each token and layer, shared by all heads: 576 numbers in V3, where
128 heads of ordinary attention would keep 40,960.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dsv3.batch import TokenBatch
from dsv3.config import ModelConfig


class PagedLatentCache:
    """Room for `num_pages` pages of every layer, those of `num_mtp_modules` MTP modules last."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        num_pages: int,
        page_tokens: int,
        num_mtp_modules: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        self.page_tokens = page_tokens
        self.latent_width = config.kv_lora_rank
        width = config.kv_lora_rank + config.qk_rope_head_dim
        layers = config.num_hidden_layers + num_mtp_modules
        self.storage = torch.zeros(layers, num_pages * page_tokens, width, dtype=dtype, device=device)

    def by_page(self) -> Float[Tensor, "layer page token entry"]:
        """Return a view of all of it, page by page."""
        return self.storage.unflatten(1, (-1, self.page_tokens))

    def bound_to(self, pages: Sequence[Sequence[int]], *, batch: TokenBatch) -> "BoundPages":
        """Return the cache as the model sees it in one pass: sequence i of `batch` has `pages[i]`."""
        return BoundPages(self, pages=pages, batch=batch)


class BoundPages:
    """A `LatentCache` for one batch, and for the batches that MTP modules make of it."""

    def __init__(self, cache: PagedLatentCache, *, pages: Sequence[Sequence[int]], batch: TokenBatch) -> None:
        self._cache = cache
        self._slots = [self._slots_of(table, end) for table, end in zip(pages, batch.ends, strict=True)]
        self._placed: tuple[TokenBatch, Int[Tensor, " token"]] | None = None

    def append(
        self,
        latent: Float[Tensor, "token latent"],
        *,
        rope_key: Float[Tensor, "token rope"],
        layer: int,
        batch: TokenBatch,
    ) -> None:
        """Keep the entries of all tokens of the batch, each at its own position."""
        entries = torch.cat([latent.detach(), rope_key.detach()], dim=-1).to(self._cache.storage.dtype)
        self._cache.storage[layer].index_copy_(0, self._places_of(batch), entries)

    def _places_of(self, batch: TokenBatch) -> Int[Tensor, " token"]:
        """Return where the batch's tokens go; the same for every layer, so it is worked out once a pass."""
        if self._placed is None or self._placed[0] is not batch:
            bounds = zip(self._slots, batch.firsts, batch.ends, strict=True)
            self._placed = (batch, torch.cat([slots[first:end] for slots, first, end in bounds]))
        return self._placed[1]

    def rows(
        self, *, layer: int, sequence: int, length: int
    ) -> tuple[Float[Tensor, "past latent"], Float[Tensor, "past rope"]]:
        """Return copies of the first `length` latents and rope keys of one sequence."""
        rows = self._cache.storage[layer].index_select(0, self._slots[sequence][:length])
        return rows[:, : self._cache.latent_width], rows[:, self._cache.latent_width :]

    def _slots_of(self, table: Sequence[int], end: int) -> Int[Tensor, " token"]:
        size, device = self._cache.page_tokens, self._cache.storage.device
        assert len(table) * size >= end, f"{len(table)} pages of {size} tokens do not reach position {end - 1}"
        slots = torch.tensor(table)[:, None] * size + torch.arange(size)
        return slots.flatten()[:end].to(device)
