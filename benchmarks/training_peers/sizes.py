"""The models that every system trains, and the floating-point operations of one step."""

from dataclasses import dataclass

from dsv3.config import ModelConfig
from dsv3.plan.counts import training_flops_per_token_not_causal

TOKENS = 2048
"""Tokens of one step, at every size."""

BENCH_8M = ModelConfig(
    vocab_size=4096,
    hidden_size=256,
    num_hidden_layers=4,
    initializer_range=0.02,
    max_position_embeddings=4096,
    num_attention_heads=8,
    q_lora_rank=128,
    kv_lora_rank=64,
    qk_nope_head_dim=32,
    qk_rope_head_dim=16,
    v_head_dim=32,
    intermediate_size=640,
    moe_intermediate_size=128,
    first_k_dense_replace=1,
    n_routed_experts=16,
    num_experts_per_tok=4,
    n_group=4,
    topk_group=2,
    num_nextn_predict_layers=0,
)

BENCH_60M = ModelConfig(
    vocab_size=8192,
    hidden_size=512,
    num_hidden_layers=6,
    initializer_range=0.02,
    max_position_embeddings=4096,
    num_attention_heads=8,
    q_lora_rank=192,
    kv_lora_rank=128,
    qk_nope_head_dim=64,
    qk_rope_head_dim=32,
    v_head_dim=64,
    intermediate_size=960,
    moe_intermediate_size=192,
    first_k_dense_replace=1,
    n_routed_experts=32,
    num_experts_per_tok=4,
    n_group=4,
    topk_group=2,
    num_nextn_predict_layers=0,
)


@dataclass(frozen=True, kw_only=True)
class Size:
    """A model and the shape of its batch."""

    label: str
    model: ModelConfig
    parameters: int
    """What `num_trained` must return for every system; without the router biases, which no gradient reaches."""
    sequence_length: int

    @property
    def rows(self) -> int:
        return TOKENS // self.sequence_length

    @property
    def flops(self) -> int:
        """Of one step forward and backward, the whole square of attention scores counted, as all peers compute it."""
        return TOKENS * training_flops_per_token_not_causal(self.model, sequence_length=self.sequence_length)


SIZES = {
    "8m-256": Size(label="8M, T=256", model=BENCH_8M, parameters=8_420_352, sequence_length=256),
    "8m-1024": Size(label="8M, T=1024", model=BENCH_8M, parameters=8_420_352, sequence_length=1024),
    "8m-2048": Size(label="8M, T=2048", model=BENCH_8M, parameters=8_420_352, sequence_length=2048),
    "60m-256": Size(label="60M, T=256", model=BENCH_60M, parameters=62_939_520, sequence_length=256),
}
