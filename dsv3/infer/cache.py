"""The latent cache: all that decoding remembers of past tokens (report 2.1.1).

MLA keeps one normed latent and one roped key for each token and layer, shared by all heads: 576 numbers in V3, where
128 heads of ordinary attention would keep 40,960. This is the plain form of it, one dense tensor a layer; it is also
what a paged cache is tested against.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dsv3.batch import TokenBatch
from dsv3.config import ModelConfig
from dsv3.errors import ConfigError

_FIRST_RESERVATION = 256


@dataclass(frozen=True, kw_only=True)
class _Placement:
    """Where the tokens of one batch go; the same for every layer, so it is worked out once a forward pass."""

    batch: TokenBatch
    slots: Int[Tensor, " token"]
    """Row of each token in a layer's storage, seen as one list of rows."""
    ends: tuple[int, ...]
    """Length of each sequence once the batch is in."""


class DenseLatentCache:
    """Latents and rope keys of `num_sequences` sequences of up to `capacity` tokens each.

    Sequence i of a batch is sequence i of the cache, for as long as the cache lives. Memory is taken as the sequences
    grow, by doubling, so a generous `capacity` costs nothing; beyond it tokens are refused. Appending at a position
    that is already held replaces it and forgets what came after: a sequence may start over, or take back tokens.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        num_sequences: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device | str,
        num_mtp_layers: int = 0,
    ) -> None:
        if num_sequences < 1 or capacity < 1:
            raise ConfigError(
                f"a cache of {num_sequences} sequences of {capacity} tokens holds nothing; both must be 1 or more"
            )
        if not 0 <= num_mtp_layers <= config.num_nextn_predict_layers:
            raise ConfigError(
                f"a cache for {num_mtp_layers} MTP layers was asked of a model that has "
                f"{config.num_nextn_predict_layers}"
            )
        self.capacity = capacity
        """Tokens that each sequence may grow to."""
        self.num_sequences = num_sequences
        self._latent_width = config.kv_lora_rank
        self._width = config.kv_lora_rank + config.qk_rope_head_dim
        self._dtype = dtype
        self._num_layers = config.num_hidden_layers + num_mtp_layers
        self._lengths = [[0] * num_sequences for _ in range(self._num_layers)]
        self._reserved = min(capacity, _FIRST_RESERVATION)
        self._layers = [self._new_layer(self._reserved, device=device) for _ in range(self._num_layers)]
        self._placement: _Placement | None = None

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one token takes over all layers: 70,272 for V3 in BF16 without its MTP layer."""
        return self._width * self._num_layers * self._dtype.itemsize

    def length(self, sequence: int) -> int:
        """Return the number of tokens held of one sequence, as the first layer has it."""
        return self._lengths[0][sequence]

    def append(
        self,
        latent: Float[Tensor, "token latent"],
        *,
        rope_key: Float[Tensor, "token rope"],
        layer: int,
        batch: TokenBatch,
    ) -> None:
        """Keep the entries of all tokens of the batch, each at its own position.

        Raises:
            ConfigError: a sequence would outgrow `capacity`, or the batch has more sequences than the cache.
        """
        assert layer < self._num_layers, f"layer {layer} of a cache with {self._num_layers} layers"
        placement = self._place(batch)
        for sequence, (length, begin) in enumerate(zip(batch.lengths, batch.starts.tolist(), strict=False)):
            held, end = self._lengths[layer][sequence], placement.ends[sequence]
            if length:
                assert end - length <= held, f"token {begin} leaves a hole: position {end - length}, {held} are held"
                self._lengths[layer][sequence] = end
        entries = torch.cat([latent.detach(), rope_key.detach()], dim=-1).to(self._dtype)
        self._layers[layer].view(-1, self._width).index_copy_(0, placement.slots, entries)

    def rows(
        self, *, layer: int, sequence: int, length: int
    ) -> tuple[Float[Tensor, "past latent"], Float[Tensor, "past rope"]]:
        """Return the first `length` latents and rope keys of one sequence: views, good until the next append."""
        held = self._lengths[layer][sequence]
        assert length <= held, f"{length} rows asked of sequence {sequence} at layer {layer}, {held} are held"
        rows = self._layers[layer][sequence, :length]
        return rows[:, : self._latent_width], rows[:, self._latent_width :]

    def truncate(self, sequence: int, *, length: int) -> None:
        """Forget all but the first `length` tokens of one sequence, at every layer."""
        if not 0 <= length <= self.length(sequence):
            raise ConfigError(f"sequence {sequence} holds {self.length(sequence)} tokens; it cannot be cut to {length}")
        for lengths in self._lengths:
            lengths[sequence] = min(lengths[sequence], length)

    def _place(self, batch: TokenBatch) -> _Placement:
        if self._placement is None or self._placement.batch is not batch:
            ends = self._ends(batch)
            self._reserve(max(ends, default=0))
            owners = torch.arange(len(ends)).repeat_interleave(batch.starts.diff()).to(batch.positions.device)
            self._placement = _Placement(batch=batch, slots=owners * self._reserved + batch.positions, ends=ends)
        return self._placement

    def _ends(self, batch: TokenBatch) -> tuple[int, ...]:
        if len(batch.lengths) > self.num_sequences:
            raise ConfigError(
                f"a batch of {len(batch.lengths)} sequences does not fit a cache of {self.num_sequences}; "
                "make the cache with as many sequences as the batch has"
            )
        positions, bounds = batch.positions.tolist(), pairwise(batch.starts.tolist())
        ends = []
        for sequence, (begin, end) in enumerate(bounds):
            first = positions[begin] if end > begin else self.length(sequence)
            last = first + end - begin
            assert positions[begin:end] == list(range(first, last)), "positions within a sequence must rise by one"
            if last > self.capacity:
                raise ConfigError(
                    f"sequence {sequence} would reach {last} tokens, and the cache was made for {self.capacity}; "
                    "give it a larger capacity or generate less"
                )
            ends.append(last)
        return tuple(ends)

    def _reserve(self, length: int) -> None:
        if length <= self._reserved:
            return
        reserved = min(self.capacity, max(length, 2 * self._reserved))
        grown = [self._new_layer(reserved, device=storage.device) for storage in self._layers]
        for larger, storage in zip(grown, self._layers, strict=True):
            larger[:, : self._reserved].copy_(storage)
        # Both change at once, after all that can fail: Ctrl-C in the middle of an answer must leave a whole cache.
        self._layers, self._reserved = grown, reserved

    def _new_layer(self, reserved: int, *, device: torch.device | str) -> Float[Tensor, "sequence reserved width"]:
        # An ordinary tensor even when asked for in inference mode, so that a cache can outlive that mode.
        with torch.inference_mode(False):
            return torch.zeros(self.num_sequences, reserved, self._width, dtype=self._dtype, device=device)
