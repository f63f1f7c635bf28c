"""How fast a deployment serves: a node that prefills, a node that decodes, and what memory holds (report 3.4).

Prefill runs two micro-batches, each computing while the other's tokens travel, so a layer takes the longer of the two;
the published training trace has both for 4,096 tokens on an H800 (fact sheet 3.8). Decoding is the sum of what each
kernel needs at the published rates of DeepSeek's own kernels, with two micro-batches as well. Between that and what
users saw stands one number, the only one that is fitted: `STEP_OVERHEAD`.
"""

from dataclasses import dataclass
from functools import cached_property

from dsv3.config import ModelConfig
from dsv3.config.check import require_not_negative, require_positive
from dsv3.errors import ConfigError
from dsv3.plan.counts import LayerCounts, ParameterCounts, count_parameters, layer_counts
from dsv3.plan.hardware import H800, Hardware
from dsv3.plan.layer_times import TRACE, TRACE_TOKENS

GPUS_OF_NODE = 8
STEP_OVERHEAD = 1.51
"""Fitted: seconds of a decoding step beside those of its kernels, so that the published production's 14,800 tokens a
second of a node come with its 21 tokens a second of a user. It stands for scheduling, for kernels that do not reach
their rates, and for batches of unequal length. SGLang's 22,300 of a node (2K prompts, 9 nodes, 256 requests a GPU)
had no part in it, and come out 6% too low."""
ATTENTION_TFLOPS = 660.0
"""Published: FlashMLA on an H800 where computing is the limit, as absorbed attention with 128 heads is."""
GEMM_TFLOPS = 1233.0
"""Published: the best of DeepGEMM's masked grouped products in FP8 on an H800."""
READ_SHARE = 3000 / 3350
"""Published: of the memory's rate, what FlashMLA reaches where reading is the limit; taken for products, too."""
COMBINE_BYTES, DISPATCH_BYTES = 2, 1
"""Published: BF16 back, FP8 out (open-infra)."""
EXCHANGE_SECONDS = 60e-6
"""Of one dispatch or combine, however little it carries. Fitted: 128 tokens then take 560 us there and back; DeepEP
publishes 192 and 369 over 128 GPUs."""
MEMORY_SHARE = 0.9
"""Of a GPU's memory that weights and cache may take. Assumption: engines' usual setting."""


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """Who serves. The defaults are those of the published production (fact sheet 4.1)."""

    prefill_unit_nodes: int = 4
    """Nodes over which the experts are spread where prompts are read."""
    decode_unit_nodes: int = 18
    redundant_experts: int = 32
    """Copies more than there are experts, in each unit."""
    imbalance: float = 0.0
    """Tokens of the busiest GPU's experts, as a share above the mean; all wait for it."""
    prefill_imbalance: float | None = None
    """The same where prompts are read, over other numbers of GPUs; None takes `imbalance`."""
    drafts_accepted: float = 0.0
    """Tokens more that a step of decoding brings, by MTP: 0.85 to 0.9 in the report. What was used in production is not
    published."""
    draft_cost: float = 0.1
    """What drafting and verifying adds to a step, as a share, where `drafts_accepted` is not 0. Assumption."""
    step_overhead: float = STEP_OVERHEAD

    def __post_init__(self) -> None:
        require_positive(self, "prefill_unit_nodes", "decode_unit_nodes", "step_overhead")
        require_not_negative(self, "redundant_experts", "imbalance", "drafts_accepted", "draft_cost")
        if self.prefill_imbalance is not None:
            require_not_negative(self, "prefill_imbalance")


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """One step of decoding on one GPU, in seconds, over all layers and both micro-batches."""

    attention: float
    """Scores and values over the cache, and reading it."""
    dense: float
    """Projections, dense layers and the head: read once, or computed."""
    experts: float
    exchange: float
    """Dispatch and combine."""
    overhead: float

    @property
    def computing(self) -> float:
        """All but moving tokens."""
        return self.attention + self.dense + self.experts

    @property
    def total(self) -> float:
        """With one micro-batch computing while the other's tokens travel."""
        return max(self.computing, self.exchange) * self.overhead


