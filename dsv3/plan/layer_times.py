"""How long the parts of a layer take on a GPU: the published trace of V3, and others by their FLOPs and bytes.

The trace is of one layer with experts of V3 on H800s, 4,096 tokens a rank, experts over 64 ranks, a forward pass woven
into a backward one: 20 of 132 SMs are set aside to move tokens, the others compute, and routing is perfectly balanced
(fact sheet 3.8). Another model, number of tokens or GPU takes as much longer as it has more FLOPs, or fewer FLOPs a
second at its peak; a run without weaving, or without experts on other ranks, computes with all SMs.
"""

from dataclasses import dataclass, fields, replace
from functools import lru_cache

from dsv3.config import ModelConfig, PrecisionConfig, PretrainConfig
from dsv3.plan.counts import expanded_attention_flops_per_token, layer_counts
from dsv3.plan.hardware import H800, Hardware
from dsv3.plan.traffic import is_woven, token_traffic

TRACE_TOKENS = 4096
SET_ASIDE = 20 / 132
"""Of a GPU's SMs, those for dispatch and combine where they go on beside the computing (report 3.2.2)."""
BF16_SHARE = 0.65
"""Of their peak that BF16 products reach on all SMs. Assumption: the trace has none but those of attention."""
BACKWARD_SCORES = 2.5
"""Attention's scores and values backward, as a multiple of forward: two products forward, five backward, as the scores
are made again."""


@dataclass(frozen=True, kw_only=True)
class TracedLayer:
    """Seconds of each part, with the report's names."""

    attention_forward: float = 4.36e-3
    dispatch_forward: float = 6.69e-3
    mlp_forward: float = 4.60e-3
    combine_forward: float = 8.68e-3
    combine_backward: float = 5.77e-3
    mlp_backward: float = 5.31e-3
    mlp_weight: float = 3.54e-3
    """What runs beside it in a stream of its own, 2.84 ms, is not in it."""
    dispatch_backward: float = 7.49e-3
    attention_backward: float = 9.34e-3
    """For inputs; with the up-projections made again."""
    attention_weight: float = 2.39e-3

    @property
    def compute(self) -> float:
        """Of the compute stream."""
        return (
            self.attention_forward
            + self.mlp_forward
            + self.mlp_backward
            + self.mlp_weight
            + self.attention_backward
            + self.attention_weight
        )

    @property
    def link(self) -> float:
        """Of the communication stream."""
        return self.dispatch_forward + self.combine_forward + self.combine_backward + self.dispatch_backward


TRACE = TracedLayer()


@dataclass(frozen=True, kw_only=True)
class WorkTimes:
    """Seconds of one micro-batch in one part of the model, on one rank."""

    forward: float = 0.0
    """Computing; so are the next two."""
    backward: float = 0.0
    """For the inputs' gradients."""
    weight: float = 0.0
    """For the weights' gradients."""
    forward_link: float = 0.0
    """Moving tokens in the forward pass while another pass computes: waits for others are in it."""
    backward_link: float = 0.0
    forward_bare: float = 0.0
    """Moving them with nothing else to do: their bytes at the rate of the link."""
    backward_bare: float = 0.0

    def __add__(self, other: "WorkTimes") -> "WorkTimes":
        names = [field.name for field in fields(self)]
        return WorkTimes(**{name: getattr(self, name) + getattr(other, name) for name in names})

    def times(self, number: int) -> "WorkTimes":
        """Return so many times each."""
        return WorkTimes(**{field.name: getattr(self, field.name) * number for field in fields(self)})


