"""torchtitan's DeepSeekV3Model. As shipped (0.3.0) it does not train on a CPU; four things are put aside for it here.

1. Its import needs triton, for the kernels of an expert-parallel exchange that one process never calls: that one
   module is replaced by an empty one.
2. `flex` attention has no backward pass and `varlen` no kernel on a CPU: its own sdpa module, which it builds for
   image models, is set in their place.
3. Experts cast to BF16, which this kind of processor multiplies ten times slower: the same products in FP32.
4. The router's FP32 autocast is not supported on a CPU; torch warns and does nothing, which changes nothing in FP32.

torch.compile refuses its grouped products in FP32, so there is no compiled mode.
"""

import sys
import warnings
from functools import partial
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from training_peers.sizes import Size
from training_peers.system import PeerSystem


class _NoKernels(ModuleType):
    """Has any name that is imported from it, as None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


_KERNELS = "torchtitan.distributed.minimal_async_ep.kernels"
sys.modules.setdefault(_KERNELS, _NoKernels(_KERNELS))

from torchtitan.models.common import ComplexRoPE, Embedding, Linear, RMSNorm  # noqa: E402
from torchtitan.models.common.attention import ScaledDotProductAttention  # noqa: E402
from torchtitan.models.common.moe import GroupedExperts  # noqa: E402
from torchtitan.models.deepseek_v3 import DeepSeekV3Model, build_mla_moe_layers  # noqa: E402


class Fp32Experts(GroupedExperts):
    """Its experts without the cast."""

    def forward(self, x_RD: Tensor, num_tokens_per_expert_E: Tensor) -> Tensor:  # noqa: N803, their names
        ends = num_tokens_per_expert_E.cumsum(0, dtype=torch.int32)
        gate = self._grouped_mm(A=x_RD, B_t=self.w1_EFD.transpose(-2, -1), offs=ends)
        up = self._grouped_mm(A=x_RD, B_t=self.w3_EFD.transpose(-2, -1), offs=ends)
        return self._grouped_mm(A=F.silu(gate) * up, B_t=self.w2_EDF.transpose(-2, -1), offs=ends)


def model_config(size: Size) -> DeepSeekV3Model.Config:
    """Return its configuration of the model, with the initial weights all systems draw."""
    model = size.model
    assert model.q_lora_rank is not None
    weights = {"weight": partial(nn.init.normal_, std=model.initializer_range)}
    experts = dict.fromkeys(("w1_EFD", "w2_EDF", "w3_EFD"), weights["weight"])
    gains = {"weight": nn.init.ones_}
    layers = build_mla_moe_layers(
        n_layers=model.num_hidden_layers,
        n_dense_layers=model.first_k_dense_replace,
        dim=model.hidden_size,
        n_heads=model.num_attention_heads,
        q_lora_rank=model.q_lora_rank,
        kv_lora_rank=model.kv_lora_rank,
        qk_nope_head_dim=model.qk_nope_head_dim,
        qk_rope_head_dim=model.qk_rope_head_dim,
        v_head_dim=model.v_head_dim,
        mscale=1.0,
        dense_hidden_dim=model.intermediate_size,
        moe_hidden_dim=model.moe_intermediate_size,
        num_experts=model.n_routed_experts,
        num_shared_experts=model.n_shared_experts,
        router_top_k=model.num_experts_per_tok,
        router_score_func="sigmoid",
        router_num_expert_groups=model.n_group,
        router_num_limited_groups=model.topk_group,
        router_route_scale=model.routed_scaling_factor,
        router_route_norm=model.norm_topk_prob,
        attn_backend="flex",
        moe_comm_backend="standard",
        non_blocking_capacity_factor=None,
        linear_init=weights,
        norm_init=gains,
        depth_init=lambda _: weights,
        depth_experts_init=lambda _: experts,
        rope=ComplexRoPE.Config(dim=model.qk_rope_head_dim, max_seq_len=size.sequence_length, theta=model.rope_theta),
    )
    for layer in layers:
        layer.attention.inner_attention = ScaledDotProductAttention.Config()
    return DeepSeekV3Model.Config(
        vocab_size=model.vocab_size,
        dim=model.hidden_size,
        tok_embeddings=Embedding.Config(
            num_embeddings=model.vocab_size, embedding_dim=model.hidden_size, param_init=weights
        ),
        norm=RMSNorm.Config(normalized_shape=model.hidden_size, param_init=gains),
        lm_head=Linear.Config(in_features=model.hidden_size, out_features=model.vocab_size, param_init=weights),
        layers=layers,
    )


def build(size: Size) -> PeerSystem:
    warnings.filterwarnings("ignore", message="In CPU autocast")
    GroupedExperts.forward = Fp32Experts.forward
    model = model_config(size).build()
    model.init_states()
    model.train()

    def loss_of(rows: Tensor) -> Tensor:
        logits = model(rows[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())

    return PeerSystem(model, loss_of=loss_of)


MODES = {"sdpa, FP32 experts": build}
