"""Multi-head latent attention (report 2.1.1, eq. 1-11), expanded and absorbed.

Keys and values of a token come from one latent of `kv_lora_rank` numbers; with the rope key shared by all heads it is
all that a cache must keep: 512 + 64 numbers a token and layer in the published model.

Expanded form (training, prefill): the latent is projected up to keys and values of every head.
Absorbed form (decode): the up-projection moves to the query and the output instead, so that attention runs on the
cached latents themselves. Both give the same result; they differ in what they cost.
"""

from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dsv3.batch import TokenBatch
from dsv3.config import ModelConfig
from dsv3.model.interfaces import LatentCache
from dsv3.model.linear import Linear, RMSNorm
from dsv3.ops.attention import causal_attention, latent_attention
from dsv3.ops.rope import Rotation, rotate, softmax_scale


class LatentAttention(nn.Module):
    """Attention of one layer; parameters carry the published names."""

    def __init__(self, config: ModelConfig, *, layer: int) -> None:
        super().__init__()
        self.config = config
        self.layer = layer
        heads, hidden = config.num_attention_heads, config.hidden_size
        if config.q_lora_rank is None:
            self.q_proj = Linear(hidden, heads * config.qk_head_dim)
        else:
            self.q_a_proj = Linear(hidden, config.q_lora_rank)  # W^DQ
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, eps=config.rms_norm_eps)
            self.q_b_proj = Linear(config.q_lora_rank, heads * config.qk_head_dim)  # [W^UQ; W^QR] for each head
        self.kv_a_proj_with_mqa = Linear(hidden, config.kv_lora_rank + config.qk_rope_head_dim)  # [W^DKV; W^KR]
        self.kv_a_layernorm = RMSNorm(config.kv_lora_rank, eps=config.rms_norm_eps)
        self.kv_b_proj = Linear(config.kv_lora_rank, heads * (config.qk_nope_head_dim + config.v_head_dim))
        self.o_proj = Linear(heads * config.v_head_dim, hidden)
        self.scale = softmax_scale(config)

    def forward(
        self,
        hidden: Float[Tensor, "token hidden"],
        *,
        batch: TokenBatch,
        rotation: Rotation,
        cache: LatentCache | None,
    ) -> Float[Tensor, "token hidden"]:
        """Return u = W^O [o_1; ...; o_nh] (eq. 11) for every token; a cache is appended to, then attended to whole."""
        query_nope, query_rope = self.queries(hidden, rotation=rotation)
        latent, rope_key = self.compress(hidden, rotation=rotation)
        if cache is not None:
            cache.append(latent, rope_key=rope_key, layer=self.layer, batch=batch)
        if cache is None or _nothing_cached_before(batch):
            heads = self.attend_expanded(query_nope, query_rope, latent=latent, rope_key=rope_key, batch=batch)
        else:
            heads = self.attend_cached(query_nope, query_rope, batch=batch, cache=cache)
        return self.o_proj(heads.flatten(1))

    def queries(
        self, hidden: Float[Tensor, "token hidden"], *, rotation: Rotation
    ) -> tuple[Float[Tensor, "token head nope"], Float[Tensor, "token head rope"]]:
        """Return the two parts of every query head: without position, and rotated (eq. 6-9)."""
        if self.config.q_lora_rank is None:
            query = self.q_proj(hidden)
        else:
            # The norm over the latent is stated in report 4.2, not in eq. 6.
            query = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(hidden)))
        query = query.unflatten(-1, (self.config.num_attention_heads, -1))
        nope, rope = query.split([self.config.qk_nope_head_dim, self.config.qk_rope_head_dim], dim=-1)
        return nope, rotate(rope, rotation=rotation)

    def compress(
        self, hidden: Float[Tensor, "token hidden"], *, rotation: Rotation
    ) -> tuple[Float[Tensor, "token latent"], Float[Tensor, "token rope"]]:
        """Return what a cache keeps: the normed latent c^KV (eq. 1) and the rotated shared key k^R (eq. 3)."""
        compressed = self.kv_a_proj_with_mqa(hidden)
        latent, rope_key = compressed.split([self.config.kv_lora_rank, self.config.qk_rope_head_dim], dim=-1)
        # The norm covers the latent only, never the rope key (report 4.2).
        return self.kv_a_layernorm(latent), rotate(rope_key[:, None, :], rotation=rotation)[:, 0, :]

    def attend_expanded(
        self,
        query_nope: Float[Tensor, "token head nope"],
        query_rope: Float[Tensor, "token head rope"],
        *,
        latent: Float[Tensor, "token latent"],
        rope_key: Float[Tensor, "token rope"],
        batch: TokenBatch,
    ) -> Float[Tensor, "token head v"]:
        """Attend with keys and values of every head (eq. 2, 4, 5, 10), each sequence to itself."""
        heads = self.config.num_attention_heads
        key_value = self.kv_b_proj(latent).unflatten(-1, (heads, -1))
        key_nope, value = key_value.split([self.config.qk_nope_head_dim, self.config.v_head_dim], dim=-1)
        key = torch.cat((key_nope, rope_key[:, None, :].expand(-1, heads, -1)), dim=-1)
        query = torch.cat((query_nope, query_rope), dim=-1)
        return causal_attention(query, key=key, value=value, lengths=batch.lengths, scale=self.scale)

    def attend_cached(
        self,
        query_nope: Float[Tensor, "token head nope"],
        query_rope: Float[Tensor, "token head rope"],
        *,
        batch: TokenBatch,
        cache: LatentCache,
    ) -> Float[Tensor, "token head v"]:
        """Attend in the absorbed form to everything cached of each sequence, the new tokens included."""
        up = self.kv_b_proj.weight.unflatten(0, (self.config.num_attention_heads, -1))
        key_up, value_up = up.split([self.config.qk_nope_head_dim, self.config.v_head_dim], dim=1)  # W^UK, W^UV
        query_latent = torch.einsum("thn,hnc->thc", query_nope, key_up)
        outputs = []
        starts = batch.starts.tolist()
        for sequence, (start, end) in enumerate(pairwise(starts)):
            if start == end:
                continue
            positions = batch.positions[start:end]
            latent, rope_key = cache.rows(layer=self.layer, sequence=sequence, length=int(positions[-1]) + 1)
            outputs.append(
                latent_attention(
                    query_latent[start:end],
                    query_rope=query_rope[start:end],
                    latent=latent,
                    rope_key=rope_key,
                    positions=positions,
                    scale=self.scale,
                )
            )
        return torch.einsum("thc,hvc->thv", torch.cat(outputs), value_up)


def _nothing_cached_before(batch: TokenBatch) -> bool:
    """Whether every sequence of the batch starts at position 0, so that its own tokens are all there is to see."""
    firsts = batch.starts[:-1][batch.starts.diff() > 0]
    return not batch.positions[firsts.to(batch.positions.device)].any()
