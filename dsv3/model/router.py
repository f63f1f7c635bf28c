"""Who works on which token (report 2.1.2, eq. 12-16), with V2's routing beside V3's.

s_i = sigmoid(u . e_i)                                   affinity of the token for expert i          (eq. 15)
choose the K_r largest s_i + b_i, from the M best groups b_i steers the choice only                   (eq. 16)
g_i = s_i / sum of the chosen s_j                        gate values, without the bias               (eq. 13-14)
"""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from dsv3.config import ModelConfig
from dsv3.model.interfaces import Routing


class Router(nn.Module):
    """Affinities of every token for every expert, and the choice made from them."""

    e_score_correction_bias: Tensor | None

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        # Not a parameter: no gradient reaches it. The balance update after each step moves it (train/balance.py).
        bias = torch.zeros(config.n_routed_experts, dtype=torch.float32) if config.has_router_bias else None
        self.register_buffer("e_score_correction_bias", bias)

    def forward(
        self, hidden: Float[Tensor, "token hidden"], *, experts: Int[Tensor, "token chosen"] | None = None
    ) -> Routing:
        """Route every token; scores and selection in at least FP32. `experts` are chosen already, where given."""
        wide = torch.promote_types(hidden.dtype, torch.float32)
        logits = hidden.to(wide) @ self.weight.to(wide).T
        affinity = logits.sigmoid() if self.config.scoring_func == "sigmoid" else logits.softmax(-1)
        if experts is not None:
            return routing_to(experts, affinity=affinity, config=self.config)
        return choose_experts(affinity, bias=self.e_score_correction_bias, config=self.config)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Router":
        """Move with the module, but keep the bias in FP32: steps of 0.001 are lost on a BF16 bias of 5."""
        bias = self.e_score_correction_bias
        super()._apply(fn, recurse)
        if bias is not None and self.e_score_correction_bias is not None:
            moved = self.e_score_correction_bias
            if moved.dtype != torch.float32:
                self.e_score_correction_bias = bias.to(moved.device)
        return self


def choose_experts(
    affinity: Float[Tensor, "token expert"], *, bias: Float[Tensor, " expert"] | None, config: ModelConfig
) -> Routing:
    """Pick `num_experts_per_tok` experts for each token, and their gate values.

    The bias decides who is picked, never how much they count: gate values are the unbiased affinities, divided by
    their sum if `norm_topk_prob`, times `routed_scaling_factor` (published in config.json only). Experts of dropped
    groups score -inf; a 0 there would let them back in as soon as biases are negative. Ties go to the lowest index.

    Source: report 2.1.2, eq. 13-16 and 'Node-Limited Routing'.
    """
    with torch.no_grad():
        biased = affinity if bias is None else affinity + bias
        if config.topk_method != "greedy":
            biased = biased.masked_fill(~expert_is_reachable(biased, config=config), float("-inf"))
        experts = _largest(biased, count=config.num_experts_per_tok)
    return routing_to(experts, affinity=affinity, config=config)


def routing_to(
    experts: Int[Tensor, "token chosen"], *, affinity: Float[Tensor, "token expert"], config: ModelConfig
) -> Routing:
    """Return gate values and load of a choice of experts (eq. 13-14)."""
    # Not bincount, which on a GPU waits for the largest index to come back.
    load = experts.new_zeros(config.n_routed_experts).scatter_add_(
        0, experts.flatten(), torch.ones_like(experts).flatten()
    )
    gates = affinity.gather(1, experts)
    if config.norm_topk_prob:
        gates = gates / (gates.sum(-1, keepdim=True) + 1e-20)  # 1e-20 as in the published code
    return Routing(experts=experts, gates=gates * config.routed_scaling_factor, affinity=affinity, load=load)


def expert_is_reachable(biased: Float[Tensor, "token expert"], *, config: ModelConfig) -> Bool[Tensor, "token expert"]:
    """Tell which experts lie in the `topk_group` groups a token may be sent to.

    A group scores as the sum of its two best biased scores (V3: K_r / M = 2), or as its best score (V2).
    """
    by_group = biased.unflatten(1, (config.n_group, -1))
    best = by_group.max(-1, keepdim=True)
    scores = best.values.squeeze(-1)
    if config.topk_method == "noaux_tc":  # Not topk(2), which takes ten times as long on a GPU.
        scores = scores + by_group.scatter(-1, best.indices, float("-inf")).amax(-1)
    kept = _largest(scores, count=config.topk_group)
    group_kept = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, kept, True)
    return group_kept.repeat_interleave(config.n_routed_experts // config.n_group, dim=1)


def _largest(scores: Float[Tensor, "token choice"], *, count: int) -> Int[Tensor, "token kept"]:
    """Return the indices of the `count` largest scores, best first; ties by index, which topk does not promise."""
    # A copy, so that the indices not wanted are not kept for the backward pass.
    return scores.sort(dim=1, descending=True, stable=True).indices[:, :count].contiguous()