@dataclass(frozen=True, kw_only=True)
class Clock:
    """Times of parts of a model on one GPU, for micro-batches of `config`."""

    config: PretrainConfig
    gpu: Hardware
    imbalance: float
    """How many more tokens than the mean the experts of the busiest rank have, as a share of it; all wait for them."""

    @property
    def computing(self) -> float:
        """Share of the SMs that compute, beside what did in the trace."""
        parallel = self.config.parallel
        return 1.0 if is_woven(parallel) and parallel.expert > 1 else 1 / (1 - SET_ASIDE)

    @property
    def tokens(self) -> float:
        """Of a micro-batch, on one rank."""
        batch = self.config.batch
        return batch.micro_batch_sequences * batch.sequence_length / self.config.parallel.context

    def attention(self) -> WorkTimes:
        """Return the times of one layer's attention with its norms, and of fetching the latents that others have."""
        model, recompute = self.config.model, self.config.recompute.up_projections
        projections = 2.0 * layer_counts(model).attention * self.tokens
        again = 2.0 * _up_projections(model) * self.tokens if recompute else 0.0
        mean_context = self.config.batch.sequence_length // 2
        scores = expanded_attention_flops_per_token(model, mean_context=mean_context) / model.num_hidden_layers
        scores *= self.tokens
        rates = _rates()
        slower = H800.bf16_tflops / self.gpu.bf16_tflops / self.computing
        forward, backward = scores / rates.scores * slower, scores * BACKWARD_SCORES / rates.scores_backward * slower
        product = self._product_seconds(rates.projections)
        fetched = self._latents()
        return WorkTimes(
            forward=projections * product + forward,
            backward=(projections + again) * product + backward,
            weight=projections * product,
            forward_link=fetched,
            backward_link=fetched,
            forward_bare=fetched,
            backward_bare=fetched,
        )

    def dense_mlp(self) -> WorkTimes:
        """Return the times of a layer's dense network."""
        return self._mlp(2.0 * layer_counts(self.config.model).dense_mlp * self.tokens)

    def experts(self) -> WorkTimes:
        """Return the times of a layer's experts, the shared ones included, and of bringing tokens to them and back."""
        counts, model = layer_counts(self.config.model), self.config.model
        routed = 2.0 * model.num_experts_per_tok * counts.expert * self.tokens
        busiest = 1 + self.imbalance if self.config.parallel.expert > 1 else 1.0
        always = 2.0 * (counts.shared_experts + counts.router) * self.tokens
        bare = exchange_seconds(self.config, gpu=self.gpu) * self.tokens * busiest
        while_computing = waits()
        return self._mlp(routed * busiest + always) + WorkTimes(
            forward_link=bare * while_computing[0],
            backward_link=bare * while_computing[1],
            forward_bare=bare,
            backward_bare=bare,
        )

    def end(self) -> WorkTimes:
        """Return the times of what follows the last layer: MTP modules, and the head once for each loss; in BF16."""
        model = self.config.model
        modules, hidden = model.num_nextn_predict_layers, model.hidden_size
        flops = 2.0 * self.tokens * ((1 + modules) * model.vocab_size * hidden + modules * 2 * hidden**2)
        seconds = flops * self._bf16_seconds
        head = WorkTimes(forward=seconds, backward=seconds, weight=seconds)
        return head + (self.attention() + self.experts()).times(modules)

    def send_seconds(self, link: str) -> float:
        """Return how long the hidden states of a micro-batch take to the next stage, in BF16."""
        return 2.0 * self.tokens * self.config.model.hidden_size / self.gpu.bytes_per_second(link)

    def _mlp(self, flops: float) -> WorkTimes:
        rates = _rates()
        return WorkTimes(
            forward=flops * self._product_seconds(rates.mlp_forward),
            backward=flops * self._product_seconds(rates.mlp_backward),
            weight=flops * self._product_seconds(rates.mlp_weight),
        )

    def _product_seconds(self, rate: float) -> float:
        """Return the seconds of one FLOP: at the traced rate in FP8, and a share of the peak in BF16."""
        if self.config.precision.recipe == "original":
            return self._bf16_seconds
        return H800.fp8_tflops / self.gpu.fp8_tflops / rate / self.computing

    @property
    def _bf16_seconds(self) -> float:
        """Seconds of one FLOP of a BF16 product."""
        return 1 / (BF16_SHARE * (1 - SET_ASIDE) * self.computing * self.gpu.bf16_tflops * 1e12)

    def _latents(self) -> float:
        """Return how long the latents and rope keys of the tokens that other ranks have take to come here, in BF16."""
        context = self.config.parallel.context
        in_node = self.config.parallel.ranks_per_node or self.gpu.ranks_per_node
        link = self.gpu.link(within_node=context <= in_node)
        width = self.config.model.kv_lora_rank + self.config.model.qk_rope_head_dim
        return 2.0 * width * self.tokens * (context - 1) / self.gpu.bytes_per_second(link)