@dataclass(frozen=True, kw_only=True)
class ServingTimes:
    """What one GPU of each kind does, for one model."""

    model: ModelConfig
    gpu: Hardware
    deployment: Deployment

    @property
    def cache_bytes_per_token(self) -> int:
        """Of the latent cache, in BF16."""
        return (self.model.kv_lora_rank + self.model.qk_rope_head_dim) * self.model.num_hidden_layers * 2

    @cached_property
    def weight_bytes(self) -> float:
        """Of a decoding GPU: attention, dense layers, shared expert, embedding and head whole, and its routed experts.

        FP8 but for embedding and head.
        """
        counts = self._counts
        routed = counts.routed_experts * self._copies / max(1, self.model.n_routed_experts)
        both_ends = counts.embedding + counts.head
        return routed + (counts.total - counts.routed_experts - both_ends) + 2 * both_ends

    @cached_property
    def prefill_tokens_per_second(self) -> float:
        """Of one GPU with enough prompts: tokens that are computed, not found in a cache.

        The published trace's times of a layer, the experts' by their imbalance; other models and GPUs in proportion to
        their FLOPs.
        """
        layer, model, there = self._layer, self.model, ModelConfig()
        reference = layer_counts(there)
        deployment = self.deployment
        busy = 1 + (deployment.imbalance if deployment.prefill_imbalance is None else deployment.prefill_imbalance)
        slower = H800.fp8_tflops / (self.gpu.fp8_tflops or self.gpu.bf16_tflops)
        attention = TRACE.attention_forward * layer.attention / reference.attention * slower
        active = model.num_experts_per_tok * layer.expert + layer.shared_experts
        active_there = there.num_experts_per_tok * reference.expert + reference.shared_experts
        experts = TRACE.mlp_forward * active / active_there * slower * busy
        carried = model.hidden_size * model.num_experts_per_tok
        carried_there = there.hidden_size * there.num_experts_per_tok
        link = (TRACE.dispatch_forward + TRACE.combine_forward) * carried / carried_there * busy
        link *= H800.network_gb_s / self.gpu.network_gb_s
        return TRACE_TOKENS / (max(attention + experts, link) * self.model.num_hidden_layers)

    def step_time(self, batch: float, *, cached_tokens: float) -> StepTime:
        """Return what a step takes on a GPU with so many requests, whose caches have so many tokens on average."""
        model, deployment, per_request = self.model, self.deployment, self._per_request
        read, compute = self._read, self._compute
        tokens = batch * cached_tokens
        attention = max(tokens * per_request.score_flops / self._attend, tokens * self.cache_bytes_per_token / read)
        dense = max(per_request.dense / read, 2 * per_request.dense * batch / compute)
        rows = batch * model.num_experts_per_tok * (1 + deployment.imbalance)
        expert, held = self._layer.expert, self._copies + model.n_shared_experts
        experts = model.num_moe_layers * max(
            held * expert / read, 2 * expert * (rows + batch * model.n_shared_experts) / compute
        )
        carried = rows * model.hidden_size * (COMBINE_BYTES + DISPATCH_BYTES)
        exchange = model.num_moe_layers * (carried / (self.gpu.network_gb_s * 1e9) + 4 * EXCHANGE_SECONDS)
        more = 1 + deployment.draft_cost if deployment.drafts_accepted else 1.0
        return StepTime(
            attention=attention,
            dense=dense,
            experts=experts,
            exchange=exchange,
            overhead=deployment.step_overhead * more,
        )

    @property
    def tokens_per_step(self) -> float:
        """That a request gets."""
        return 1 + self.deployment.drafts_accepted

    def most_requests(self, *, cached_tokens: float) -> int:
        """Return how many requests with caches of so many tokens a decoding GPU holds.

        Raises:
            ConfigError: not one of them, or the weights do not fit.
        """
        room = MEMORY_SHARE * self.gpu.memory_gb * 1e9 - self.weight_bytes
        if room < cached_tokens * self.cache_bytes_per_token:
            raise ConfigError(
                f"weights of {self.weight_bytes / 1e9:.1f} GB on each GPU leave {max(0.0, room) / 1e9:.1f} GB of "
                f"{self.gpu.memory_gb} for caches, and one of {cached_tokens:,.0f} tokens takes "
                f"{cached_tokens * self.cache_bytes_per_token / 1e9:.2f} GB; spread experts over more nodes "
                "(--decode-unit), or take a GPU with more memory"
            )
        return int(room / (cached_tokens * self.cache_bytes_per_token))

    @cached_property
    def _counts(self) -> ParameterCounts:
        return count_parameters(self.model)

    @cached_property
    def _layer(self) -> LayerCounts:
        return layer_counts(self.model)

    @cached_property
    def _per_request(self) -> "_PerRequest":
        model, counts = self.model, self._counts
        return _PerRequest(
            score_flops=2
            * model.num_attention_heads
            * (2 * model.kv_lora_rank + model.qk_rope_head_dim)
            * model.num_hidden_layers,
            dense=counts.total - counts.routed_experts - counts.embedding - counts.shared_experts,
        )

    @property
    def _read(self) -> float:
        return READ_SHARE * self.gpu.memory_gb_s * 1e9

    @property
    def _compute(self) -> float:
        return GEMM_TFLOPS * 1e12 * (self.gpu.fp8_tflops or self.gpu.bf16_tflops) / H800.fp8_tflops

    @property
    def _attend(self) -> float:
        return ATTENTION_TFLOPS * 1e12 * self.gpu.bf16_tflops / H800.bf16_tflops

    @property
    def _copies(self) -> float:
        """Routed experts of each layer that a decoding GPU holds, copies among them."""
        model, deployment = self.model, self.deployment
        if not model.n_routed_experts:
            return 0.0
        return (model.n_routed_experts + deployment.redundant_experts) / (deployment.decode_unit_nodes * GPUS_OF_NODE)


@dataclass(frozen=True, kw_only=True)
class _PerRequest:
    """What one request's token costs over all layers."""

    score_flops: int
    """For each token of its cache."""
    dense: int
    """Weights that are no experts."""
