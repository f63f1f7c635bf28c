"""The whole model on one device: embedding, blocks, output head, MTP modules."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from dsv3.batch import TokenBatch
from dsv3.config import KEEP_ALL, ModelConfig, RecomputeConfig
from dsv3.fp8.formats import is_fp8
from dsv3.model.block import DenseBlock, MoeBlock
from dsv3.model.interfaces import LatentCache, ModelOutput, MtpOutput, Routing, TokenDispatch
from dsv3.model.linear import BlockScaled, Linear, RMSNorm
from dsv3.model.moe import LocalDispatch
from dsv3.model.mtp import MtpModule
from dsv3.model.precision import ORIGINAL, Precision
from dsv3.model.router import Router
from dsv3.model.stored_fp8 import precision_of_stored
from dsv3.ops.rope import Rotation, rope_frequencies, rotation_at


class Transformer(nn.Module):
    """DeepSeek-V3. Weights are uninitialised until `init_weights`, or until a checkpoint is loaded.

    Under `torch.device("meta")` the 671B model is made in seconds, without memory.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            MoeBlock(config, layer=layer) if config.is_moe_layer(layer) else DenseBlock(config, layer=layer)
            for layer in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.lm_head = Linear(config.hidden_size, config.vocab_size)
        self.mtp = nn.ModuleList(MtpModule(config, depth=k) for k in range(config.num_nextn_predict_layers))

    def forward(
        self,
        batch: TokenBatch,
        *,
        cache: LatentCache | None = None,
        dispatch: TokenDispatch | None = None,
        recompute: RecomputeConfig = KEEP_ALL,
        precision: Precision | None = None,
        mtp: bool = False,
    ) -> ModelOutput:
        """Return hidden states, after the final norm, and how tokens were routed; with `mtp`, run the MTP modules too.

        Without a cache every sequence is read whole. With one, tokens are appended to it and see all that it holds.
        `recompute` says what a backward pass makes again instead of finding it kept, `precision` in which numbers the
        products with weights are computed: those that the weights are stored in, unless something else is asked for.
        """
        dispatch = dispatch or LocalDispatch()
        precision = precision or self.stored_precision()
        rotation = self._rotation(batch)
        hidden = self.embed_tokens(batch.tokens)
        routings: list[Routing] = []
        for block in self.layers:
            if isinstance(block, MoeBlock):
                hidden, routing = block(
                    hidden,
                    batch=batch,
                    rotation=rotation,
                    cache=cache,
                    dispatch=dispatch,
                    recompute=recompute,
                    precision=precision,
                )
                routings.append(routing)
            else:
                hidden = block(
                    hidden, batch=batch, rotation=rotation, cache=cache, recompute=recompute, precision=precision
                )
        normed = self.norm(hidden)
        batches = [batch] * len(routings)
        outputs: list[MtpOutput] = []
        if mtp:
            state = normed if self.config.mtp_hidden_source == "post_norm" else hidden
            ahead = batch
            for depth in range(len(self.mtp)):
                state, ahead = state.index_select(0, ahead.not_last), ahead.ahead()
                output, routing = self.predict_ahead(
                    state,
                    depth=depth,
                    batch=ahead,
                    cache=cache,
                    dispatch=dispatch,
                    recompute=recompute,
                    precision=precision,
                )
                state = output.hidden if self.config.mtp_hidden_source == "post_norm" else output.before_norm
                outputs.append(output)
                routings.append(routing)
                batches.append(ahead)
        return ModelOutput(
            hidden=normed,
            before_norm=hidden,
            mtp=tuple(outputs),
            routings=tuple(routings),
            routed_batches=tuple(batches),
        )

    def predict_ahead(
        self,
        state: Float[Tensor, "token hidden"],
        *,
        depth: int,
        batch: TokenBatch,
        cache: LatentCache | None = None,
        dispatch: TokenDispatch | None = None,
        recompute: RecomputeConfig = KEEP_ALL,
        precision: Precision | None = None,
    ) -> tuple[MtpOutput, Routing]:
        """Run MTP module `depth` on the state before it and the batch of tokens one further on (`TokenBatch.ahead`)."""
        module = self.mtp[depth]
        assert isinstance(module, MtpModule)
        hidden, routing = module(
            state,
            embedded=self.embed_tokens(batch.tokens),
            batch=batch,
            rotation=self._rotation(batch),
            cache=cache,
            dispatch=dispatch or LocalDispatch(),
            recompute=recompute,
            precision=precision or self.stored_precision(),
        )
        return MtpOutput(batch=batch, hidden=module.norm(hidden), before_norm=hidden), routing

    def logits(self, hidden: Float[Tensor, "token hidden"]) -> Float[Tensor, "token vocab"]:
        """Return the output head's logits, in at least FP32."""
        logits = self.lm_head(hidden)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def weights_in_fp8(self) -> list[tuple[nn.Parameter, int]]:
        """Return the parameters that FP8 recipes quantise, with how many matrices lie one above the other in each.

        Those of all Linear layers and experts but the output head and eh_proj (report 3.3.1; the released files).
        """
        modules = self._modules_in_fp8()
        return [(module.get_parameter(name), parts) for module in modules for name, parts in module.matrices.items()]

    def make_room_in_fp8(self) -> None:
        """Let these parameters be in FP8, each with its scales; what they hold is then to be loaded.

        A model in FP8 is for use: it has nothing to train. Its other weights keep their type.
        """
        for module in self._modules_in_fp8():
            module.make_room_in_fp8()
        self.requires_grad_(False)

    def stored_precision(self) -> Precision:
        """Return the precision that the weights are stored in: FP8 after `make_room_in_fp8`, else the original one."""
        first = self.layers[0]
        assert isinstance(first, MoeBlock | DenseBlock)
        if not is_fp8(first.self_attn.o_proj.weight):  # all or none of them are
            return ORIGINAL
        modules = self._modules_in_fp8()
        weights = {module.get_parameter(name): module.in_blocks(name) for module in modules for name in module.matrices}
        return precision_of_stored(weights, device=self.embed_tokens.weight.device)

    def _modules_in_fp8(self) -> list[BlockScaled]:
        original = {self.lm_head, *(module.eh_proj for module in self.mtp)}
        return [module for module in self.modules() if isinstance(module, BlockScaled) and module not in original]

    def routers(self) -> list[Router]:
        """Return the routers in the order of `ModelOutput.routings`: main blocks, then MTP modules."""
        blocks = [*self.layers, *(module.block for module in self.mtp)]
        return [block.mlp.gate for block in blocks if isinstance(block, MoeBlock)]

    @torch.no_grad()
    def init_weights(self, *, generator: torch.Generator) -> None:
        """Draw all weights from a normal distribution of std `initializer_range` (report 4.2), in a fixed order.

        Norm gains start at 1 and router biases at 0.
        """
        for module in self.modules():
            for parameter in module.parameters(recurse=False):
                if isinstance(module, RMSNorm):
                    parameter.fill_(1.0)
                else:
                    parameter.normal_(0.0, self.config.initializer_range, generator=generator)
        for router in self.routers():
            if router.e_score_correction_bias is not None:
                router.e_score_correction_bias.zero_()

    def _rotation(self, batch: TokenBatch) -> Rotation:
        frequencies = rope_frequencies(self.config).to(batch.positions.device)
        return rotation_at(batch.positions, frequencies=frequencies, yarn=self.config.rope_scaling)


class Embedding(nn.Module):
    """A row for each token id."""

    def __init__(self, num_rows: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_rows, dim))

    def forward(self, tokens: Int[Tensor, " token"]) -> Float[Tensor, "token dim"]:
        """Return the rows of the given ids."""
        return F.embedding(tokens, self.weight)
