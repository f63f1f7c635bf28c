"""Ranks that hold the same weights divide the rows of each among them, and with them the optimizer's state (ZeRO-1)."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from dsv3.parallel.layout import Sharers
from dsv3.parallel.link import Link, all_gather_single, reduce_scatter_single


def reduce_rows(gradients: Sequence[Tensor], *, sharers: Sharers, link: Link) -> None:
    """Sum gradients over `sharers`, in place, in the rows that are this rank's own; the others are left as they are."""
    parts = [
        torch.cat([gradient[sharers.rows(len(gradient), place=place)].reshape(-1) for gradient in gradients])
        for place in range(sharers.size)
    ]
    room = max(map(len, parts))
    padded = torch.cat([nn.functional.pad(part, (0, room - len(part))) for part in parts])
    total = padded.new_empty(room)
    with link.waiting():
        reduce_scatter_single(total, padded, group=sharers.group)
    own = [gradient[sharers.rows(len(gradient), place=sharers.place)] for gradient in gradients]
    _fill(own, values=total[: len(parts[sharers.place])])


def gather_rows(
    rows: Mapping[str, Tensor], *, like: Mapping[str, Tensor], sharers: Sharers, link: Link
) -> dict[str, Tensor]:
    """Return tensors of the shapes of `like`, made of the rows that each of `sharers` has."""
    mine = torch.cat([tensor.reshape(-1) for tensor in rows.values()])
    whole = {name: torch.empty_like(like[name], dtype=mine.dtype) for name in rows}
    targets = [
        [tensor[sharers.rows(len(tensor), place=place)] for tensor in whole.values()] for place in range(sharers.size)
    ]
    counts = [sum(target.numel() for target in of_place) for of_place in targets]
    received = mine.new_empty(sharers.size * max(counts))
    with link.waiting():
        sent = nn.functional.pad(mine, (0, max(counts) - len(mine)))
        all_gather_single(received, sent, group=sharers.group)
    for of_place, count, part in zip(targets, counts, received.split(max(counts)), strict=True):
        _fill(of_place, values=part[:count])
    return whole


def _fill(tensors: Sequence[Tensor], *, values: Tensor) -> None:
    """Copy consecutive values into tensors, one after the other."""
    for tensor, part in zip(tensors, values.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))
