"""The product of two quantised matrices, as the report computes it: the plain form.

    for every 128 of K:   total += (a_k @ b_k) * (scale of a, row by row) * (scale of b, column by column)

The sum over 128 products stays in the tensor core, whose accumulator keeps about 14 bits; the total is FP32. Here the
inner sum is FP32 too unless `accumulator` says otherwise. Source: report 3.3.2, 'Increasing Accumulation Precision'.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from dsv3.fp8.formats import TILE
from dsv3.fp8.quantise import Quantised

CHAIN = 4
"""Products that a truncating accumulator takes in at once. Not published: 4 comes nearest to the report's 2%."""


@dataclass(frozen=True, kw_only=True)
class Accumulator:
    """A sum that is cut off to `bits` significant bits each time a chain of products is added to it."""

    bits: int = 14
    promote_every: int | None = None
    """Products after which it is emptied into an FP32 total; None: never, it holds the whole sum."""


HOPPER = Accumulator(bits=14)
HOPPER_PROMOTED = Accumulator(bits=14, promote_every=TILE)


def multiply(a: Quantised, b: Quantised, *, accumulator: Accumulator | None = None) -> Float[Tensor, "row column"]:
    """Return a @ b.T in FP32: `a` is row x depth, `b` column x depth, both with one scale a row in 128 of depth."""
    rows, depth = a.values.shape
    columns = b.values.shape[0]
    total = torch.zeros(rows, columns, device=a.values.device)
    held = torch.zeros_like(total)
    step = TILE if accumulator is None else CHAIN
    for start in range(0, depth, step):
        here = slice(start, min(start + step, depth))
        part = a.values[:, here].to(torch.float32) @ b.values[:, here].to(torch.float32).T
        part *= row_scales(a, at=start)[:, None] * row_scales(b, at=start)[None, :]
        if accumulator is None:
            total += part
            continue
        held = truncate(held + part, bits=accumulator.bits)
        if accumulator.promote_every and here.stop % accumulator.promote_every == 0:
            total += held
            held.zero_()
    return total + held if accumulator is not None else total


def row_scales(x: Quantised, *, at: int) -> Float[Tensor, " row"]:
    """Return the scale of every row at one place of depth."""
    return x.scales[:, at // x.tile[1]].repeat_interleave(x.tile[0])[: x.values.shape[0]]


def truncate(x: Float[Tensor, "*any"], *, bits: int) -> Float[Tensor, "*any"]:
    """Return x with all but its `bits` highest significant bits cleared: rounded towards zero. NaN and infinity stay.

    FP32 has 24 significant bits; a 14-bit accumulator keeps 13 after the leading one.
    """
    kept = (x.view(torch.int32) & ~((1 << (24 - bits)) - 1)).view(torch.float32)
    return torch.where(x.isfinite(), kept, x)
