"""Multi-token prediction (report 2.2, eq. 21-23): one more block that looks one token further ahead.

    h'_i = M [norm(Emb(t_{i+k})); norm(h^{k-1}_i)]        k-th module, reads the state before it and the next token
    h^k  = TRM(h'),  P(t_{i+k+1}) = OutHead(norm(h^k))

Embedding and output head are the main model's own. The released weights put the embedding first, the reverse of
eq. 21; `mtp_concat_order` says which order eh_proj was made for.
"""

from collections.abc import Generator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dsv3.config import ModelConfig
from dsv3.model.block import MoeBlock, parts_of, run_through
from dsv3.model.interfaces import Cut, Part, Routing, keep_whole
from dsv3.model.linear import Linear, RMSNorm


class MtpModule(nn.Module):
    """Module k (from 0) of the chain; its block is layer `num_hidden_layers + k` of the cache."""

    def __init__(self, config: ModelConfig, *, depth: int) -> None:
        super().__init__()
        self.config = config
        self.enorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.hnorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.eh_proj = Linear(2 * config.hidden_size, config.hidden_size)  # M_k
        self.block = MoeBlock(config, layer=config.num_hidden_layers + depth)
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)  # published as shared_head.norm

    def steps(
        self,
        hidden: Float[Tensor, "token hidden"],
        *,
        embedded: Float[Tensor, "token hidden"],
        cut: Cut = keep_whole,
        **given: Any,
    ) -> Generator[Part, None, tuple[Float[Tensor, "token hidden"], Routing]]:
        """Run the module as `MoeBlock.steps` runs a layer; return the block's output, before `norm`, and its routing.

        `hidden` is the state before this module, `embedded` the embedding of the token one further on; row by row
        they belong together (`TokenBatch.ahead`). What else a layer is given, positions above all, is that of `hidden`.
        """
        halves = (self.enorm(embedded), self.hnorm(hidden))
        if self.config.mtp_concat_order == "hidden_first":
            halves = (halves[1], halves[0])
        joined = self.eh_proj(torch.cat(halves, dim=-1))
        return (yield from parts_of(self.block, joined, cut=cut, **given))

    def forward(
        self, hidden: Float[Tensor, "token hidden"], **given: Any
    ) -> tuple[Float[Tensor, "token hidden"], Routing]:
        """Run the module as `steps` does, without stopping."""
        return run_through(self.steps(hidden, **given))
