"""Where a run departs from the published recipe, and why.

Peers drift from the report in silence. Here every setting of a named recipe that differs from `v3_671b` has its
reason in this file, and a test refuses a recipe with a difference that has none.
"""

from dataclasses import dataclass
from typing import Any

from dsv3 import recipes
from dsv3.config import PretrainConfig
from dsv3.config.files import leaves
from dsv3.recipes.milestones import learning_rate, milestones

NO_REASON = "no reason recorded"


@dataclass(frozen=True, kw_only=True)
class Difference:
    """One setting that is not as published."""

    key: str
    """Dotted name."""
    value: Any
    published: Any
    """What `v3_671b` has."""
    reason: str
    """`NO_REASON` where a user, not a recipe, changed it."""


def differences(config: PretrainConfig) -> tuple[Difference, ...]:
    """Return every setting that differs from the published recipe, in the order of the settings.

    A reason belongs to the value that a recipe gives: once a user has changed the setting, it no longer applies, and
    the difference says whose value it is not. A schedule that is the published one at the same fraction of
    `total_tokens` is recognised whatever the recipe.
    """
    published = dict(leaves(recipes.v3_671b()))
    known = config.recipe in recipes.names()
    of_recipe = dict(leaves(recipes.by_name(config.recipe))) if known else {}
    return tuple(
        Difference(
            key=key,
            value=value,
            published=published.get(key),
            reason=_reason(config, key=key, value=value, of_recipe=of_recipe),
        )
        for key, value in leaves(config)
        if key != "recipe" and (key not in published or value != published[key])
    )


def _reason(config: PretrainConfig, *, key: str, value: Any, of_recipe: dict[str, Any]) -> str:
    if key in (scaled := _scaled(config)) and value == scaled[key][0]:
        return scaled[key][1]
    if key not in of_recipe or value != of_recipe[key]:
        origin = f"; recipe '{config.recipe}' has {of_recipe[key]}" if key in of_recipe else ""
        return f"{NO_REASON}{origin}"
    return REASONS[config.recipe].get(key) or _OF_NO_CONSEQUENCE.get(key.partition(".")[0], NO_REASON)


def _scaled(config: PretrainConfig) -> dict[str, tuple[Any, str]]:
    """Return what each scaled setting is when it follows the published schedule, and the sentence that says so."""
    points = milestones(config.total_tokens)
    rate = learning_rate(config.optim.learning_rate.peak, total_tokens=config.total_tokens, warmup_steps=0)
    in_tokens = {
        "batch.ramp_tokens": "ramp_tokens",
        "mtp.switch_tokens": "mtp_switch_tokens",
        "balance.bias_freeze_tokens": "bias_freeze_tokens",
        "optim.learning_rate.constant_until_tokens": "constant_until_tokens",
        "optim.learning_rate.cosine_until_tokens": "cosine_until_tokens",
        "optim.learning_rate.hold_until_tokens": "hold_until_tokens",
    }
    values: dict[str, tuple[Any, str]] = {
        key: (getattr(points, name), "the same fraction of total_tokens as published")
        for key, name in in_tokens.items()
    }
    values["optim.learning_rate.cosine_floor"] = (rate.cosine_floor, "the same share of the peak as published")
    values["optim.learning_rate.final"] = (rate.final, "the same share of the peak as published")
    return values


_OF_NO_CONSEQUENCE = {
    "snapshot": "the report does not say; changes what is kept, not what is learned",
    "evaluation": "the report does not say; changes what is measured, not what is learned",
    "runtime": "the report does not say; where and how this machine computes",
    "health": "the report does not say; what is done about faults",
    "parallel": "the published layout is of 2,048 GPUs; changes memory and speed, not what is learned",
}
"""Groups of settings that decide nothing of what is learned."""

