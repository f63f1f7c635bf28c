"""The architecture: one flat record with the names of the published `config.json`.

The report's letters stand in the comments. Because the names are the published ones, reading a `config.json`
is field by field, with no mapping to get wrong.
"""

from dataclasses import dataclass

from dsv3.config.check import require_choice, require_not_negative, require_positive
from dsv3.errors import ConfigError

TOPK_METHODS = ("noaux_tc", "group_limited_greedy", "greedy")
SCORING_FUNCTIONS = ("sigmoid", "softmax")
MTP_CONCAT_ORDERS = ("embedding_first", "hidden_first")
MTP_HIDDEN_SOURCES = ("post_norm", "pre_norm")


@dataclass(frozen=True, kw_only=True)
class YarnConfig:
    """YaRN context extension of the rotary frequencies (report 4.3)."""

    factor: float = 40.0
    """s: how many times longer the context becomes."""
    original_max_position_embeddings: int = 4096
    """Context length, in tokens, of training before the extension."""
    beta_fast: float = 32.0
    """Rotations over the original context above which a frequency is left alone (beta)."""
    beta_slow: float = 1.0
    """Rotations over the original context below which a frequency is divided by `factor` (alpha)."""
    mscale: float = 1.0
    """Weight of ln(s) in the factor on cos and sin; the published value cancels against `mscale_all_dim`."""
    mscale_all_dim: float = 1.0
    """Weight of ln(s) in the factor whose square multiplies every attention logit, nope part included."""

    def __post_init__(self) -> None:
        require_positive(self, "original_max_position_embeddings", "beta_fast", "beta_slow")
        if self.factor < 1:
            raise ConfigError(f"rope_scaling.factor = {self.factor}; YaRN lengthens a context, so it must be 1 or more")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A DeepSeek-V3 model (or V2: `scoring_func='softmax'`). Defaults are the published 671B (report 4.2)."""

    vocab_size: int = 129_280
    """Rows of the embedding and of the output head."""
    hidden_size: int = 7168
    """d: width of the residual stream."""
    num_hidden_layers: int = 61
    """Blocks of the main model; the MTP modules come on top."""
    initializer_range: float = 0.006
    """Standard deviation of the normal initialisation of all learnable parameters (report 4.2)."""
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 163_840
    """Longest position the model may be asked for, in tokens."""

    # Multi-head latent attention (report 2.1.1)
    num_attention_heads: int = 128
    """n_h."""
    q_lora_rank: int | None = 1536
    """d'_c: width of the query latent; None projects queries directly, as the 16B model does."""
    kv_lora_rank: int = 512
    """d_c: width of the key/value latent, the part of the cache that is not the rope key."""
    qk_nope_head_dim: int = 128
    """d_h: width of a query or key head that carries no position."""
    qk_rope_head_dim: int = 64
    """d_h^R: width of the rotary part of a query head, and of the one rope key shared by all heads."""
    v_head_dim: int = 128
    rope_theta: float = 10_000.0
    rope_scaling: YarnConfig | None = None
    """None during pre-training at 4K; the released weights carry YaRN with s = 40 (report 4.3)."""

    # DeepSeekMoE (report 2.1.2)
    intermediate_size: int = 18_432
    """Width of the feed-forward network in the first, dense layers."""
    moe_intermediate_size: int = 2048
    """Width of one expert."""
    first_k_dense_replace: int = 3
    """The first layers, whose feed-forward network is dense."""
    n_routed_experts: int = 256
    """N_r."""
    n_shared_experts: int = 1
    """N_s: computed as one network of `n_shared_experts * moe_intermediate_size`."""
    num_experts_per_tok: int = 8
    """K_r."""
    n_group: int = 8
    """Groups of consecutive experts; in training a group is a node."""
    topk_group: int = 4
    """M: groups a token may be sent to."""
    routed_scaling_factor: float = 2.5
    """Multiplies the gate values; published in config.json only, not in the report."""
    scoring_func: str = "sigmoid"
    """'sigmoid' (V3, eq. 15) or 'softmax' (V2)."""
    topk_method: str = "noaux_tc"
    """'noaux_tc': biased scores, a group scores as the sum of its two best (V3). 'group_limited_greedy': a group
    scores as its best expert (V2). 'greedy': no groups (16B)."""
    norm_topk_prob: bool = True
    """Divide the gate values of the chosen experts by their sum (eq. 13); V2 does not."""

    # Multi-token prediction (report 2.2)
    num_nextn_predict_layers: int = 1
    """D: sequential MTP modules."""
    mtp_concat_order: str = "embedding_first"
    """Order of the two halves that eh_proj reads. The released weights use 'embedding_first', the reverse of eq. 21."""
    mtp_hidden_source: str = "post_norm"
    """Whether the first MTP module reads the main model's hidden state after or before its final norm. Unpublished;
    serving engines feed 'post_norm' to the released weights."""

    # Special tokens
    bos_token_id: int = 0
    eos_token_id: int = 1

    def __post_init__(self) -> None:
        require_positive(
            self,
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "initializer_range",
            "rms_norm_eps",
            "max_position_embeddings",
            "num_attention_heads",
            "kv_lora_rank",
            "qk_nope_head_dim",
            "qk_rope_head_dim",
            "v_head_dim",
            "rope_theta",
            "intermediate_size",
            "moe_intermediate_size",
            "n_routed_experts",
            "num_experts_per_tok",
            "n_group",
            "topk_group",
            "routed_scaling_factor",
        )
        require_not_negative(self, "first_k_dense_replace", "n_shared_experts", "num_nextn_predict_layers")
        require_choice(self, "scoring_func", choices=SCORING_FUNCTIONS)
        require_choice(self, "topk_method", choices=TOPK_METHODS)
        require_choice(self, "mtp_concat_order", choices=MTP_CONCAT_ORDERS)
        require_choice(self, "mtp_hidden_source", choices=MTP_HIDDEN_SOURCES)
        if self.q_lora_rank is not None and self.q_lora_rank <= 0:
            raise ConfigError(f"q_lora_rank = {self.q_lora_rank}; use a positive width, or null for a direct query")
        if self.qk_rope_head_dim % 2:
            raise ConfigError(f"qk_rope_head_dim = {self.qk_rope_head_dim}; rotary pairs need an even width")
        for name in ("bos_token_id", "eos_token_id"):
            if not 0 <= getattr(self, name) < self.vocab_size:
                raise ConfigError(f"{name} = {getattr(self, name)} is outside the vocabulary of {self.vocab_size}")
        self._check_routing()

    def _check_routing(self) -> None:
        if self.n_routed_experts % self.n_group:
            raise ConfigError(f"{self.n_routed_experts} routed experts do not divide into n_group = {self.n_group}")
        if self.topk_group > self.n_group:
            raise ConfigError(f"topk_group = {self.topk_group} is more than the n_group = {self.n_group} there are")
        reachable = self.topk_group * (self.n_routed_experts // self.n_group)
        if self.topk_method == "greedy":
            reachable = self.n_routed_experts
        if self.num_experts_per_tok > reachable:
            raise ConfigError(
                f"num_experts_per_tok = {self.num_experts_per_tok}, but only {reachable} experts can be reached "
                f"through topk_group = {self.topk_group} groups; raise topk_group or lower num_experts_per_tok"
            )
        if self.topk_method == "noaux_tc" and self.n_routed_experts // self.n_group < 2:
            raise ConfigError(
                "topk_method 'noaux_tc' scores a group by its two best experts, so a group needs at least 2; "
                f"{self.n_routed_experts} experts in {self.n_group} groups leave 1"
            )

    @property
    def qk_head_dim(self) -> int:
        """Width of a whole query or key head: nope part, then rope part."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def num_moe_layers(self) -> int:
        """Blocks of the main model with routed experts; MTP modules not counted."""
        return self.num_hidden_layers - min(self.first_k_dense_replace, self.num_hidden_layers)

    @property
    def has_router_bias(self) -> bool:
        """Whether routers carry the bias of auxiliary-loss-free balancing."""
        return self.topk_method == "noaux_tc"

    def is_moe_layer(self, layer: int) -> bool:
        """Whether block `layer`, counted from 0, has routed experts; MTP modules, after the last, always do."""
        return layer >= min(self.first_k_dense_replace, self.num_hidden_layers)
