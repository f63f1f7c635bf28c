"""Products of experts over rows grouped by expert, written into memory of the caller; FP32 on the CPU by our kernel."""

from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from dsv3.native import call, multiplies_faster, starts_of, usable


def multiply_rows(
    rows: Float[Tensor, "row in"],
    matrices: Float[Tensor, "expert in out"],
    *,
    output: Float[Tensor, "row out"],
    rows_per_expert: Sequence[int],
) -> None:
    """Write `rows @ matrices[e]` into `output`, with the expert e that each row belongs to."""
    if multiplies_faster() and usable(rows, output) and _is_dense(rows, output):
        starts = starts_of(rows_per_expert)
        size, down, across = matrices.stride()
        num_experts, depth, columns = matrices.shape
        call("grouped_rows", rows, matrices, size, down, across, output, starts, num_experts, columns, depth)
        return
    for expert, (source, target) in enumerate(_slices(rows_per_expert, rows, output)):
        torch.mm(source, matrices[expert], out=target)


def weight_gradients(
    slopes: Float[Tensor, "row out"],
    rows: Float[Tensor, "row in"],
    *,
    output: Float[Tensor, "expert out in"],
    rows_per_expert: Sequence[int],
) -> None:
    """Write `slopes_e.T @ rows_e` into `output[e]`, over the rows of each expert e; zeros for an idle one."""
    if multiplies_faster() and usable(slopes, rows, output) and _is_dense(slopes, rows, output):
        call("grouped_weights", slopes, rows, output, starts_of(rows_per_expert), *output.shape)
        return
    for expert, (slope, row) in enumerate(_slices(rows_per_expert, slopes, rows)):
        torch.mm(slope.T, row, out=output[expert])


def _is_dense(*tensors: Tensor) -> bool:
    return all(tensor.is_contiguous() for tensor in tensors)


def _slices(rows_per_expert: Sequence[int], first: Tensor, second: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the rows of each expert in both tensors, as views. An idle expert has empty ones."""
    for start, end in pairwise(accumulate(rows_per_expert, initial=0)):
        yield first[start:end], second[start:end]
