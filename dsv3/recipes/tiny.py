"""The quickstart: the whole V3 recipe in minutes on two CPU cores."""

from dsv3.config import (
    BalanceConfig,
    BatchConfig,
    EvaluationConfig,
    ModelConfig,
    MtpLossConfig,
    OptimConfig,
    PretrainConfig,
    SnapshotConfig,
)
from dsv3.recipes.milestones import learning_rate, milestones

TOTAL_TOKENS = 1_600_000


def tiny() -> PretrainConfig:
    """Train 8,420,400 parameters, and an MTP module of 2,008,528 more, on the built-in corpus in minutes on a CPU.

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
            hidden_size=256,
            num_hidden_layers=4,
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
        ),
        batch=BatchConfig(
            sequence_length=256,
            start_sequences=4,
            final_sequences=20,
            ramp_tokens=scaled.ramp_tokens,
            multiple_of=4,
            micro_batch_sequences=4,
        ),
        optim=OptimConfig(
            learning_rate=learning_rate(3e-3, total_tokens=TOTAL_TOKENS, warmup_steps=20),
            ema_decay=0.98,
        ),
        mtp=MtpLossConfig(switch_tokens=scaled.mtp_switch_tokens),
        balance=BalanceConfig(bias_update_speed=1e-2, bias_freeze_tokens=scaled.bias_freeze_tokens),
        snapshot=SnapshotConfig(every_steps=50),
        evaluation=EvaluationConfig(
            every_steps=50,
            max_tokens=20_000,
            sample_prompts=("In the beginning ", "def read_lines(path):\n", "What is 12 + 30?"),
        ),
    )
