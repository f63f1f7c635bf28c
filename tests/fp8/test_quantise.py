"""Scales for tiles, blocks and whole matrices: against the definition in FP64, and the properties others build on."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsv3.fp8.formats import LARGEST, SMALLEST_SCALE
from dsv3.fp8.quantise import BLOCKS, TILES, WHOLE, Form, Quantised, dequantise, quantise, tiles_of

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
BITS = {E4M3: 3, E5M2: 2}
"""Bits after the point."""
SMALLEST_EXPONENT = {E4M3: -6, E5M2: -14}
"""Of normal numbers."""

FORMS = {
    "1 x 128": TILES,
    "128 x 128": BLOCKS,
    "128 x 1": Form(tile=(128, 1)),
    "whole": WHOLE,
    "1 x 128, power of two": Form(tile=(1, 128), power_of_two=True),
    "128 x 128, E5M2": Form(tile=(128, 128), dtype=E5M2),
    "3 x 5": Form(tile=(3, 5)),
    "3 x 5, E5M2, power of two": Form(tile=(3, 5), dtype=E5M2, power_of_two=True),
}
every_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())

# Matrices of the released model whose last block is cut off, and how many multipliers they have (published files).
RELEASED = {(576, 7168): (5, 56), (1536, 7168): (12, 56), (24576, 1536): (192, 12), (7168, 2048): (56, 16)}


def random(*shape, seed=0, spread=0.0):
    """Normal numbers; with `spread`, over so many binary orders of magnitude either way."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * torch.exp2(spread * torch.randn(shape, generator=generator))


def bits_of(x: Quantised):
    return x.values.view(torch.uint8), x.scales.view(torch.int32)


def same_bits(one: Quantised, other: Quantised) -> bool:
    return all(torch.equal(a, b) for a, b in zip(bits_of(one), bits_of(other), strict=True))


def scale_of_each(x: Quantised) -> torch.Tensor:
    """The scale of every element, in FP64, found by its own place."""
    rows, columns = x.values.shape[-2:]
    row, column = torch.arange(rows) // x.tile[0], torch.arange(columns) // x.tile[1]
    return x.scales.double()[..., row[:, None], column[None, :]]


def grid(dtype) -> torch.Tensor:
    """Every finite value of the format, in FP64."""
    values = torch.arange(256, dtype=torch.uint8).view(dtype).double()
    return values[values.isfinite()].unique()


def test_released_matrices_have_the_published_number_of_multipliers():
    assert {shape: tiles_of(*shape, tile=(128, 128)) for shape in RELEASED} == RELEASED


def test_a_scale_is_the_largest_magnitude_of_its_block_over_448():
    x = torch.zeros(130, 260)
    x[3, 5], x[129, 200], x[0, 259] = -7.0, 0.25, 448.0
    expected = torch.tensor([[7 / 448, 0, 1], [0, 0.25 / 448, 0]])
    assert torch.allclose(quantise(x, form=BLOCKS).scales, expected, rtol=2**-19, atol=SMALLEST_SCALE)


@every_form
@given(rows=st.integers(1, 20), columns=st.integers(1, 20), exponent=st.integers(-60, 60), seed=st.integers(0, 2**16))
def test_scales_are_the_definition_rounded_up_and_values_the_nearest_there_are(form, rows, columns, exponent, seed):
    """Largest over the format's largest, in FP64; then no value of the format is nearer than the one chosen."""
    x = random(rows, columns, seed=seed, spread=3.0) * 2.0**exponent
    found = quantise(x, form=form)
    down, across = form.tile_of(rows, columns)
    for i, row in enumerate(found.scales.tolist()):
        for j, scale in enumerate(row):
            tile = x[i * down : (i + 1) * down, j * across : (j + 1) * across].double()
            exact = max(float(tile.abs().max()) / LARGEST[form.dtype], SMALLEST_SCALE)
            if form.power_of_two:
                assert exact <= scale * (1 + 2**-22)
                assert scale < 2 * exact * (1 + 2**-22)
                assert torch.frexp(torch.tensor(scale)).mantissa == 0.5
            else:
                assert exact * (1 - 2**-23) <= scale <= exact * (1 + 2**-19 + 2**-23)
    scaled = x.double() / scale_of_each(found)
    chosen = (found.values.double() - scaled).abs()
    nearest = (grid(form.dtype) - scaled[..., None]).abs().amin(dim=-1)
    # The quotient is rounded to FP32 first, which may decide a tie otherwise.
    assert (chosen <= nearest + scaled.abs() * 2**-23).all()


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_ties_go_to_even(dtype):
    ladder = grid(dtype)
    ladder = ladder[ladder >= 0]
    middle = ((ladder[:-1] + ladder[1:]) / 2).float()
    x = torch.cat((middle, ladder[-1:].float()))[None]  # the largest makes the scale 1
    found = quantise(x, form=Form(tile=None, dtype=dtype))
    assert found.scales.item() == 1.0
    assert (found.values.view(torch.uint8)[0, :-1] % 2 == 0).all()