_SMALLER = "a smaller model: every width and count is smaller, their roles are the same"
_OWN_RULES = "a run that reads its own text applies the rules itself; a large corpus comes from dsv3 data prepare"
_FEWER_EXPERTS = "a smaller model has fewer experts; groups, biased choice and gates work as published"
_SHORTER = "a shorter run; the schedules keep their fractions of it"

_SMALL_BATCHES = "a small model learns more from a token in small batches; the batch grows fivefold, as published"

_KEPT = "what one step keeps for its backward pass fits in memory; not making it again is faster"

_OF_A_SMALLER_MODEL = {
    "precision.recipe": "processors without FP8 only emulate it, which costs time and saves none",
    "recompute.norms": _KEPT,
    "recompute.up_projections": _KEPT,
    "recompute.swiglu": _KEPT,
    "total_tokens": _SHORTER,
    "model.hidden_size": _SMALLER,
    "model.num_hidden_layers": _SMALLER,
    "model.num_attention_heads": _SMALLER,
    "model.q_lora_rank": _SMALLER,
    "model.kv_lora_rank": _SMALLER,
    "model.qk_nope_head_dim": _SMALLER,
    "model.qk_rope_head_dim": _SMALLER,
    "model.v_head_dim": _SMALLER,
    "model.intermediate_size": _SMALLER,
    "model.moe_intermediate_size": _SMALLER,
    "model.max_position_embeddings": "sixteen times the training length, where the published has forty",
    "model.n_routed_experts": _FEWER_EXPERTS,
    "model.first_k_dense_replace": "of so few layers, as few are dense",
    "batch.sequence_length": "documents of the small corpora are short, and short rows fit small machines",
    "batch.start_sequences": _SMALL_BATCHES,
    "batch.final_sequences": _SMALL_BATCHES,
    "batch.multiple_of": "480 is more than the whole batch",
    "batch.micro_batch_sequences": "the published one is unknown; changes memory and speed, not results",
    "optim.learning_rate.peak": "a smaller model takes a higher rate",
    "optim.learning_rate.warmup_steps": "2000 steps would be much of this run, or more than all of it",
}

_V2_MODEL = {
    "model.vocab_size": "V2's tokenizer",
    "model.hidden_size": "V2's shape",
    "model.num_hidden_layers": "V2's shape",
    "model.intermediate_size": "V2's shape",
    "model.moe_intermediate_size": "V2's shape",
    "model.first_k_dense_replace": "V2's shape",
    "model.n_routed_experts": "V2's shape",
    "model.n_shared_experts": "V2's shape",
    "model.num_experts_per_tok": "V2's shape",
    "model.topk_group": "V2's shape",
    "model.routed_scaling_factor": "V2's route scale (config files of the V3 repository)",
    "model.scoring_func": "V2 scores experts by softmax (V2 report 2.2.1)",
    "model.topk_method": "V2 has no router bias and scores a group by its best expert (V2 report 2.2.2)",
    "model.norm_topk_prob": "V2 does not normalise the gates of the chosen experts",
    "model.num_nextn_predict_layers": "V2 has no multi-token prediction",
    "optim.learning_rate.peak": "V2's rate (V2 report 3.1.2)",
    "optim.learning_rate.constant_until_tokens": "V2 steps down by 0.316 here instead of starting a cosine",
    "optim.learning_rate.cosine_until_tokens": "V2 has no cosine: it ends where it would start",
    "optim.learning_rate.cosine_floor": "V2's first step: 0.316 of the peak",
    "optim.learning_rate.hold_until_tokens": "V2's second step by 0.316, at 90% of the tokens",
    "optim.learning_rate.final": "V2's second step: 0.316 x 0.316 of the peak",
    "batch.multiple_of": "V2's batch sizes are not multiples of 480; the shape of its ramp is unpublished",
    "precision.recipe": "FP8 training came with V3",
    "balance.method": "V2 balances by three losses (V2 report 2.2.3)",
}

