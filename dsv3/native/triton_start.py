"""How every Triton kernel is started."""

from typing import Any

import torch
from torch import Tensor, nn


def start_kernel(kernel: Any, grid: tuple[int, ...], *arguments: Any, **settings: Any) -> None:
    """Run a kernel on the device of its tensors, unless there is nothing to do or no memory to do it in.

    Arguments are numbers, tensors, or Triton's descriptors of tensors.
    """
    held = [getattr(argument, "base", argument) for argument in arguments]
    tensors = [argument for argument in held if isinstance(argument, Tensor)]
    if 0 in grid or any(type(x) not in (Tensor, nn.Parameter) or x.is_meta for x in tensors):
        return
    with torch.cuda.device_of(tensors[0]):
        # Said outright, since Triton is changing the default: a product and the sum it goes into round once.
        kernel[grid](*arguments, **settings, enable_fp_fusion=True)
