"""Parameters, FLOPs and cache bytes of a model, by formula from its settings alone.

Everything is a whole number and exact. The same parameter counts come out of the real model on the meta device
(tests/model), so formula and code keep each other honest.
"""

from dataclasses import dataclass

from dsv3.config import ModelConfig


@dataclass(frozen=True, kw_only=True)
class ParameterCounts:
    """Learnable parameters of the main model and of its MTP modules, and what one token uses of them.

    The biases of the routers are counted with the routers although no gradient reaches them: they are stored weights.
    """

    embedding: int
    head: int
    attention: int
    """All layers of the main model, with the norms of the two latents."""
    dense_mlp: int
    routed_experts: int
    shared_experts: int
    routers: int
    router_biases: int
    norms: int
    """Two in each layer, and the final one."""
    routed_experts_active: int
    """The experts chosen for one token, all layers together."""

    mtp_modules: int
    mtp: int
    """All MTP modules, without the embedding and the head, which they share with the main model."""
    mtp_active: int
    """What one token uses of `mtp`."""

    @property
    def total(self) -> int:
        """The main model: 671,026,419,200 for V3. MTP modules are not in it."""
        return (
            self.embedding
            + self.head
            + self.attention
            + self.dense_mlp
            + self.routed_experts
            + self.shared_experts
            + self.routers
            + self.router_biases
            + self.norms
        )

    @property
    def active(self) -> int:
        """Parameters one token passes through, head included and embedding not, since a lookup multiplies nothing.

        This is the count behind the published 37B (36,625,618,432) and behind 250 GFLOPs per token.
        """
        return self.active_with_embedding - self.embedding

    @property
    def active_with_embedding(self) -> int:
        """Active parameters with embedding and head."""
        return self.total - self.routed_experts + self.routed_experts_active

    @property
    def active_without_embedding_or_head(self) -> int:
        """Active parameters of the layers and the final norm alone."""
        return self.active - self.head

    @property
    def mtp_with_copies(self) -> int:
        """MTP modules as the published checkpoint stores them, each with a copy of embedding and head ("14B")."""
        return self.mtp + self.mtp_modules * (self.embedding + self.head)

    @property
    def mtp_active_with_copies(self) -> int:
        """What one token uses of the MTP modules, embedding and head counted again for each."""
        return self.mtp_active + self.mtp_modules * (self.embedding + self.head)

    @property
    def total_with_mtp_copies(self) -> int:
        """Everything in the published checkpoint ("685B")."""
        return self.total + self.mtp_with_copies


@dataclass(frozen=True, kw_only=True)
class LayerCounts:
    """Parameters of one piece or one layer."""

    attention: int
    dense_mlp: int
    expert: int
    """One routed expert."""
    shared_experts: int
    router: int
    router_bias: int
    norms: int
    """The two norms of a layer."""
    dense_layer: int
    moe_layer: int
    moe_layer_active: int
    """What one token uses of a layer with experts."""


def layer_counts(config: ModelConfig) -> LayerCounts:
    """Return the parameters of each piece of one layer.

    Source: report 2.1.1 and 2.1.2 for the matrices; 4.2 for the norms of the latents.
    """
    hidden, heads = config.hidden_size, config.num_attention_heads
    if config.q_lora_rank is None:
        query = hidden * heads * config.qk_head_dim
    else:
        query = hidden * config.q_lora_rank + config.q_lora_rank + config.q_lora_rank * heads * config.qk_head_dim
    key_value = (
        hidden * (config.kv_lora_rank + config.qk_rope_head_dim)
        + config.kv_lora_rank
        + config.kv_lora_rank * heads * (config.qk_nope_head_dim + config.v_head_dim)
    )
    attention = query + key_value + heads * config.v_head_dim * hidden
    dense_mlp = 3 * hidden * config.intermediate_size
    expert = 3 * hidden * config.moe_intermediate_size
    router = config.n_routed_experts * hidden
    router_bias = config.n_routed_experts if config.has_router_bias else 0
    always_used = attention + config.n_shared_experts * expert + router + router_bias + 2 * hidden
    return LayerCounts(
        attention=attention,
        dense_mlp=dense_mlp,
        expert=expert,
        shared_experts=config.n_shared_experts * expert,
        router=router,
        router_bias=router_bias,
        norms=2 * hidden,
        dense_layer=attention + dense_mlp + 2 * hidden,
        moe_layer=always_used + config.n_routed_experts * expert,
        moe_layer_active=always_used + config.num_experts_per_tok * expert,
    )


