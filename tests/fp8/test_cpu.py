"""The C++ kernels of FP8, bit for bit against the plain form."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dsv3 import native
from dsv3.fp8.cpu import CpuKernels
from dsv3.fp8.e5m6 import dequantise_e5m6, quantise_e5m6
from dsv3.fp8.gemm import HOPPER, HOPPER_PROMOTED
from dsv3.fp8.kernels import PlainKernels
from dsv3.fp8.quantise import BLOCKS, TILES, Form

PLAIN, FAST = PlainKernels(), CpuKernels()
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
FORMS = [
    Form(tile=tile, dtype=dtype, power_of_two=power_of_two)
    for tile in ((1, 128), (128, 128), (7, 16), None)
    for dtype in (E4M3, E5M2)
    for power_of_two in (False, True)
]


pytestmark = pytest.mark.usefixtures("our_kernels")


def same(a: Tensor, b: Tensor) -> bool:
    """Whether all numbers are the same, and NaN where the other is."""
    a, b = a.float(), b.float()
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))


def hard_numbers(*shape: int, seed: int) -> Tensor:
    """Numbers over all of FP32's range, with zeros, subnormals, NaN and infinity among them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator) * torch.exp2(torch.randn(*shape, generator=generator) * 40)
    x = x.clamp(-3e38, 3e38)
    kind = torch.randint(0, 4000, shape, generator=generator)
    x[kind < 400] = 0.0
    x[(kind >= 400) & (kind < 410)] = 1e-40
    x[kind == 500] = float("nan")
    x[kind == 501] = -float("inf")
    return x


@settings(max_examples=40)
@given(
    rows=st.integers(1, 300),
    columns=st.integers(1, 300),
    form=st.sampled_from(FORMS),
    hard=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_quantised_bits_are_those_of_the_plain_form(rows, columns, form, hard, seed):
    x = hard_numbers(rows, columns, seed=seed) if hard else torch.randn(rows, columns)
    wanted, got = PLAIN.quantise(x, form=form), FAST.quantise(x, form=form)
    assert same(got.scales, wanted.scales)
    assert same(got.values, wanted.values)
    assert same(FAST.dequantise(got), PLAIN.dequantise(wanted))
    assert same(FAST.dequantise(got.T), PLAIN.dequantise(wanted.T))


@settings(max_examples=40)
@given(
    groups=st.lists(st.integers(0, 200), min_size=1, max_size=5),
    columns=st.integers(1, 150),
    form=st.sampled_from([form for form in FORMS if form.tile in ((1, 128), None)]),
    hard=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_bits_over_tokens_are_those_of_the_plain_form(groups, columns, form, hard, seed):
    shape = (sum(groups), columns)
    x = hard_numbers(*shape, seed=seed) if hard else torch.randn(shape)
    kept = PLAIN.quantise(x, form=TILES)
    for wanted, got in (
        (
            PLAIN.quantise_over_tokens(x, form=form, rows_per_group=groups),
            FAST.quantise_over_tokens(x, form=form, rows_per_group=groups),
        ),
        (
            PLAIN.requantise_over_tokens(kept, form=form, rows_per_group=groups),
            FAST.requantise_over_tokens(kept, form=form, rows_per_group=groups),
        ),
    ):
        assert same(got.scales, wanted.scales)
        assert same(got.values, wanted.values)
        assert got.rows_per_group == wanted.rows_per_group


@given(rows=st.integers(1, 20), columns=st.integers(1, 300), hard=st.booleans(), seed=st.integers(0, 2**16))
def test_e5m6_bits_are_those_of_the_plain_form(rows, columns, hard, seed):
    x = hard_numbers(rows, columns, seed=seed) if hard else torch.randn(rows, columns)
    wanted, got = quantise_e5m6(x), FAST.quantise_e5m6(x)
    assert same(got.scales, wanted.scales)
    assert torch.equal(got.packed, wanted.packed)
    assert same(FAST.dequantise_e5m6(got), dequantise_e5m6(wanted))


def test_every_code_of_both_formats_is_read_as_torch_reads_it():
    codes = torch.arange(256, dtype=torch.uint8)
    for dtype in (E4M3, E5M2):
        quantised = PLAIN.quantise(torch.ones(2, 128), form=Form(tile=(1, 128), dtype=dtype))
        values = codes.view(2, 128).view(dtype)
        object.__setattr__(quantised, "values", values)
        assert same(FAST.dequantise(quantised), values.float() * quantised.scales)


def test_rows_that_lie_further_apart_than_they_are_long_are_read_where_they_lie():
    x = torch.randn(40, 300)[:, 20:220]
    assert same(FAST.quantise(x, form=TILES).values, PLAIN.quantise(x.contiguous(), form=TILES).values)
    wanted = PLAIN.quantise_over_tokens(x.contiguous(), form=TILES, rows_per_group=[40])
    assert same(FAST.quantise_over_tokens(x, form=TILES, rows_per_group=[40]).values, wanted.values)


@pytest.mark.parametrize("accumulator", [None, HOPPER, HOPPER_PROMOTED], ids=["fp32", "14 bits", "promoted"])
@pytest.mark.parametrize("groups", [[300], [100, 0, 150, 50], [0, 0, 300, 0]])
def test_products_agree_with_the_plain_form(accumulator, groups):
    generator = torch.Generator().manual_seed(0)
    rows = PLAIN.quantise(torch.rand(300, 333, generator=generator), form=TILES)
    weight = PLAIN.quantise(torch.rand(len(groups), 140, 333, generator=generator), form=BLOCKS)
    slopes, inputs = (
        PLAIN.quantise_over_tokens(torch.rand(300, width, generator=generator), form=TILES, rows_per_group=groups)
        for width in (77, 90)
    )
    # An accumulator of 14 bits may cut one of its last bits more or less where products differ in FP32's last.
    tolerance = 2.0**-12 if accumulator else 2.0**-17
    for operand in (weight, PLAIN.quantise(torch.rand(len(groups), 333, 140, generator=generator), form=BLOCKS).T):
        wanted, got = (
            kernels.multiply(rows, weight=operand, rows_per_group=groups, accumulator=accumulator)
            for kernels in (PLAIN, FAST)
        )
        assert torch.allclose(got, wanted, rtol=tolerance)
    wanted, got = (kernels.weight_gradients(slopes, rows=inputs, accumulator=accumulator) for kernels in (PLAIN, FAST))
    assert got.shape == (len(groups), 77, 90)
    assert torch.allclose(got, wanted, rtol=tolerance)
    assert all((got[group] == 0).all() for group, count in enumerate(groups) if count == 0)


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_change_no_bit(threads):
    x = torch.randn(700, 260)
    before = torch.get_num_threads()
    alone = [FAST.quantise(x, form=TILES), FAST.quantise(x, form=BLOCKS)]
    over = FAST.quantise_over_tokens(x, form=TILES, rows_per_group=[300, 400])
    try:
        torch.set_num_threads(threads)
        for one, form in zip(alone, (TILES, BLOCKS), strict=True):
            assert same(FAST.quantise(x, form=form).values, one.values)
        assert same(FAST.quantise_over_tokens(x, form=TILES, rows_per_group=[300, 400]).values, over.values)
    finally:
        torch.set_num_threads(before)


def test_without_the_kernels_the_plain_form_serves():
    x = torch.randn(30, 200)
    wanted = FAST.quantise(x, form=TILES)
    native.choose_cpu_kernels("torch")
    assert same(FAST.quantise(x, form=TILES).values, wanted.values)
    assert same(FAST.dequantise(wanted), PLAIN.dequantise(wanted))
