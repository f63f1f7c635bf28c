"""The product of two quantised matrices, as the report computes it: the plain form.

    for every 128 of K:   total += (a_k @ b_k) * (scale of a, row by row) * (scale of b, column by column)

The sum over 128 products stays in the tensor core, whose accumulator keeps 14 bits; the total is FP32. Here the inner
sum is FP32 too unless `accumulator` says otherwise. Source: report 3.3.2, 'Increasing Accumulation Precision'.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from dsv3.fp8.formats import TILE
from dsv3.fp8.quantise import Quantised

AT_ONCE = 32
"""Products that a tensor core of Hopper adds at once: the depth of its FP8 instruction."""


@dataclass(frozen=True, kw_only=True)
class Accumulator:
    """The sum of a tensor core, as H100 and H200 compute it in FP8: measured by us, and theirs to the last bit.

    32 products and the sum so far are cut off, towards zero, `bits` - 1 places below the largest exponent among them,
    that of a product being the sum of its factors'; they are added exactly, and the new sum is cut to `bits`
    significant bits.
    """

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
    step = TILE if accumulator is None else AT_ONCE
    for start in range(0, depth, step):
        here = slice(start, min(start + step, depth))
        parts = [x.values[:, here].to(torch.float32) for x in (a, b)]
        scales = [row_scales(x, at=start) for x in (a, b)]
        if accumulator is None:
            total += (parts[0] @ parts[1].T) * (scales[0][:, None] * scales[1][None, :])
            continue
        scaled = [part * scale[:, None] for part, scale in zip(parts, scales, strict=True)]
        held = add_products(held, *scaled, bits=accumulator.bits)
        if accumulator.promote_every and here.stop % accumulator.promote_every == 0:
            total += held
            held.zero_()
    return total + held if accumulator is not None else total


def add_products(
    held: Float[Tensor, "row column"],
    a: Float[Tensor, "row product"],
    b: Float[Tensor, "column product"],
    *,
    bits: int,
) -> Float[Tensor, "row column"]:
    """Return a tensor core's sum after it took in up to 32 products; see `Accumulator`."""
    terms = torch.cat((a[:, None, :] * b[None, :, :], held[:, :, None]), dim=2).double()
    of_products = exponents(a)[:, None, :] + exponents(b)[None, :, :]
    highest = torch.cat((of_products, exponents(held)[:, :, None]), dim=2).amax(2, keepdim=True)
    places = bits - 1 - highest
    exact = torch.ldexp(torch.ldexp(terms, places).trunc().sum(2, keepdim=True), -places)
    # A term that is infinite or NaN has no exponent, and makes the sum what it makes any sum.
    exact = torch.where(terms.isfinite().all(2, keepdim=True), exact, terms.sum(2, keepdim=True))
    return truncate(exact.squeeze(2).to(torch.float32), bits=bits)


def exponents(x: Float[Tensor, "*any"]) -> Tensor:
    """Return floor(log2 |x|) as whole numbers, and one far below all others for zeros."""
    return torch.where((x == 0) | ~x.isfinite(), -1000, torch.frexp(x).exponent - 1)


def row_scales(x: Quantised, *, at: int) -> Float[Tensor, " row"]:
    """Return the scale of every row at one place of depth."""
    return x.scales[:, at // x.tile[1]].repeat_interleave(x.tile[0])[: x.values.shape[0]]


def truncate(x: Float[Tensor, "*any"], *, bits: int) -> Float[Tensor, "*any"]:
    """Return x with all but its `bits` highest significant bits cleared: rounded towards zero. NaN and infinity stay.

    FP32 has 24 significant bits; a 14-bit accumulator keeps 13 after the leading one.
    """
    kept = (x.view(torch.int32) & ~((1 << (24 - bits)) - 1)).view(torch.float32)
    return torch.where(x.isfinite(), kept, x)