@every_form
def test_normal_numbers_err_by_2_to_the_minus_4_at_most_and_smaller_ones_by_half_a_step(form):
    """Golden test 8 of the fact sheet, for E5M2 with the one bit less that it has."""
    x = random(300, 300, seed=1, spread=4.0)
    found = quantise(x, form=form)
    error = (dequantise(found).double() - x.double()).abs()
    scale = scale_of_each(found)
    bits, smallest = BITS[form.dtype], SMALLEST_EXPONENT[form.dtype]
    normal = x.double().abs() >= scale * 2.0**smallest
    assert normal.float().mean() > 0.05
    assert (error <= 2.0 ** -(bits + 1) * x.double().abs() * (1 + 2**-20))[normal].all()
    assert (error <= 2.0 ** (smallest - bits - 1) * scale * (1 + 2**-20))[~normal].all()
    assert (error[normal] / x.double().abs()[normal]).max() > 0.8 * 2.0 ** -(bits + 1)


@every_form
def test_dequantising_is_exact(form):
    found = quantise(random(140, 270, seed=2, spread=2.0), form=form)
    assert torch.equal(dequantise(found).double(), found.values.double() * scale_of_each(found))


@every_form
@pytest.mark.parametrize("exponent", [-120, -95, -30, 0, 40, 100])
def test_what_was_quantised_once_comes_back_from_a_second_time_unchanged(form, exponent):
    """Bit for bit; where scales are powers of two, a tile may take half the scale and twice the values instead."""
    once = quantise(random(150, 300, seed=3, spread=2.0) * 2.0**exponent, form=form)
    twice = quantise(dequantise(once), form=form)
    assert torch.equal(dequantise(once), dequantise(twice))
    assert form.power_of_two or same_bits(once, twice)


def test_a_power_of_two_can_halve_when_it_is_taken_a_second_time():
    """Why the case above is one of values: 225 is rounded to 224, which fits the next smaller power of two."""
    form = Form(tile=None, power_of_two=True)
    once = quantise(torch.tensor([[2 * 225.0]]), form=form)
    twice = quantise(dequantise(once), form=form)
    assert (once.scales.item(), once.values.item()) == (2.0, 224.0)
    assert (twice.scales.item(), twice.values.item()) == (1.0, 448.0)


@pytest.mark.parametrize("shape", [(128, 256), (130, 70), (1, 300), (257, 129)])
def test_a_matrix_and_its_transpose_have_the_same_blocks(shape):
    x = random(*shape, seed=4, spread=1.0)
    plain, turned = quantise(x, form=BLOCKS), quantise(x.T.contiguous(), form=BLOCKS)
    assert same_bits(Quantised(values=turned.values, scales=turned.scales, tile=turned.tile), plain.T)
    assert torch.equal(dequantise(plain.T), dequantise(plain).T)


def test_tiles_along_columns_are_the_tiles_along_rows_of_the_transpose():
    x = random(200, 150, seed=5, spread=1.0)
    assert same_bits(quantise(x, form=Form(tile=(128, 1))), quantise(x.T.contiguous(), form=TILES).T)


@every_form
@pytest.mark.parametrize("shape", [(1, 1), (1, 129), (129, 1), (127, 255), (130, 257), (256, 128)])
def test_a_last_tile_that_the_edge_cuts_off_is_a_tile_like_the_others(form, shape):
    """As if zeros followed: they change no largest magnitude."""
    x = random(*shape, seed=6, spread=1.0)
    found = quantise(x, form=form)
    down, across = form.tile_of(*shape)
    assert tuple(found.scales.shape) == tiles_of(*shape, tile=(down, across))
    wide = torch.zeros(found.scales.shape[0] * down, found.scales.shape[1] * across)
    wide[: shape[0], : shape[1]] = x
    padded = quantise(wide, form=Form(tile=(down, across), dtype=form.dtype, power_of_two=form.power_of_two))
    assert torch.equal(padded.scales, found.scales)
    assert torch.equal(padded.values.view(torch.uint8)[: shape[0], : shape[1]], found.values.view(torch.uint8))


