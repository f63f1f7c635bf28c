"""The engine's model on a CPU: one C++ call a pass, weights in the format they are kept in.

A token's numbers depend on its past alone, to the last bit: see docs/decisions/0005-engine.md.
"""

import ctypes
import math
import weakref
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, chain

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from dsv3.batch import TokenBatch
from dsv3.config import ModelConfig
from dsv3.infer.packed_model import PackedModel
from dsv3.infer.runner import States
from dsv3.native import engine
from dsv3.ops.norm import rms_norm
from dsv3.ops.rope import rope_amplitude, rope_frequencies, rotation_at

_SLACK = 256
"""Numbers after the last page that whole vectors may reach into."""
_FEWEST_ANGLES = 4096


class PackedRunner:
    """A `Runner` over a `PackedModel`. Sums are in FP32 throughout, and so is the latent cache."""

    def __init__(self, model: PackedModel) -> None:
        self.model = model
        self._record, self._layers = model.record()
        self._engine = ctypes.c_void_p(engine.library().engine_new())
        weakref.finalize(self, engine.library().engine_delete, self._engine)
        self._frequencies = rope_frequencies(model.config)
        self._cos = self._sin = torch.empty(0, model.config.qk_rope_head_dim // 2)
        self._cache = torch.empty(0)
        self._page_tokens = 0
        self._num_pages = 0

    @property
    def config(self) -> ModelConfig:
        """The architecture."""
        return self.model.config

    @property
    def num_mtp_modules(self) -> int:
        """MTP modules that can draft here."""
        return self.model.num_mtp_modules

    @property
    def device(self) -> torch.device:
        """Where it computes: on the CPU."""
        return torch.device("cpu")

    @property
    def _width(self) -> int:
        return self.config.kv_lora_rank + self.config.qk_rope_head_dim

    @property
    def bytes_per_token(self) -> int:
        """Bytes of latent cache that one token takes, over all layers, MTP modules included."""
        return self._width * len(self.model.layers) * torch.float32.itemsize

    def make_pages(self, *, num_pages: int, page_tokens: int) -> None:
        """Make room for the latent cache, in place of what was there."""
        self._num_pages, self._page_tokens = num_pages, page_tokens
        # Zeros, since whole tiles of keys are read: what lies there must be numbers. numpy's, because it leaves them to
        # the system, which gives each page of memory when it is first used; torch would write them all now.
        size = len(self.model.layers) * num_pages * page_tokens * self._width + 4 * self._width + _SLACK
        self._cache = torch.from_numpy(np.zeros(size, dtype=np.float32))

    def forward(self, batch: TokenBatch, *, pages: Sequence[Sequence[int]], with_experts: bool = False) -> States:
        """Read tokens through the main model, and say if asked where they went."""
        hidden = self.model.embedding.index_select(0, batch.tokens).float()
        layers, chosen = self.config.num_hidden_layers, self.config.num_experts_per_tok
        with_experts = with_experts and self.config.num_moe_layers > 0
        experts = torch.zeros(layers, len(hidden), chosen, dtype=torch.int32) if with_experts else None
        normed = self._run(hidden, batch=batch, pages=pages, layers=(0, layers), norm=self.model.norm, experts=experts)
        states = self._states(hidden, normed)
        if experts is None:
            return states
        return replace(states, experts=experts[layers - self.config.num_moe_layers :].transpose(0, 1))

    def predict_ahead(
        self, state: Float[Tensor, "token hidden"], *, depth: int, batch: TokenBatch, pages: Sequence[Sequence[int]]
    ) -> States:
        """Run MTP module `depth` on the states before it; `batch` has, in each place, the token one further on."""
        module, eps = self.model.mtp[depth], self.config.rms_norm_eps
        embedded = self.model.embedding.index_select(0, batch.tokens).float()
        halves = [
            rms_norm(embedded, weight=module.vectors["enorm"], eps=eps),
            rms_norm(state, weight=module.vectors["hnorm"], eps=eps),
        ]
        hidden = module.eh_proj(torch.cat(halves, dim=1)).contiguous()
        layer = self.config.num_hidden_layers + depth
        normed = self._run(hidden, batch=batch, pages=pages, layers=(layer, layer + 1), norm=module.vectors["norm"])
        return self._states(hidden, normed)

    def logits(self, hidden: Float[Tensor, "token hidden"]) -> Float[Tensor, "token vocab"]:
        """Return FP32 logits."""
        return self.model.head(hidden)

    def read_pages(self, pages: Sequence[int]) -> Float[Tensor, "layer page token entry"]:
        """Return a copy of what pages hold, layers of MTP modules last."""
        return self._by_page()[:, torch.tensor(pages)]

    def write_pages(self, pages: Sequence[int], *, entries: Float[Tensor, "layer page token entry"]) -> None:
        """Put into pages what `read_pages` of the same model gave elsewhere."""
        self._by_page()[:, torch.tensor(pages)] = entries

    def _by_page(self) -> Float[Tensor, "layer page token entry"]:
        shape = (len(self.model.layers), self._num_pages, self._page_tokens, self._width)
        return self._cache[: math.prod(shape)].view(shape)

    def _states(self, hidden: Tensor, normed: Tensor) -> States:
        return States(hidden=normed, handed_on=normed if self.config.mtp_hidden_source == "post_norm" else hidden)

    def _run(
        self,
        hidden: Tensor,
        *,
        batch: TokenBatch,
        pages: Sequence[Sequence[int]],
        layers: tuple[int, int],
        norm: Tensor,
        experts: Tensor | None = None,
    ) -> Tensor:
        """Run layers over `hidden`, which is changed, and return it normed; write into `experts` where tokens went."""
        cos, sin = self._angles(batch.positions)
        page_starts = torch.tensor([0, *accumulate(map(len, pages))])
        page_list = torch.tensor(list(chain.from_iterable(pages)))
        normed = torch.empty_like(hidden)
        todo = engine.Pass(
            first_layer=layers[0],
            end_layer=layers[1],
            tokens=hidden.shape[0],
            sequences=len(pages),
            hidden=hidden.data_ptr(),
            normed=normed.data_ptr(),
            last_norm=norm.data_ptr(),
            cos=cos.data_ptr(),
            sin=sin.data_ptr(),
            positions=batch.positions.data_ptr(),
            starts=batch.starts.data_ptr(),
            page_starts=page_starts.data_ptr(),
            pages=page_list.data_ptr(),
            cache=self._cache.data_ptr(),
            num_pages=self._num_pages,
            page_tokens=self._page_tokens,
            experts=None if experts is None else experts.data_ptr(),
        )
        engine.library().engine_forward(self._engine, ctypes.byref(self._record), ctypes.byref(todo))
        return normed

    def _angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosine and sine of every token's angles, from a table that grows with the positions seen."""
        needed = int(positions.max()) + 1
        if needed > len(self._cos):
            table = rotation_at(
                torch.arange(max(2 * needed, _FEWEST_ANGLES)),
                frequencies=self._frequencies,
                amplitude=rope_amplitude(self.config),
            )
            self._cos, self._sin = table.cos.contiguous(), table.sin.contiguous()
        return self._cos.index_select(0, positions), self._sin.index_select(0, positions)
