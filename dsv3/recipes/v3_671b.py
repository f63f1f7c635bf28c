"""The published pre-training of DeepSeek-V3."""

from dsv3.config import (
    BalanceConfig,
    BatchConfig,
    LearningRateConfig,
    ModelConfig,
    MtpLossConfig,
    OptimConfig,
    ParallelConfig,
    PrecisionConfig,
    PretrainConfig,
)


def v3_671b() -> PretrainConfig:
    """Train DeepSeek-V3, 671,026,419,200 parameters and an MTP module of 11,610,068,224, on 14.8T tokens as published.

    Every number of report 4.2 is written out here, though most are also the defaults of the records, so that a
    default which drifts does not take the published recipe with it. YaRN is off: it belongs to the context
    extension (report 4.3). Settings that the report leaves open are listed by `dsv3 inspect v3_671b --against report`.

    Source: report 4.1 (FIM rate, tokens) and 4.2; `routed_scaling_factor` from the published config.json.
    """
    return PretrainConfig(
        recipe="v3_671b",
        total_tokens=14_800_000_000_000,
        model=ModelConfig(
            vocab_size=129_280,
            hidden_size=7168,
            num_hidden_layers=61,
            initializer_range=0.006,
            max_position_embeddings=163_840,
            num_attention_heads=128,
            q_lora_rank=1536,
            kv_lora_rank=512,
            qk_nope_head_dim=128,
            qk_rope_head_dim=64,
            v_head_dim=128,
            rope_scaling=None,
            intermediate_size=18_432,
            moe_intermediate_size=2048,
            first_k_dense_replace=3,
            n_routed_experts=256,
            n_shared_experts=1,
            num_experts_per_tok=8,
            n_group=8,
            topk_group=4,
            routed_scaling_factor=2.5,
            scoring_func="sigmoid",
            topk_method="noaux_tc",
            norm_topk_prob=True,
            num_nextn_predict_layers=1,
        ),
        batch=BatchConfig(
            sequence_length=4096,
            start_sequences=3072,
            final_sequences=15_360,
            ramp_tokens=469_000_000_000,
            multiple_of=480,
        ),
        optim=OptimConfig(
            learning_rate=LearningRateConfig(
                peak=2.2e-4,
                warmup_steps=2000,
                constant_until_tokens=10_000_000_000_000,
                cosine_until_tokens=14_300_000_000_000,
                cosine_floor=2.2e-5,
                hold_until_tokens=14_633_000_000_000,
                final=7.3e-6,
            ),
            beta1=0.9,
            beta2=0.95,
            weight_decay=0.1,
            clip_gradient_norm=1.0,
        ),
        precision=PrecisionConfig(recipe="fp8_v3"),
        # 2,048 GPUs: 128 pipelines of 16, whose ranks share the experts of a layer by 64 (report 3.2).
        # Not published: how 61 layers fall into 16 stages. Four to each but the last take equally many FLOPs, and then
        # the first rank, which has both ends of the model, does not fit into 80 GB (docs/planning.md).
        parallel=ParallelConfig(
            pipeline=16,
            schedule="dualpipe",
            stage_layers=(3, *(4,) * 14, 2),
            expert=64,
            wire="fp8",
            ranks_per_node=8,
            zero=True,
        ),
        mtp=MtpLossConfig(early_weight=0.3, late_weight=0.1, switch_tokens=10_000_000_000_000),
        balance=BalanceConfig(
            method="bias",
            bias_update_speed=1e-3,
            bias_freeze_tokens=14_300_000_000_000,
            sequence_loss_weight=1e-4,
        ),
    )
