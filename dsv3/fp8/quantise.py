"""FP32 to FP8 with a scale for each tile, and back: the plain form, which runs on any device.

    1 x 128      activations and their gradients: one scale for 128 channels of one token
    128 x 128    weights: one scale for a block, so that W and its transpose have the same scales
    128 x 1      what Wgrad sums over, tokens: 1 x 128 of the transposed matrix
    whole        one scale for the tensor, as other frameworks do it (not the report's)

Source: report 3.3.2, 'Fine-Grained Quantization'.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from dsv3.fp8.formats import LARGEST, TILE, scale_for


@dataclass(frozen=True, kw_only=True)
class Form:
    """How an operand of a product is quantised."""

    tile: tuple[int, int] | None
    """Rows and columns that share a scale; None: the whole matrix."""
    dtype: torch.dtype = torch.float8_e4m3fn
    power_of_two: bool = False
    """Whether scales are rounded up to powers of two."""

    def tile_of(self, rows: int, columns: int) -> tuple[int, int]:
        """Return the size of a tile in a matrix of the given size."""
        return self.tile or (max(rows, 1), max(columns, 1))


TILES = Form(tile=(1, TILE))
BLOCKS = Form(tile=(TILE, TILE))
WHOLE = Form(tile=None)


@dataclass(frozen=True, kw_only=True)
class Quantised:
    """Matrices in FP8 with the scale of each tile. The last two dims are a matrix; scales have the same dims before."""

    values: Float[Tensor, "*batch row column"]
    scales: Float[Tensor, "*batch row_tile column_tile"]
    """What to multiply by. The last tile of a row or column may be cut off by the edge of the matrix."""
    tile: tuple[int, int]

    @property
    def num_bytes(self) -> int:
        """Memory of values and scales."""
        return self.values.nbytes + self.scales.nbytes

    @property
    def T(self) -> "Quantised":  # noqa: N802 (as on a tensor)
        """The transposed matrix, which is the same memory."""
        return Quantised(values=self.values.mT, scales=self.scales.mT, tile=(self.tile[1], self.tile[0]))

    def __getitem__(self, index: int) -> "Quantised":
        """Return one of several matrices."""
        return Quantised(values=self.values[index], scales=self.scales[index], tile=self.tile)


def tiles_of(rows: int, columns: int, *, tile: tuple[int, int]) -> tuple[int, int]:
    """Return how many tiles a matrix has down and across, those that the edge cuts off included."""
    return -(-rows // tile[0]), -(-columns // tile[1])


def quantise(x: Float[Tensor, "*batch row column"], *, form: Form) -> Quantised:
    """Return x in FP8, each tile divided by its scale and rounded to the nearest value, ties to even."""
    rows, columns = x.shape[-2:]
    tile = form.tile_of(rows, columns)
    scales = scale_for(
        largest_in_tiles(x, tile=tile), largest_of_format=LARGEST[form.dtype], power_of_two=form.power_of_two
    )
    scaled = x.to(torch.float32) / spread(scales, rows=rows, columns=columns, tile=tile)
    return Quantised(values=scaled.to(form.dtype), scales=scales, tile=tile)


def dequantise(x: Quantised) -> Float[Tensor, "*batch row column"]:
    """Return the matrices in FP32; exact for scales that `scale_for` made."""
    rows, columns = x.values.shape[-2:]
    return x.values.to(torch.float32) * spread(x.scales.to(torch.float32), rows=rows, columns=columns, tile=x.tile)


def largest_in_tiles(
    x: Float[Tensor, "*batch row column"], *, tile: tuple[int, int]
) -> Float[Tensor, "*batch row_tile column_tile"]:
    """Return the largest magnitude of each tile in FP32; NaN if one is in it."""
    rows, columns = x.shape[-2:]
    down, across = tiles_of(rows, columns, tile=tile)
    padded = x.new_zeros((*x.shape[:-2], down * tile[0], across * tile[1]), dtype=torch.float32)
    padded[..., :rows, :columns] = x.abs()
    return padded.unflatten(-1, (across, tile[1])).unflatten(-3, (down, tile[0])).amax(dim=(-3, -1))


def spread(
    scales: Float[Tensor, "*batch row_tile column_tile"], *, rows: int, columns: int, tile: tuple[int, int]
) -> Float[Tensor, "*batch row column"]:
    """Return the scale of every element: each repeated over its tile, cut off at the edges."""
    down = scales.repeat_interleave(tile[0], dim=-2)[..., :rows, :]
    return down.repeat_interleave(tile[1], dim=-1)[..., :columns]
