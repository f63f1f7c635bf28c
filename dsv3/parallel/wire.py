"""How rows of numbers look while they travel: as they are, in BF16, or in FP8 with a scale for each 128 of them.

The report sends tokens to their experts in FP8, and the gradients of the experts' outputs the same way in the backward
pass; what comes back, both times, is in BF16 (3.3.3). Scales on the wire are powers of two, as the products that
follow round them again by the same rule: the second rounding changes nothing.
"""

from dataclasses import replace
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from dsv3.fp8.choose import kernels_for
from dsv3.fp8.quantise import TILES, Quantised, dequantise, tiles_of

FORM = replace(TILES, power_of_two=True)


@runtime_checkable
class Wire(Protocol):
    """A form in which rows travel."""

    def bytes_of(self, columns: int, *, dtype: torch.dtype) -> int:
        """Return the bytes of a row of so many numbers that are computed with in `dtype`."""
        ...

    def encode(self, rows: Float[Tensor, "row column"]) -> Shaped[Tensor, "row sent"]:
        """Return what is sent: a row for each row."""
        ...

    def decode(
        self, sent: Shaped[Tensor, "row sent"], *, columns: int, dtype: torch.dtype
    ) -> Float[Tensor, "row column"]:
        """Return the rows again, in the type they are computed with."""
        ...


class AsComputed:
    """Rows as they are."""

    def bytes_of(self, columns: int, *, dtype: torch.dtype) -> int:
        """Return the bytes of a row."""
        return columns * dtype.itemsize

    def encode(self, rows: Float[Tensor, "row column"]) -> Shaped[Tensor, "row sent"]:
        """Return the rows."""
        return rows.contiguous()

    def decode(
        self, sent: Shaped[Tensor, "row sent"], *, columns: int, dtype: torch.dtype
    ) -> Float[Tensor, "row column"]:
        """Return the rows."""
        del columns, dtype
        return sent


class InBf16:
    """Rows rounded to BF16."""

    def bytes_of(self, columns: int, *, dtype: torch.dtype) -> int:
        """Return the bytes of a row: two a number."""
        del dtype
        return columns * torch.bfloat16.itemsize

    def encode(self, rows: Float[Tensor, "row column"]) -> Shaped[Tensor, "row sent"]:
        """Return rounded rows."""
        return rows.to(torch.bfloat16).contiguous()

    def decode(
        self, sent: Shaped[Tensor, "row sent"], *, columns: int, dtype: torch.dtype
    ) -> Float[Tensor, "row column"]:
        """Return them in a wider type."""
        del columns
        return sent.to(dtype)


class InFp8:
    """Rows in E4M3 with an FP32 scale for each 128 numbers behind them."""

    def bytes_of(self, columns: int, *, dtype: torch.dtype) -> int:
        """Return the bytes of a row: 7,392 for 7,168 numbers."""
        del dtype
        _, across = tiles_of(1, columns, tile=TILE_OF_A_ROW)
        return columns + across * torch.float32.itemsize

    def encode(self, rows: Float[Tensor, "row column"]) -> Shaped[Tensor, "row sent"]:
        """Return the bytes of values and scales."""
        wide = rows.to(torch.float32).contiguous()
        quantised = kernels_for(wide.device).quantise(wide, form=FORM)
        parts = (quantised.values.contiguous(), quantised.scales.contiguous())
        return torch.cat([part.view(torch.uint8) for part in parts], dim=1)

    def decode(
        self, sent: Shaped[Tensor, "row sent"], *, columns: int, dtype: torch.dtype
    ) -> Float[Tensor, "row column"]:
        """Return the rows, which are now those that E4M3 has."""
        values, scales = sent[:, :columns].contiguous(), sent[:, columns:].contiguous()
        _, across = tiles_of(len(sent), columns, tile=TILE_OF_A_ROW)
        quantised = Quantised(
            values=values.view(torch.float8_e4m3fn),
            scales=scales.view(torch.float32).view(len(sent), across),
            tile=TILE_OF_A_ROW,
        )
        return dequantise(quantised).to(dtype)


assert FORM.tile is not None
TILE_OF_A_ROW = FORM.tile
AS_COMPUTED, BF16, FP8 = AsComputed(), InBf16(), InFp8()
