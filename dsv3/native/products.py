"""Products of experts over rows grouped by expert: in FP32 on a CPU by our kernel, in BF16 on a GPU by torch's."""

from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from dsv3.native import call, multiplies_faster, starts_of, usable

GROUPED_BYTES = 16
"""torch's grouped product on a GPU asks that rows of its operands begin at multiples of so many bytes."""


def multiply_rows(
    rows: Float[Tensor, "row in"], matrices: Float[Tensor, "expert in out"], *, rows_per_expert: Sequence[int]
) -> Float[Tensor, "row out"]:
    """Return `rows @ matrices[e]`, with the expert e that each row belongs to."""
    num_experts, depth, columns = matrices.shape
    if _goes_to_torch(rows, matrices):
        return F.grouped_mm(rows, matrices, offs=_ends(rows_per_expert, device=rows.device))
    output = rows.new_empty(rows.shape[0], columns)
    if multiplies_faster() and usable(rows, output) and rows.is_contiguous():
        starts = starts_of(rows_per_expert)
        size, down, across = matrices.stride()
        call("grouped_rows", rows, matrices, size, down, across, output, starts, num_experts, columns, depth)
        return output
    for expert, (source, target) in enumerate(_slices(rows_per_expert, rows, output)):
        torch.mm(source, matrices[expert], out=target)
    return output


def weight_gradients(
    slopes: Float[Tensor, "row out"], rows: Float[Tensor, "row in"], *, rows_per_expert: Sequence[int]
) -> Float[Tensor, "expert out in"]:
    """Return `slopes_e.T @ rows_e`, over the rows of each expert e; zeros for an idle one."""
    if _goes_to_torch(slopes, rows):
        return F.grouped_mm(slopes.T, rows, offs=_ends(rows_per_expert, device=rows.device))
    output = rows.new_empty(len(rows_per_expert), slopes.shape[1], rows.shape[1])
    if multiplies_faster() and usable(slopes, rows, output) and slopes.is_contiguous() and rows.is_contiguous():
        call("grouped_weights", slopes, rows, output, starts_of(rows_per_expert), *output.shape)
        return output
    for expert, (slope, row) in enumerate(_slices(rows_per_expert, slopes, rows)):
        torch.mm(slope.T, row, out=output[expert])
    return output


def _goes_to_torch(rows: Tensor, others: Tensor) -> bool:
    """Whether torch multiplies all groups at once: BF16 on a GPU that has its kernel, rows there are, and aligned."""
    has_memory = type(rows) is Tensor and rows.device.type == "cuda"
    if not has_memory or rows.dtype != torch.bfloat16 or not rows.shape[0]:
        return False
    aligned = all(
        stride == 1 or stride * x.element_size() % GROUPED_BYTES == 0 for x in (rows, others) for stride in x.stride()
    )
    return aligned and torch.cuda.get_device_capability(rows.device) >= (9, 0)


def _ends(rows_per_expert: Sequence[int], *, device: torch.device) -> Tensor:
    return torch.tensor(list(accumulate(rows_per_expert)), dtype=torch.int32).to(device, non_blocking=True)


def _slices(rows_per_expert: Sequence[int], first: Tensor, second: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the rows of each expert in both tensors, as views. An idle expert has empty ones."""
    for start, end in pairwise(accumulate(rows_per_expert, initial=0)):
        yield first[start:end], second[start:end]
