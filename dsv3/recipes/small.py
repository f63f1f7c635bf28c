"""A model of about a hundred million parameters with the whole shape of V3, for one GPU or a patient CPU."""

from dsv3.config import (
    KEEP_ALL,
    BalanceConfig,
    BatchConfig,
    EvaluationConfig,
    ModelConfig,
    MtpLossConfig,
    OptimConfig,
    PrecisionConfig,
    PretrainConfig,
    SnapshotConfig,
)
from dsv3.recipes.milestones import learning_rate, milestones

TOTAL_TOKENS = 2_000_000_000


def small() -> PretrainConfig:
    """Train 104,411,008 parameters, and an MTP module of 14,142,400 more, on 2 billion tokens.

    Routing has the shape of V3: one shared expert, 8 experts chosen of 64 in 8 groups of which a token may reach 4,
    dense layers first. Point `data.sources` at text of your own: the built-in corpus is far smaller than this run.
    """
    scaled = milestones(TOTAL_TOKENS)
    return PretrainConfig(
        recipe="small",
        total_tokens=TOTAL_TOKENS,
        model=ModelConfig(
            vocab_size=16_384,
            hidden_size=512,
            num_hidden_layers=8,
            max_position_embeddings=16_384,
            num_attention_heads=8,
            q_lora_rank=256,
            kv_lora_rank=128,
            qk_nope_head_dim=64,
            qk_rope_head_dim=32,
            v_head_dim=64,
            intermediate_size=1408,
            moe_intermediate_size=128,
            first_k_dense_replace=2,
            n_routed_experts=64,
        ),
        batch=BatchConfig(
            sequence_length=1024,
            start_sequences=32,
            final_sequences=160,
            ramp_tokens=scaled.ramp_tokens,
            multiple_of=8,
            micro_batch_sequences=8,
        ),
        optim=OptimConfig(learning_rate=learning_rate(1e-3, total_tokens=TOTAL_TOKENS, warmup_steps=200)),
        precision=PrecisionConfig(recipe="original"),
        recompute=KEEP_ALL,
        mtp=MtpLossConfig(switch_tokens=scaled.mtp_switch_tokens),
        balance=BalanceConfig(bias_freeze_tokens=scaled.bias_freeze_tokens),
        snapshot=SnapshotConfig(every_steps=500),
        evaluation=EvaluationConfig(every_steps=500),
    )
