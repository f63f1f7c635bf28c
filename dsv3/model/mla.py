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
from dsv3.config import KEEP_ALL, ModelConfig, RecomputeConfig
from dsv3.fp8.recipe import AFTER_ATTENTION
from dsv3.model.interfaces import LatentCache
from dsv3.model.linear import Linear, RMSNorm
from dsv3.model.precision import ORIGINAL, Precision
from dsv3.ops.attention import expanded_attention, latent_attention
from dsv3.ops.recompute import made_again
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
        recompute: RecomputeConfig = KEEP_ALL,
        precision: Precision = ORIGINAL,
    ) -> Float[Tensor, "token hidden"]:
        """Return u = W^O [o_1; ...; o_nh] (eq. 11) for every token; a cache is appended to, then attended to whole."""
        before_query, before_latent, rope_key = self.compress(hidden, precision=precision)
        query = self.queries(before_query, recompute=recompute, precision=precision)
        if batch.shared is not None:  # of rows whose other tokens are on other ranks
            both = batch.shared.gather(torch.cat((before_latent, rope_key), dim=-1))
            before_latent, rope_key = both.split([before_latent.shape[1], rope_key.shape[1]], dim=-1)
        latent = self.kv_a_layernorm(before_latent)
        if cache is not None:
            turned = rotate(rope_key[:, None, :], rotation=rotation)[:, 0, :]
            cache.append(latent, rope_key=turned, layer=self.layer, batch=batch)
        if cache is not None and any(batch.firsts):
            attended = self.attend_cached(query, batch=batch, rotation=rotation, cache=cache, precision=precision)
            return precision.products(attended.flatten(1), self.o_proj.weight, site=AFTER_ATTENTION)[0]

        with made_again((latent, lambda: self.kv_a_layernorm(before_latent)), when=recompute.norms):
            key_value = self.keys_and_values(latent, precision=precision)
        from_latents = [
            (key_value, lambda: self.keys_and_values(self.kv_a_layernorm(before_latent), precision=precision))
        ]
        if self.config.q_lora_rank is not None:
            from_latents.append((query, lambda: self.queries(before_query, precision=precision)))
        kept = made_again(*from_latents, when=recompute.up_projections, outputs=precision.keeps_less)
        with kept as forget:
            heads = self.attend_expanded(query, key_value=key_value, rope_key=rope_key, batch=batch, rotation=rotation)
            return precision.output_projection(heads, weight=self.o_proj.weight, forget=forget)

    def compress(
        self, hidden: Float[Tensor, "token hidden"], *, precision: Precision = ORIGINAL
    ) -> tuple[Float[Tensor, "token query_latent"], Float[Tensor, "token latent"], Float[Tensor, "token rope"]]:
        """Return c^Q (eq. 6) and c^KV (eq. 1) before their norms, and the shared key k^R before its rotation (eq. 3).

        The norm covers the latent only, never the rope key (report 4.2). Without query compression, c^Q is `hidden`.
        """
        down = self.kv_a_proj_with_mqa.weight
        if self.config.q_lora_rank is None:
            query, (compressed,) = hidden, precision.products(hidden, down)
        else:
            query, compressed = precision.products(hidden, self.q_a_proj.weight, down)
        latent, rope_key = compressed.split([self.config.kv_lora_rank, self.config.qk_rope_head_dim], dim=-1)
        return query, latent, rope_key

    def queries(
        self,
        compressed: Float[Tensor, "token query_latent"],
        *,
        recompute: RecomputeConfig = KEEP_ALL,
        precision: Precision = ORIGINAL,
    ) -> Float[Tensor, "token head qk"]:
        """Return every query head from what `compress` returned first (eq. 7-8).

        A head is its part without position, then the part that is yet to be rotated.
        """
        if self.config.q_lora_rank is None:
            (query,) = precision.products(compressed, self.q_proj.weight)
        else:
            # The norm over the latent is stated in report 4.2, not in eq. 6.
            latent = self.q_a_layernorm(compressed)
            with made_again((latent, lambda: self.q_a_layernorm(compressed)), when=recompute.norms):
                (query,) = precision.products(latent, self.q_b_proj.weight)
        return query.unflatten(-1, (self.config.num_attention_heads, -1))

    def keys_and_values(
        self, latent: Float[Tensor, "token latent"], *, precision: Precision = ORIGINAL
    ) -> Float[Tensor, "token head nope_and_v"]:
        """Return for every head its key without position, then its value, from the normed latent (eq. 2, 5)."""
        (joined,) = precision.products(latent, self.kv_b_proj.weight)
        return joined.unflatten(-1, (self.config.num_attention_heads, -1))

    def attend_expanded(
        self,
        query: Float[Tensor, "token head qk"],
        *,
        key_value: Float[Tensor, "key head nope_and_v"],
        rope_key: Float[Tensor, "key rope"],
        batch: TokenBatch,
        rotation: Rotation,
    ) -> Float[Tensor, "token head v"]:
        """Attend with keys and values of every head (eq. 4, 10), each sequence to itself."""
        return expanded_attention(
            query,
            key_value=key_value,
            rope_key=rope_key,
            rotation=rotation,
            lengths=batch.lengths,
            scale=self.scale,
            key_lengths=None if batch.shared is None else batch.shared.key_lengths,
        )

    def attend_cached(
        self,
        query: Float[Tensor, "token head qk"],
        *,
        batch: TokenBatch,
        rotation: Rotation,
        cache: LatentCache,
        precision: Precision = ORIGINAL,
    ) -> Float[Tensor, "token head v"]:
        """Attend in the absorbed form to everything cached of each sequence, the new tokens included."""
        query_nope, query_rope = query.split([self.config.qk_nope_head_dim, self.config.qk_rope_head_dim], dim=-1)
        query_rope = rotate(query_rope, rotation=rotation)
        up = precision.matrix(self.kv_b_proj.weight, dtype=query.dtype)
        up = up.unflatten(0, (self.config.num_attention_heads, -1))
        key_up, value_up = up.split([self.config.qk_nope_head_dim, self.config.v_head_dim], dim=1)  # W^UK, W^UV
        query_latent = torch.einsum("thn,hnc->thc", query_nope, key_up)
        outputs = []
        starts = batch.starts.tolist()
        for sequence, (start, end) in enumerate(pairwise(starts)):
            if start == end:
                continue
            positions = batch.positions[start:end]
            latent, rope_key = cache.rows(layer=self.layer, sequence=sequence, length=batch.ends[sequence])
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