REASONS: dict[str, dict[str, str]] = {
    "v3_671b": {},
    "small": _OF_A_SMALLER_MODEL
    | {
        "model.vocab_size": "the embedding would outweigh the rest; the tokenizer is trained on the corpus at hand",
    },
    "tiny": _OF_A_SMALLER_MODEL
    | {
        "model.vocab_size": "the embedding would outweigh the rest; the tokenizer is trained on the corpus at hand",
        "model.num_experts_per_tok": _FEWER_EXPERTS,
        "model.n_group": _FEWER_EXPERTS,
        "model.topk_group": _FEWER_EXPERTS,
        "model.initializer_range": "0.006 times the root of 7168 / 128, the ratio of widths; 0.006 learns slowly here",
        "data.rules.mend": _OWN_RULES,
        "data.rules.mask": _OWN_RULES,
        "data.rules.near_copies": _OWN_RULES,
        "data.held_out_rate": "a small corpus: twice the share, so that every source has something to score",
        "optim.ema_decay": "thousands of steps, not hundreds of thousands: the average must forget sooner",
        "balance.bias_update_speed": "thousands of steps, not hundreds of thousands: the bias must get there sooner",
    },
    "v3_16b": _V2_MODEL
    | {
        "total_tokens": "V2-Lite was trained on 5.7T tokens (its model card)",
        "model.num_attention_heads": "V2-Lite's shape",
        "model.q_lora_rank": "V2-Lite does not compress queries",
        "model.n_group": "V2-Lite keeps a layer's experts on one device: no groups",
        "model.topk_method": "V2-Lite has neither router bias nor groups",
        "optim.learning_rate.peak": "V2-Lite's rate (its model card)",
        "batch.start_sequences": "V2-Lite's batch is constant at 4608 sequences (its model card)",
        "batch.final_sequences": "V2-Lite's batch is constant at 4608 sequences (its model card)",
        "batch.ramp_tokens": "V2-Lite's batch is constant",
        "balance.expert_loss_weight": "V2-Lite's alpha_1 (its model card)",
        "balance.device_loss_weight": "V2-Lite has the expert-level loss alone",
        "balance.communication_loss_weight": "V2-Lite has the expert-level loss alone",
    },
    "v3_236b": _V2_MODEL
    | {
        "total_tokens": "V2 was trained on 8.1T tokens (V2 report 3.1)",
        "batch.start_sequences": "V2's batch grows from 2304 to 9216 sequences (V2 report 3.1.2)",
        "batch.final_sequences": "V2's batch grows from 2304 to 9216 sequences (V2 report 3.1.2)",
        "batch.ramp_tokens": "V2's batch grows over its first 225B tokens (V2 report 3.1.2)",
    },
}
"""Why a recipe sets what it sets. A reason here is for the recipe's own value."""

LEFT_OPEN: dict[str, str] = {
    "model.mtp_concat_order": "eq. 21 puts the hidden state first, the released weights the embedding; ours is theirs",
    "model.mtp_hidden_source": "whether h^0 is taken after the final norm; serving engines do",
    "model.routed_scaling_factor": "in the published config.json, not in the report",
    "batch.long_documents_first": "which text the context was extended on; dsv3 extend turns it on",
    "data.boundary_split_rate": "the share of combined tokens that are split",
    "data.fim_rate": "published; where documents are cut is not: two uniform cuts between characters",
    "optim.epsilon": "the customary value",
    "optim.ema_decay": "the report keeps an average and does not say how long",
    "optim.weight_decay": "published; which parameters it skips is not: one-dimensional ones",
    "precision.swiglu_cache_power_of_two": "how scales of this cache are rounded; three others are powers of two",
    "parallel.stage_layers": "how 61 layers fall into 16 stages; ours has three in the first and two in the last, "
    "so that the rank of both ends fits into 80 GB",
    "batch.multiple_of": "the ramp is published by its ends only; ours is linear in tokens, in steps of this many",
}
"""Settings of which the report leaves the value, or a part of the meaning, open: what was chosen here."""