def count_parameters(config: ModelConfig) -> ParameterCounts:
    """Return the exact number of parameters by piece.

    An MTP module is a block with experts, the projection of two concatenated vectors to
    one, and three norms (report 2.2).
    """
    layer = layer_counts(config)
    moe_layers = config.num_moe_layers
    dense_layers = config.num_hidden_layers - moe_layers
    mtp_joint = 2 * config.hidden_size**2 + 3 * config.hidden_size
    return ParameterCounts(
        embedding=config.vocab_size * config.hidden_size,
        head=config.vocab_size * config.hidden_size,
        attention=config.num_hidden_layers * layer.attention,
        dense_mlp=dense_layers * layer.dense_mlp,
        routed_experts=moe_layers * config.n_routed_experts * layer.expert,
        shared_experts=moe_layers * layer.shared_experts,
        routers=moe_layers * layer.router,
        router_biases=moe_layers * layer.router_bias,
        norms=config.num_hidden_layers * layer.norms + config.hidden_size,
        routed_experts_active=moe_layers * config.num_experts_per_tok * layer.expert,
        mtp_modules=config.num_nextn_predict_layers,
        mtp=config.num_nextn_predict_layers * (layer.moe_layer + mtp_joint),
        mtp_active=config.num_nextn_predict_layers * (layer.moe_layer_active + mtp_joint),
    )


def kv_bytes_per_token(config: ModelConfig, *, bytes_per_value: int = 2, mtp_modules: int = 0) -> int:
    """Return the bytes of latent cache that one token takes: 70,272 for V3 in BF16.

    Each layer keeps the latent and the one rope key. The MTP modules keep a cache only while they draft; say how many.

    Source: report 2.1.1, the boxed vectors of eq. 1 and 3.
    """
    layers = config.num_hidden_layers + mtp_modules
    return layers * (config.kv_lora_rank + config.qk_rope_head_dim) * bytes_per_value


def training_flops_per_token(config: ModelConfig, *, sequence_length: int) -> int:
    """Return the FLOPs of training the main model on one token, forward and backward: 250 GFLOPs for V3 at 4096.

    Six for each active parameter, and causal attention at three times its forward cost: a token attends to half the
    sequence on average. Recomputation and MTP are not in it.

    Source: the accounting of "Insights into DeepSeek-V3" (arXiv 2505.09343), table 2.
    """
    attention = expanded_attention_flops_per_token(config, mean_context=sequence_length // 2)
    return 6 * count_parameters(config).active + 3 * attention


def training_flops_per_token_not_causal(config: ModelConfig, *, sequence_length: int) -> int:
    """Return the FLOPs of training on one token when masked scores count as work too: 281 GFLOPs for V3 at 4096."""
    attention = expanded_attention_flops_per_token(config, mean_context=sequence_length)
    return 6 * count_parameters(config).active + 3 * attention


def mtp_training_flops_per_token(config: ModelConfig, *, sequence_length: int) -> int:
    """Return what training the MTP modules adds to `training_flops_per_token`: each runs the head once more."""
    counts = count_parameters(config)
    modules = config.num_nextn_predict_layers
    attention = expanded_attention_flops_per_token(config, mean_context=sequence_length // 2)
    return 6 * (counts.mtp_active + modules * counts.head) + 3 * attention * modules // config.num_hidden_layers


def prefill_flops_per_token(config: ModelConfig, *, context: int) -> int:
    """Return the mean FLOPs of one token of a prompt of `context` tokens, attention in expanded form.

    The head is counted for every token, though only the last one needs it.
    """
    attention = expanded_attention_flops_per_token(config, mean_context=context // 2)
    return 2 * count_parameters(config).active + attention


def decode_flops_per_token(config: ModelConfig, *, context: int) -> int:
    """Return the FLOPs of generating one token after `context` cached ones, attention in absorbed form.

    Scores are taken against latent and rope key, values are the latent itself; the two halves of the up-projection
    move to the query and the output and cost there what they cost in the expanded form.
    """
    per_head = 2 * (config.kv_lora_rank + config.qk_rope_head_dim) + 2 * config.kv_lora_rank
    attention = config.num_hidden_layers * config.num_attention_heads * per_head * context
    return 2 * count_parameters(config).active + attention


def expanded_attention_flops_per_token(config: ModelConfig, *, mean_context: int) -> int:
    """Return the forward FLOPs of scores and weighted values, all layers, for a token that sees `mean_context` keys."""
    per_key = 2 * config.num_attention_heads * (config.qk_head_dim + config.v_head_dim)
    return config.num_hidden_layers * per_key * mean_context
