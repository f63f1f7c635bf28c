"""Copies of tokens, out and back: the two gathers around the experts.

Each is the other's derivative, so neither ever scatters: adding rows by index is slow on a CPU, and on a GPU its order,
and with it the rounding, changes from run to run.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dsv3 import native
from dsv3.ops import on_gpu


def copy_to_rows(
    tokens: Float[Tensor, "token hidden"], *, source: Int[Tensor, " row"], origin: Int[Tensor, "token chosen"]
) -> Float[Tensor, "row hidden"]:
    """Return `tokens[source]`. `origin` is the inverse: the rows that are copies of each token."""
    return _CopyToRows.apply(tokens, source, origin)


def sum_to_tokens(
    rows: Float[Tensor, "row hidden"], *, source: Int[Tensor, " row"], origin: Int[Tensor, "token chosen"]
) -> Float[Tensor, "token hidden"]:
    """Return for each token the sum of its rows, `rows[origin].sum(1)`, always in the same order."""
    return _SumToTokens.apply(rows, source, origin)


def add_by_index(
    rows: Float[Tensor, "row hidden"], *, index: Int[Tensor, " row"], num_sums: int
) -> Float[Tensor, "sum hidden"]:
    """Return `num_sums` sums, of the rows with the same index; unlike torch's `index_add`, keep no rows."""
    return _AddByIndex.apply(rows, index, num_sums)


class _AddByIndex(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor, num_sums: int) -> Tensor:
        ctx.save_for_backward(index)
        return rows.new_zeros(num_sums, rows.shape[1]).index_add_(0, index, rows)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (index,) = ctx.saved_tensors
        return gradients[0].index_select(0, index), None, None


class _CopyToRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, source: Tensor, origin: Tensor) -> Tensor:
        ctx.save_for_backward(source, origin)
        return _gather(tokens, source)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        source, origin = ctx.saved_tensors
        return _SumToTokens.apply(gradients[0], source, origin), None, None


class _SumToTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, source: Tensor, origin: Tensor) -> Tensor:
        ctx.save_for_backward(source, origin)
        return _sum(rows, origin)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        source, origin = ctx.saved_tensors
        return _CopyToRows.apply(gradients[0], source, origin), None, None


def _gather(tokens: Tensor, source: Tensor) -> Tensor:
    if not native.usable(tokens):
        return tokens.index_select(0, source)
    tokens, source = tokens.contiguous(), source.contiguous()
    rows = tokens.new_empty(source.shape[0], tokens.shape[1])
    native.call("gather_rows", tokens, source, rows, *rows.shape)
    return rows


def _sum(rows: Tensor, origin: Tensor) -> Tensor:
    if on_gpu.usable(rows):
        return on_gpu.sum_rows(rows, origin=origin)
    if not native.usable(rows):
        total = rows.index_select(0, origin[:, 0])
        for choice in range(1, origin.shape[1]):
            total += rows.index_select(0, origin[:, choice])
        return total
    rows, origin = rows.contiguous(), origin.contiguous()
    tokens, chosen = origin.shape
    total = rows.new_empty(tokens, rows.shape[1])
    native.call("sum_rows", rows, origin, total, tokens, chosen, rows.shape[1])
    return total