@every_form
def test_several_matrices_are_quantised_each_by_itself(form):
    x = random(2, 3, 140, 150, seed=7, spread=1.0)
    found = quantise(x, form=form)
    alone = quantise(x[1, 2], form=form)
    assert same_bits(found[1][2], alone)
    assert torch.equal(dequantise(found)[1, 2], dequantise(alone))


@every_form
def test_bf16_is_quantised_as_the_fp32_it_stands_for(form):
    x = random(140, 150, seed=8).bfloat16()
    assert same_bits(quantise(x, form=form), quantise(x.float(), form=form))


@every_form
def test_zeros_come_back_as_zeros_with_the_smallest_scale(form):
    found = quantise(torch.zeros(130, 130), form=form)
    assert (found.scales == SMALLEST_SCALE).all()
    assert torch.equal(dequantise(found), torch.zeros(130, 130))


@every_form
def test_numbers_too_small_for_a_scale_of_their_own_are_rounded_more_coarsely_in_the_end_to_zero(form):
    """2^-100 times the step of the format's subnormals, 2^-9 or 2^-16, is the smallest number that is left."""
    smallest = SMALLEST_SCALE * 2.0 ** (SMALLEST_EXPONENT[form.dtype] - BITS[form.dtype])
    x = torch.tensor([[0.49, 0.5, 0.51, 1.0, -2.4, -0.0]]) * smallest
    found = quantise(x, form=form)
    assert (found.scales == SMALLEST_SCALE).all()
    assert torch.equal(dequantise(found), torch.tensor([[0.0, 0.0, 1.0, 1.0, -2.0, 0.0]]) * smallest)
    denormal = torch.full((1, 3), 2.0**-149)
    assert torch.equal(dequantise(quantise(denormal, form=form)), torch.zeros(1, 3))


@every_form
def test_numbers_near_the_largest_of_fp32_stay_finite(form):
    """Up to 3.1e38: above, a scale rounded up to a power of two can put the largest value of a tile beyond FP32."""
    x = torch.tensor([[3.1e38, -3.1e38, 1e38, 1.0]])
    back = dequantise(quantise(x, form=form))
    assert back.isfinite().all()
    assert torch.allclose(back, x, rtol=2.0 ** -(BITS[form.dtype] + 1), atol=1e33)


def test_the_very_largest_of_fp32_may_become_infinite_but_never_less():
    """The scale of FP32's largest number is rounded up, so 448 times it is too large: seen as infinity, not hidden."""
    back = dequantise(quantise(torch.full((1, 2), torch.finfo(torch.float32).max), form=TILES))
    assert torch.equal(back, torch.full((1, 2), float("inf")))


@every_form
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_one_number_that_is_none_makes_its_tile_nan_and_no_other(form, bad):
    x = random(140, 270, seed=9)
    x[5, 7] = bad
    back = dequantise(quantise(x, form=form))
    down, across = form.tile_of(140, 270)
    same_tile = (torch.arange(140)[:, None] // down == 5 // down) & (torch.arange(270)[None] // across == 7 // across)
    assert back[same_tile].isnan().all()
    x[5, 7] = 0.0
    clean = dequantise(quantise(x, form=form))
    assert torch.equal(back[~same_tile], clean[~same_tile])


@every_form
def test_bytes_are_one_for_a_value_and_four_for_a_scale(form):
    found = quantise(torch.ones(130, 260), form=form)
    down, across = tiles_of(130, 260, tile=form.tile_of(130, 260))
    assert found.num_bytes == 130 * 260 + 4 * down * across


def test_scales_of_any_type_and_size_are_read_as_published_files_may_have_them():
    """With 24 bits, or in BF16; the definition element by element: W[i, j] * s[i // 128, j // 128]."""
    generator = torch.Generator().manual_seed(10)
    for shape, tile in (((5, 7), (2, 3)), ((4, 6), (2, 3)), ((1, 9), (4, 4)), ((130, 140), (128, 128))):
        values = torch.randn(shape, generator=generator).to(E4M3)
        scales = torch.rand(tiles_of(*shape, tile=tile), generator=generator) + 0.1
        for kind in (torch.float32, torch.bfloat16):
            stored = Quantised(values=values, scales=scales.to(kind), tile=tile)
            expected = torch.tensor(
                [
                    [float(values[i, j]) * float(stored.scales[i // tile[0], j // tile[1]]) for j in range(shape[1])]
                    for i in range(shape[0])
                ],
                dtype=torch.float32,
            )
            assert torch.equal(dequantise(stored), expected)