def exchange_seconds(config: PretrainConfig, *, gpu: Hardware) -> float:
    """Return the seconds of dispatch and combine for one token of one layer, at the rate of the slower of both links.

    The two links work at the same time (report 3.2.2).
    """
    traffic = token_traffic(config, gpu=gpu)
    return max(sum(traffic.bytes_on(link)) / gpu.bytes_per_second(link) for link in ("NVLink", "IB"))


@dataclass(frozen=True, kw_only=True)
class _Rates:
    """FLOPs a second that an H800 reaches with the SMs that compute in the trace."""

    projections: float
    scores: float
    scores_backward: float
    mlp_forward: float
    mlp_backward: float
    mlp_weight: float


@lru_cache(maxsize=1)
def _rates() -> _Rates:
    """Return the rates behind the trace.

    It gives attention as a whole; its projections are taken to be as fast forward as they are in ATTN(W), which has
    nothing else, and the rest of the time is that of scores and values.
    """
    model, counts = _traced_config().model, layer_counts(_traced_config().model)
    projections = 2.0 * counts.attention * TRACE_TOKENS
    rate = projections / TRACE.attention_weight
    again = 2.0 * _up_projections(model) * TRACE_TOKENS
    scores = expanded_attention_flops_per_token(model, mean_context=TRACE_TOKENS // 2) / model.num_hidden_layers
    scores *= TRACE_TOKENS
    mlp = 2.0 * (model.num_experts_per_tok * counts.expert + counts.shared_experts + counts.router) * TRACE_TOKENS
    return _Rates(
        projections=rate,
        scores=scores / (TRACE.attention_forward - projections / rate),
        scores_backward=BACKWARD_SCORES * scores / (TRACE.attention_backward - (projections + again) / rate),
        mlp_forward=mlp / TRACE.mlp_forward,
        mlp_backward=mlp / TRACE.mlp_backward,
        mlp_weight=mlp / TRACE.mlp_weight,
    )


@lru_cache(maxsize=1)
def waits() -> tuple[float, float]:
    """Return how many times as long as its bytes need the traced communication takes, forward and backward."""
    bare = exchange_seconds(_traced_config(), gpu=H800) * TRACE_TOKENS
    return (
        (TRACE.dispatch_forward + TRACE.combine_forward) / bare,
        (TRACE.combine_backward + TRACE.dispatch_backward) / bare,
    )


def _up_projections(model: ModelConfig) -> int:
    """Return the parameters that make queries, keys and values of every head from the latents."""
    heads = model.num_attention_heads
    query = (model.q_lora_rank or 0) * heads * model.qk_head_dim
    return query + model.kv_lora_rank * heads * (model.qk_nope_head_dim + model.v_head_dim)


@lru_cache(maxsize=1)
def _traced_config() -> PretrainConfig:
    """Return the run behind the trace: ModelConfig's defaults are V3, and experts lie on 64 ranks, eight a node."""
    config = PretrainConfig(precision=PrecisionConfig(recipe="fp8_v3"))
    return replace(config, parallel=replace(config.parallel, expert=64, wire="fp8", ranks_per_node=8))
