"""The Triton kernels on a GPU: quantised bits are the plain form's, products are those of FP64."""

from dataclasses import replace

import pytest
import torch

from dsv3.fp8.e5m6 import dequantise_e5m6
from dsv3.fp8.kernels import PlainKernels
from dsv3.fp8.quantise import BLOCKS, TILES, WHOLE, Form, Quantised, dequantise

pytest.importorskip("triton")
PLAIN = PlainKernels()
BOUND = 1e-3
"""Of the largest result: sums of 128 products in the tensor core, which keeps 13 bits after the leading one of the
largest product, and FP32 from there on. Without promotion it would grow with the depth (report 3.3.2)."""
FORMS = [TILES, replace(TILES, power_of_two=True), replace(TILES, dtype=torch.float8_e5m2)]


@pytest.fixture
def kernels(hopper):
    from dsv3.fp8.gpu import GpuKernels

    return GpuKernels(scaled_mm=False)


def hard(rows: int, columns: int, *, seed: int = 0) -> torch.Tensor:
    """Numbers of every size, and in the first rows all that could go wrong in a tile."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator)
    exponents = torch.randint(-40, 40, (rows, -(-columns // 128)), generator=generator)
    x *= torch.exp2(exponents.float()).repeat_interleave(128, dim=1)[:, :columns]
    strange = [0.0, -0.0, 1e-45, -1e-40, 2.0**-120, 3.3e38, float("nan"), float("inf"), -float("inf"), 448.0]
    for index, number in enumerate(strange):
        x[index % rows, 7 * index % columns] = number
    return x


def numbers(*shape: int, seed: int = 0, device: torch.device) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


def same_bits(ours: torch.Tensor, plain: torch.Tensor) -> bool:
    a, b = ours.cpu().float(), plain.cpu().float()
    nan = a.isnan() & b.isnan()
    return torch.equal(*(x.masked_fill(nan, 0).view(torch.int32) for x in (a, b)))


def same(ours: Quantised, plain: Quantised) -> bool:
    return same_bits(ours.values, plain.values) and same_bits(ours.scales, plain.scales)


@pytest.mark.parametrize("form", FORMS, ids=["E4M3", "powers of two", "E5M2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(300, 1000), (1, 128), (129, 7)], ids=str)
def test_quantised_bits_are_those_of_the_plain_form(kernels, hopper, form, dtype, shape):
    x = hard(*shape).to(dtype)
    there = x.to(hopper)
    blocks = replace(form, tile=BLOCKS.tile)
    assert same(kernels.quantise(there, form=form), PLAIN.quantise(x, form=form))
    assert same(kernels.quantise(there[None], form=blocks), PLAIN.quantise(x[None], form=blocks))
    groups = (shape[0] // 3, 0, shape[0] - shape[0] // 3)
    ours = kernels.quantise_over_tokens(there, form=form, rows_per_group=groups)
    plain = PLAIN.quantise_over_tokens(x, form=form, rows_per_group=groups)
    assert all(same(ours.group(g), plain.group(g)) for g in range(3))
    tiles, tiles_there = PLAIN.quantise(x, form=form), kernels.quantise(there, form=form)
    ours = kernels.requantise_over_tokens(tiles_there, form=form, rows_per_group=groups)
    plain = PLAIN.requantise_over_tokens(tiles, form=form, rows_per_group=groups)
    assert all(same(ours.group(g), plain.group(g)) for g in range(3))
    assert same_bits(kernels.dequantise(tiles_there), PLAIN.dequantise(tiles))


def test_e5m6_is_that_of_the_plain_form(kernels, hopper):
    x = hard(300, 1001)
    ours, plain = kernels.quantise_e5m6(x.to(hopper)), PLAIN.quantise_e5m6(x)
    assert same_bits(ours.scales, plain.scales)
    assert same_bits(kernels.dequantise_e5m6(ours), dequantise_e5m6(plain))
    finite = x.clone().nan_to_num_(0, 0, 0)  # the sign of a NaN is each processor's own
    assert torch.equal(kernels.quantise_e5m6(finite.to(hopper)).packed.cpu(), PLAIN.quantise_e5m6(finite).packed)


def test_swiglu_quantised_is_swiglu_and_then_quantised(kernels, hopper):
    gate_up, factors = numbers(300, 512, device=hopper), numbers(300, seed=1, device=hopper)
    ours = kernels.quantise_swiglu(gate_up, factors=factors, form=TILES)
    gate, up = gate_up.double().chunk(2, dim=1)
    exact = torch.nn.functional.silu(gate) * up * factors.double()[:, None]
    tile = ours.scales.double().repeat_interleave(128, dim=1)
    assert ((kernels.dequantise(ours).double() - exact).abs() <= tile * 16.1).all()  # half a step of E4M3 at 448


@pytest.mark.parametrize("shape", [(3, 7168, 64), (70, 2048, 576), (300, 576, 7168), (131, 300, 7)], ids=str)
@pytest.mark.parametrize("form", [BLOCKS, TILES], ids=["128x128", "1x128"])
@pytest.mark.parametrize("by", ["ours", "scaled_mm"])
def test_a_product_is_that_of_float64(hopper, shape, form, by):
    from dsv3.fp8.gpu import GpuKernels

    kernels = GpuKernels(scaled_mm=False if by == "ours" else None)
    if by == "scaled_mm" and not kernels.scaled_mm:
        pytest.skip(kernels.name)
    rows, depth, columns = shape
    x = kernels.quantise(numbers(rows, depth, device=hopper), form=TILES)
    w = kernels.quantise(numbers(1, columns, depth, seed=1, device=hopper), form=form)
    ours = kernels.multiply(x, weight=w, rows_per_group=(rows,), accumulator=None)
    exact = dequantise(x).double() @ dequantise(w)[0].double().T
    assert relative_error(ours, exact) < BOUND


@pytest.mark.parametrize("groups", [(3, 0, 70, 1), (0, 0, 130, 0), (2000, 1800, 0, 259), (0, 0, 0, 0)], ids=str)
@pytest.mark.parametrize("sizes", [(200, 140), (2048, 512)], ids=str)
def test_products_of_groups_are_those_of_float64(kernels, hopper, groups, sizes):
    depth, columns = sizes
    x, slope = numbers(sum(groups), depth, device=hopper), numbers(sum(groups), columns, seed=2, device=hopper)
    w = kernels.quantise(numbers(4, columns, depth, seed=1, device=hopper), form=BLOCKS)
    common = {"rows_per_group": groups, "accumulator": None}
    for rows, weight in ((x, w), (slope, w.T)):
        tiles = kernels.quantise(rows, form=TILES)
        ours = kernels.multiply(tiles, weight=weight, **common)
        parts = dequantise(tiles).double().split(list(groups))
        exact = torch.cat([p @ m.T for p, m in zip(parts, dequantise(weight).double(), strict=True)])
        if sum(groups):
            assert relative_error(ours, exact) < BOUND
    a, b = (kernels.quantise_over_tokens(y, form=TILES, rows_per_group=groups) for y in (slope, x))
    made = kernels.weight_gradients(a, rows=b, accumulator=None)
    for group, count in enumerate(groups):
        exact = dequantise(a.group(group)).double() @ dequantise(b.group(group)).double().T
        assert relative_error(made[group], exact) < BOUND if count else not made[group].any()


def test_the_plain_form_makes_the_same_bits_on_a_gpu(hopper):
    """Division by a number of the host is multiplication by its reciprocal there, which once moved scales by a bit."""
    x = numbers(1000, 1000, device=hopper) * torch.exp2(20 * numbers(1000, 1, seed=1, device=hopper))
    for form in FORMS:
        assert same(PLAIN.quantise(x, form=form), PLAIN.quantise(x.cpu(), form=form))


def test_one_scale_for_a_whole_matrix_is_multiplied_too(kernels, hopper):
    x = kernels.quantise(numbers(150, 300, device=hopper), form=WHOLE)
    w = kernels.quantise(numbers(1, 40, 300, seed=1, device=hopper), form=replace(WHOLE, dtype=torch.float8_e4m3fn))
    ours = kernels.multiply(x, weight=w, rows_per_group=(150,), accumulator=None)
    assert relative_error(ours, dequantise(x).double() @ dequantise(w)[0].double().T) < BOUND


def test_tiles_that_only_the_plain_form_knows_go_to_it(kernels, hopper):
    x, form = numbers(20, 200, device=hopper), Form(tile=(1, 32))
    assert same(kernels.quantise(x, form=form), PLAIN.quantise(x.cpu(), form=form))


def relative_error(ours: torch.Tensor, exact: torch.Tensor) -> float:
    return ((ours.double() - exact).abs().max() / exact.abs().max()).item()
