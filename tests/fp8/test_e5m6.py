"""E5M6 against the format written out: 1 sign, 5 exponent bits with bias 15, 6 mantissa bits, no infinity, no NaN."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsv3.fp8.e5m6 import E5M6_MAX, dequantise_e5m6, quantise_e5m6, round_to_e5m6
from dsv3.fp8.formats import SMALLEST_SCALE

LADDER = torch.tensor(
    [m * 2.0**-20 for m in range(64)] + [(1 + m / 64) * 2.0**e for e in range(-14, 16) for m in range(64)],
    dtype=torch.float64,
)
"""Every number of the format that is not negative, in its order: 31 x 64 of them, so that its index is its code."""


def random(rows, columns, *, seed=0, spread=0.0):
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randn(rows, columns, generator=generator)
    return numbers * torch.exp2(spread * torch.randn(rows, columns, generator=generator))


def tile_scales(packed, *, columns):
    return packed.scales.double().repeat_interleave(128, dim=1)[:, :columns]


def test_the_largest_number_is_that_of_the_ladder():
    assert LADDER[-1].item() == E5M6_MAX == 65_024.0


def test_every_number_of_the_format_is_kept_and_every_middle_goes_to_the_even_one():
    both = torch.cat((LADDER, -LADDER))[None].float()
    assert torch.equal(round_to_e5m6(both), both)
    index = torch.arange(len(LADDER) - 1)
    middle = ((LADDER[:-1] + LADDER[1:]) / 2)[None].float()
    even = LADDER[torch.where(index % 2 == 0, index, index + 1)][None].float()
    assert torch.equal(round_to_e5m6(middle), even)
    assert torch.equal(round_to_e5m6(-middle), -even)


def test_beside_a_middle_the_nearer_one_is_taken():
    middle = ((LADDER[:-1] + LADDER[1:]) / 2).float()
    above = torch.nextafter(middle, torch.tensor(float("inf")))[None]
    below = torch.nextafter(middle, torch.tensor(0.0))[None]
    assert torch.equal(round_to_e5m6(above), LADDER[None, 1:].float())
    assert torch.equal(round_to_e5m6(below), LADDER[None, :-1].float())


def test_every_code_survives_the_packing():
    """All 2 x 31 x 64 numbers in tiles that hold the largest, so that the scale is 1."""
    numbers = torch.cat((LADDER, -LADDER)).float().view(-1, 64)
    x = torch.cat((numbers, torch.full((len(numbers), 1), E5M6_MAX)), dim=1)
    stored = quantise_e5m6(x)
    assert (stored.scales == 1.0).all()
    assert torch.equal(dequantise_e5m6(stored), x)


def test_two_numbers_lie_in_three_bytes_as_described():
    """Code 1 is 2^-20; 0x7DF is the largest, the 31 * 64 - 1st; the sign is the twelfth bit."""
    stored = quantise_e5m6(torch.tensor([[2.0**-20, -65_024.0]]))
    first, second = 0x001, 0x800 | (31 * 64 - 1)
    expected = [first & 0xFF, first >> 8 | (second & 0xF) << 4, second >> 4]
    assert stored.packed.tolist() == [expected]


@pytest.mark.parametrize("columns", [1, 2, 3, 127, 128, 129, 255, 1000])
def test_twelve_bits_a_number_and_odd_widths(columns):
    x = random(5, columns, seed=columns)
    stored = quantise_e5m6(x)
    assert stored.packed.shape == (5, (columns + 1) // 2 * 3)
    assert stored.packed.dtype == torch.uint8
    assert stored.scales.shape == (5, -(-columns // 128))
    back = dequantise_e5m6(stored)
    assert back.shape == x.shape
    assert torch.allclose(back, x, rtol=2**-7, atol=1e-6)


@given(
    rows=st.integers(1, 6),
    columns=st.integers(1, 300),
    exponent=st.integers(-60, 60),
    seed=st.integers(0, 2**16),
)
def test_normal_numbers_err_by_2_to_the_minus_7_at_most_and_smaller_ones_by_half_a_step(rows, columns, exponent, seed):
    x = random(rows, columns, seed=seed, spread=5.0) * 2.0**exponent
    stored = quantise_e5m6(x)
    scale = tile_scales(stored, columns=columns)
    error = (dequantise_e5m6(stored).double() - x.double()).abs()
    normal = x.double().abs() >= scale * 2.0**-14
    assert (error[normal] <= 2.0**-7 * x.double().abs()[normal]).all()
    assert (error[~normal] <= 2.0**-21 * scale[~normal]).all()


def test_the_numbers_are_those_of_the_definition_in_fp64():
    """Scale: the largest of 128 over 65,024, up to a power of two. Number: the nearest of the ladder, even at ties."""
    x = random(4, 300, seed=1, spread=4.0)
    back = dequantise_e5m6(quantise_e5m6(x)).double()
    for row in range(4):
        for start in range(0, 300, 128):
            tile = x[row, start : start + 128].double()
            scale = 2.0 ** torch.ceil(torch.log2(tile.abs().max() / 65_024))
            distance = (LADDER[None] - (tile.abs() / scale)[:, None]).abs()
            nearest = LADDER[distance.argmin(dim=1)] * tile.sign() * scale
            assert torch.equal(back[row, start : start + 128], nearest)


def test_a_second_time_changes_no_number():
    x = random(6, 500, seed=2, spread=4.0)
    once = dequantise_e5m6(quantise_e5m6(x))
    assert torch.equal(dequantise_e5m6(quantise_e5m6(once)), once)


def test_bf16_is_taken_as_the_fp32_it_stands_for():
    x = random(3, 200, seed=3).bfloat16()
    assert torch.equal(quantise_e5m6(x).packed, quantise_e5m6(x.float()).packed)


def test_zeros_and_numbers_too_small_come_back_as_zeros():
    x = torch.zeros(2, 130)
    x[1, 3] = 2.0**-149
    stored = quantise_e5m6(x)
    assert (stored.scales == SMALLEST_SCALE).all()
    assert torch.equal(dequantise_e5m6(stored), torch.zeros(2, 130))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_one_number_that_is_none_makes_its_tile_nan_and_no_other(bad):
    x = random(3, 300, seed=4)
    clean = dequantise_e5m6(quantise_e5m6(x))
    x[1, 130] = bad
    back = dequantise_e5m6(quantise_e5m6(x))
    assert back[1, 128:256].isnan().all()
    back[1, 128:256] = clean[1, 128:256]
    assert torch.equal(back, clean)
