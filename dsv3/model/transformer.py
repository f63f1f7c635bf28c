"""The whole model on one device: embedding, blocks, output head, MTP modules."""

from collections.abc import Collection, Generator

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from dsv3.batch import TokenBatch
from dsv3.config import KEEP_ALL, ModelConfig, RecomputeConfig
from dsv3.fp8.formats import is_fp8
from dsv3.model.block import DenseBlock, MoeBlock, parts_of, run_through
from dsv3.model.interfaces import (
    Cut,
    LatentCache,
    ModelOutput,
    MtpOutput,
    Part,
    Routing,
    TokenDispatch,
    keep_whole,
)
from dsv3.model.linear import BlockScaled, Linear, RMSNorm
from dsv3.model.moe import LocalDispatch
from dsv3.model.mtp import MtpModule
from dsv3.model.precision import ORIGINAL, Precision
from dsv3.model.router import Router
from dsv3.model.stored_fp8 import precision_of_stored
from dsv3.ops.rope import Rotation, rope_amplitude, rope_frequencies, rotation_at


class Transformer(nn.Module):
    """DeepSeek-V3. Weights are uninitialised until `init_weights`, or until a checkpoint is loaded.

    Under `torch.device("meta")` the 671B model is made in seconds, without memory.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.frequencies = rope_frequencies(config)
        """Angle per position of each pair of the rope part."""
        self.amplitude = rope_amplitude(config)
        """Of the rotation."""
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
        return run_through(
            self.steps(batch, cache=cache, dispatch=dispatch, recompute=recompute, precision=precision, mtp=mtp)
        )

    def steps(
        self,
        batch: TokenBatch,
        *,
        hidden: Float[Tensor, "token hidden"] | None = None,
        layers: range | None = None,
        cache: LatentCache | None = None,
        dispatch: TokenDispatch | None = None,
        recompute: RecomputeConfig = KEEP_ALL,
        precision: Precision | None = None,
        mtp: bool = False,
        cut: Cut = keep_whole,
    ) -> Generator[Part, None, ModelOutput]:
        """Run consecutive layers, all of them unless told which, stopping after each part of a layer.

        The first layer of the model reads the embedding, any other `hidden`. The last one is followed by the final norm
        and the MTP modules. `cut` is called where the backward pass may be cut into pieces.
        """
        layers = range(len(self.layers)) if layers is None else layers
        dispatch = dispatch or LocalDispatch()
        precision = precision or self.stored_precision()
        rotation = self._rotation(batch)
        state = self.embed_tokens(batch.tokens) if layers.start == 0 else hidden
        assert state is not None, "layers after the first go on from those before them"
        routings: list[Routing] = []
        for index in layers:
            block = self.layers[index]
            if isinstance(block, MoeBlock):
                state, routing = yield from parts_of(
                    block,
                    state,
                    batch=batch,
                    rotation=rotation,
                    cache=cache,
                    dispatch=dispatch,
                    recompute=recompute,
                    precision=precision,
                    cut=cut,
                )
                routings.append(routing)
            else:
                state = block(
                    state, batch=batch, rotation=rotation, cache=cache, recompute=recompute, precision=precision
                )
                yield Part.ATTENTION
                state = cut(state, Part.ATTENTION)
        batches = [batch] * len(routings)
        if layers.stop < len(self.layers):
            return ModelOutput(
                hidden=state, before_norm=state, mtp=(), routings=tuple(routings), routed_batches=tuple(batches)
            )
        normed = self.norm(state)
        outputs: list[MtpOutput] = []
        if mtp:
            normed = cut(normed, Part.HEAD)  # The head will read it, after the modules' pieces.
            source, ahead = normed if self.config.mtp_hidden_source == "post_norm" else state, batch
            for depth in range(len(self.mtp)):
                source, ahead = source.index_select(0, ahead.not_last), ahead.ahead()
                output, routing = yield from self.steps_ahead(
                    source,
                    depth=depth,
                    batch=ahead,
                    cache=cache,
                    dispatch=dispatch,
                    recompute=recompute,
                    precision=precision,
                    cut=cut,
                )
                source = output.hidden if self.config.mtp_hidden_source == "post_norm" else output.before_norm
                outputs.append(output)
                routings.append(routing)
                batches.append(ahead)
        return ModelOutput(
            hidden=normed,
            before_norm=state,
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
        precision: Precision | None = None,
    ) -> tuple[MtpOutput, Routing]:
        """Run MTP module `depth` on the state before it and the batch of tokens one further on (`TokenBatch.ahead`)."""
        return run_through(self.steps_ahead(state, depth=depth, batch=batch, cache=cache, precision=precision))

    def steps_ahead(
        self,
        state: Float[Tensor, "token hidden"],
        *,
        depth: int,
        batch: TokenBatch,
        cache: LatentCache | None = None,
        dispatch: TokenDispatch | None = None,
        recompute: RecomputeConfig = KEEP_ALL,
        precision: Precision | None = None,
        cut: Cut = keep_whole,
    ) -> Generator[Part, None, tuple[MtpOutput, Routing]]:
        """Do the same, stopping after each part of its layer."""
        module = self.mtp[depth]
        assert isinstance(module, MtpModule)
        hidden, routing = yield from parts_of(
            module,
            state,
            embedded=self.embed_tokens(batch.tokens),
            batch=batch,
            rotation=self._rotation(batch),
            cache=cache,
            dispatch=dispatch or LocalDispatch(),
            recompute=recompute,
            precision=precision or self.stored_precision(),
            cut=cut,
        )
        made = MtpOutput(batch=batch, hidden=module.norm(hidden), before_norm=hidden)
        return cut(made, Part.HEAD), routing

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
        first = next(block for block in self.layers if isinstance(block, MoeBlock | DenseBlock))
        if not is_fp8(first.self_attn.o_proj.weight):  # all or none of them are
            return ORIGINAL
        modules = self._modules_in_fp8()
        weights = {module.get_parameter(name): module.in_blocks(name) for module in modules for name in module.matrices}
        return precision_of_stored(weights, device=self.embed_tokens.weight.device)

    def _modules_in_fp8(self) -> list[BlockScaled]:
        original = {self.lm_head, *(module.eh_proj for module in self.mtp)}
        return [module for module in self.modules() if isinstance(module, BlockScaled) and module not in original]

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The type that is computed in, which is that of the norms."""
        return next(module.weight.dtype for module in self.modules() if isinstance(module, RMSNorm))

    def routers(self) -> list[Router]:
        """Return the routers in the order of `ModelOutput.routings`: main blocks, then MTP modules."""
        return list(self.routers_by_place().values())

    def routers_by_place(self) -> dict[int, Router]:
        """Return the routers that are here by their place in the `routings` of the whole model."""
        blocks = [*self.layers, *(module.block for module in self.mtp)]
        places = routed_places(self.config, layers=range(len(blocks)))
        return {place: blocks[at].mlp.gate for at, place in places.items() if isinstance(blocks[at], MoeBlock)}

    def keep_only(self, layers: Collection[int], *, embedding: bool, end: bool) -> None:
        """Let go of all but some layers, the embedding, and the end (final norm, head, MTP modules).

        What is left keeps its names. `steps` runs what is here; the rest is on other ranks.
        """
        for index in range(len(self.layers)):
            if index not in layers:
                self.layers[index] = Elsewhere()
        if not embedding:
            self.embed_tokens = Elsewhere()  # type: ignore[assignment]
        if not end:
            self.norm = Elsewhere()  # type: ignore[assignment]
            self.lm_head = Elsewhere()  # type: ignore[assignment]
            self.mtp = nn.ModuleList()

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
        positions = batch.positions if batch.shared is None else batch.shared.key_positions
        frequencies = self.frequencies.to(positions.device)
        return rotation_at(positions, frequencies=frequencies, amplitude=self.amplitude)


class Embedding(nn.Module):
    """A row for each token id."""

    def __init__(self, num_rows: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_rows, dim))

    def forward(self, tokens: Int[Tensor, " token"]) -> Float[Tensor, "token dim"]:
        """Return the rows of the given ids."""
        return F.embedding(tokens, self.weight)


class Elsewhere(nn.Module):
    """Stands in the place of what another rank holds."""


def routed_places(config: ModelConfig, *, layers: range) -> dict[int, int]:
    """Return for each layer with experts among `layers` its place in `ModelOutput.routings` of the whole model.

    Layers after those of the main model are the MTP modules.
    """
    with_experts = [layer for layer in range(config.num_hidden_layers) if config.is_moe_layer(layer)]
    with_experts += range(config.num_hidden_layers, config.num_hidden_layers + config.num_nextn_predict_layers)
    return {layer: place for place, layer in enumerate(with_experts) if layer in layers}
