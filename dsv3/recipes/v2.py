"""The two V2-style shapes that the V3 repository still configures, trained as the V2 report says.

V2 differs from V3 in the router (softmax, groups scored by their best expert, gates not normalised), in balancing
(three auxiliary losses, no bias), in having no multi-token prediction, and in a stepwise learning rate. V2 also
dropped tokens at a device capacity of 1.0; dsv3 drops none.
"""

from dsv3.config import (
    BalanceConfig,
    BatchConfig,
    LearningRateConfig,
    ModelConfig,
    OptimConfig,
    PrecisionConfig,
    PretrainConfig,
)


def v3_16b() -> PretrainConfig:
    """Train V2-Lite, 15,706,484,224 parameters, on 5.7T tokens: one group, direct queries, expert-level loss alone.

    Pre-training at 4K has no YaRN. The released 16B carries `mscale = 0.707` from its context extension.

    Source: config_16B.json of the V3 repository; V2-Lite's model card, 'Training Details'.
    """
    total_tokens = 5_700_000_000_000
    return PretrainConfig(
        recipe="v3_16b",
        total_tokens=total_tokens,
        model=ModelConfig(
            vocab_size=102_400,
            hidden_size=2048,
            num_hidden_layers=27,
            num_attention_heads=16,
            q_lora_rank=None,
            intermediate_size=10_944,
            moe_intermediate_size=1408,
            first_k_dense_replace=1,
            n_routed_experts=64,
            n_shared_experts=2,
            num_experts_per_tok=6,
            n_group=1,
            topk_group=1,
            routed_scaling_factor=1.0,
            scoring_func="softmax",
            topk_method="greedy",
            norm_topk_prob=False,
            num_nextn_predict_layers=0,
        ),
        batch=BatchConfig(start_sequences=4608, final_sequences=4608, ramp_tokens=0, multiple_of=1),
        optim=OptimConfig(
            learning_rate=steps_down(
                peak=4.2e-4, first_tokens=total_tokens * 80 // 100, second_tokens=total_tokens * 90 // 100
            )
        ),
        precision=PrecisionConfig(recipe="original"),
        balance=BalanceConfig(
            method="v2_losses", expert_loss_weight=0.001, device_loss_weight=0.0, communication_loss_weight=0.0
        ),
    )


def v3_236b() -> PretrainConfig:
    """Train V2, 235,741,434,880 parameters, on 8.1T tokens: 160 experts in 8 groups of which a token may reach 3.

    Pre-training at 4K has no YaRN.

    Source: config_236B.json of the V3 repository; V2 report 3.1.2.
    """
    total_tokens = 8_100_000_000_000
    return PretrainConfig(
        recipe="v3_236b",
        total_tokens=total_tokens,
        model=ModelConfig(
            vocab_size=102_400,
            hidden_size=5120,
            num_hidden_layers=60,
            intermediate_size=12_288,
            moe_intermediate_size=1536,
            first_k_dense_replace=1,
            n_routed_experts=160,
            n_shared_experts=2,
            num_experts_per_tok=6,
            n_group=8,
            topk_group=3,
            routed_scaling_factor=16.0,
            scoring_func="softmax",
            topk_method="group_limited_greedy",
            norm_topk_prob=False,
            num_nextn_predict_layers=0,
        ),
        batch=BatchConfig(start_sequences=2304, final_sequences=9216, ramp_tokens=225_000_000_000, multiple_of=1),
        optim=OptimConfig(
            learning_rate=steps_down(
                peak=2.4e-4, first_tokens=total_tokens * 60 // 100, second_tokens=total_tokens * 90 // 100
            )
        ),
        precision=PrecisionConfig(recipe="original"),
        balance=BalanceConfig(method="v2_losses"),
    )


def steps_down(*, peak: float, first_tokens: int, second_tokens: int) -> LearningRateConfig:
    """V2's warm-up and two steps by 0.316: a cosine of no length is a step."""
    return LearningRateConfig(
        peak=peak,
        warmup_steps=2000,
        constant_until_tokens=first_tokens,
        cosine_until_tokens=first_tokens,
        cosine_floor=round(peak * 0.316, 12),
        hold_until_tokens=second_tokens,
        final=round(peak * 0.316 * 0.316, 12),
    )
