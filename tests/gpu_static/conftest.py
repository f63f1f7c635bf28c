"""What can be said about the code for GPUs without one: devices, types, shapes and layouts of every step.

Tensors are on CUDA but have no memory (torch's FakeTensorMode), so nothing is computed. That takes a CUDA build of
torch, which `make test-gpu-static` has; the ordinary suite skips these tests, all but those on the meta device.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode

POSITION = 70
"""Tokens that are cached of each sequence when one more is decoded."""


class AnswerFromDevice(TorchDispatchMode):
    """Answers what a device without memory cannot: a truth is true, a whole number is `POSITION`."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return True if args[0].dtype == torch.bool else POSITION
        if func is torch.ops.aten.bincount.default:
            return args[0].new_empty(args[2])  # its `minlength`
        return func(*args, **(kwargs or {}))


class OnHost(Tensor):
    """A tensor of the CPU that stays real among fake ones: `TokenBatch.starts`, from which shapes are read."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.to:
            return torch.empty(args[0].shape, dtype=args[0].dtype, device=args[1])
        with unset_fake_temporarily():
            return super().__torch_function__(func, types, args, kwargs or {})


@pytest.fixture
def dispatch():
    """The dispatch of one device, which believes that every expert serves as many tokens as the next, to one."""
    from dsv3.model.moe import LocalDispatch

    class Balanced(LocalDispatch):
        def announce(self, tokens, *, routing):
            rows, experts = routing.experts.numel(), routing.load.shape[0]
            counts = [rows // experts + (expert < rows % experts) for expert in range(experts)]
            routing.load.tolist = lambda: counts
            return super().announce(tokens, routing=routing)

    return Balanced()


@pytest.fixture
def fake_gpu() -> Iterator[None]:
    """While this is there, tensors have a device, a type and a shape, and no memory."""
    if torch.version.cuda is None:
        pytest.skip("needs a CUDA build of torch")
    from dsv3.fp8 import triton_launch

    triton_launch.row_tiles.cache_clear()  # of another test's mode
    with FakeTensorMode(), AnswerFromDevice():
        yield
    triton_launch.row_tiles.cache_clear()


@pytest.fixture
def meta() -> Iterator[None]:
    """While this is there, the meta device answers."""
    with AnswerFromDevice():
        yield


@pytest.fixture
def on_gpu():
    """Bring a batch of the CPU to the fake GPU, with what its shapes depend on."""
    from dsv3.batch import TokenBatch

    def there(x: Tensor | None) -> Tensor | None:
        return None if x is None else torch.empty(x.shape, dtype=x.dtype, device="cuda")

    @dataclass(frozen=True, kw_only=True)
    class OnGpu(TokenBatch):
        real: TokenBatch

        @classmethod
        def of(cls, real: TokenBatch) -> "OnGpu":
            tensors = {name: there(getattr(real, name)) for name in ("tokens", "positions", "targets", "weights")}
            return cls(real=real, starts=real.starts.as_subclass(OnHost), first_positions=real.firsts, **tensors)

        @cached_property
        def lengths(self) -> tuple[int, ...]:
            with unset_fake_temporarily():
                return self.real.lengths

        @cached_property
        def not_last(self) -> Tensor:
            with unset_fake_temporarily():
                kept = self.real.not_last
            return there(kept)

        def ahead(self) -> "OnGpu":
            with unset_fake_temporarily():
                ahead = self.real.ahead()
            return OnGpu.of(ahead)

    return OnGpu.of


@pytest.fixture
def scaled_mm(monkeypatch: pytest.MonkeyPatch):
    """Have every call of torch's `scaled_mm` held to its rules, and give the list of calls.

    The rules are those of torch 2.14 for a GPU of compute capability 9.0, which checks them when it runs.
    """
    own, calls = F.scaled_mm, []

    def checked(
        a: Tensor, b: Tensor, *, scale_a: Tensor, scale_recipe_a: Any, scale_b: Tensor, **others: Any
    ) -> Tensor:
        recipe_b = others["scale_recipe_b"]
        (rows, depth), columns, tiles = a.shape, b.shape[1], -(-a.shape[1] // 128)
        require(a.is_contiguous(), "a lies row by row")
        require(b.T.is_contiguous(), "b lies column by column")
        require(depth % 16 == 0 and columns % 16 == 0, "depth and columns are multiples of 16")
        require(scale_recipe_a == F.ScalingType.BlockWise1x128, "a has a scale for 128 of a row")
        require(lies(scale_a, shape=(rows, tiles)), "scales of a lie tile by tile")
        if recipe_b == F.ScalingType.BlockWise1x128:
            require(lies(scale_b, shape=(columns, tiles)), "scales of b lie tile by tile")
        else:
            filled = -(-tiles // 4) * 4
            require(lies(scale_b, shape=(filled, -(-columns // 128))), "scales of b lie depth by depth, filled up to 4")
        require(a.dtype == b.dtype == torch.float8_e4m3fn, "operands are E4M3")
        require(scale_a.dtype == scale_b.dtype == torch.float32, "scales are FP32")
        calls.append(recipe_b.name)
        return own(a, b, scale_a=scale_a, scale_recipe_a=scale_recipe_a, scale_b=scale_b, **others)

    monkeypatch.setattr(F, "scaled_mm", checked)
    return calls


def require(holds: bool, rule: str) -> None:
    if not holds:
        raise ValueError(f"scaled_mm was called against its rule: {rule}")


def lies(scales: Tensor, *, shape: tuple[int, int]) -> bool:
    """Whether scales have this shape and lie in memory one column after the other."""
    return tuple(scales.shape) == shape and scales.stride(0) == 1 and (shape[1] == 1 or scales.stride(1) == shape[0])
