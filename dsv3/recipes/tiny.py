"""The quickstart: the whole V3 recipe in minutes on two CPU cores."""

from dsv3.config import (
    KEEP_ALL,
    BalanceConfig,
    BatchConfig,
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    MtpLossConfig,
    OptimConfig,
    PrecisionConfig,
    PretrainConfig,
    RulesConfig,
    SnapshotConfig,
)
from dsv3.recipes.milestones import learning_rate, milestones

TOTAL_TOKENS = 3_700_000


def tiny() -> PretrainConfig:
    """Train 2,165,952 parameters, and an MTP module of 504,560 more, on the built-in corpus in minutes on a CPU.

    Every part of V3 is there: latent attention, sigmoid routing limited to groups, a shared expert, bias balancing,
    multi-token prediction, and the published schedules at the same fractions of the run. Reasons for each setting
    that differs from the report: `dsv3 inspect tiny --against report`.
    """
    scaled = milestones(TOTAL_TOKENS)
    return PretrainConfig(
        recipe="tiny",
        total_tokens=TOTAL_TOKENS,
        model=ModelConfig(
            vocab_size=4096,
            hidden_size=128,
            num_hidden_layers=3,
            max_position_embeddings=4096,
            num_attention_heads=4,
            q_lora_rank=64,
            kv_lora_rank=32,
            qk_nope_head_dim=32,
            qk_rope_head_dim=16,
            v_head_dim=32,
            intermediate_size=320,
            moe_intermediate_size=64,
            first_k_dense_replace=1,
            n_routed_experts=16,
            num_experts_per_tok=4,
            n_group=4,
            topk_group=2,
            initializer_range=0.045,
        ),
        data=DataConfig(held_out_rate=0.02, rules=RulesConfig(mend=True, mask=True, near_copies=True)),
        batch=BatchConfig(
            sequence_length=256,
            start_sequences=2,
            final_sequences=10,
            ramp_tokens=scaled.ramp_tokens,
            multiple_of=2,
            micro_batch_sequences=10,
        ),
        optim=OptimConfig(
            learning_rate=learning_rate(3e-3, total_tokens=TOTAL_TOKENS, warmup_steps=50),
            ema_decay=0.995,
        ),
        precision=PrecisionConfig(recipe="original"),
        recompute=KEEP_ALL,
        mtp=MtpLossConfig(switch_tokens=scaled.mtp_switch_tokens),
        balance=BalanceConfig(bias_update_speed=2e-3, bias_freeze_tokens=scaled.bias_freeze_tokens),
        snapshot=SnapshotConfig(every_steps=200),
        evaluation=EvaluationConfig(
            every_steps=300,
            max_tokens=30_000,
            sample_prompts=("And the LORD said unto", "def read_lines(path):\n", "Calculate 2 + 3.", "却说"),
        ),
    )
