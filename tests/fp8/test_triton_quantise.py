from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3.fp8.e5m6 import dequantise_e5m6, quantise_e5m6
from dsv3.fp8.kernels import PlainKernels
from dsv3.fp8.quantise import BLOCKS, TILES, dequantise, quantise

PLAIN = PlainKernels()
FORMS = {
    "e4m3": TILES,
    "powers of two": replace(TILES, power_of_two=True),
    "e5m2": replace(TILES, dtype=torch.float8_e5m2),
}
# Of the released model: hidden, expert, compressed query, latent with rope key.
WIDTHS = (7168, 2048, 1536, 576)

form_of = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
type_of = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)


@pytest.mark.parametrize("columns", WIDTHS)
def test_tiles_have_the_bits_of_the_plain_form_at_the_widths_of_the_model(launch, hard_numbers, same_bits, columns):
    x = hard_numbers(14, columns).to(torch.bfloat16)
    ours, plain = launch.quantise_rows(x, form=TILES), quantise(x, form=TILES)
    assert same_bits(ours.scales, plain.scales)
    assert same_bits(ours.values, plain.values)


@form_of
@type_of
@pytest.mark.parametrize("columns", [200, 1])
def test_tiles_have_the_bits_of_the_plain_form(launch, hard_numbers, same_bits, form, dtype, columns):
    x = hard_numbers(35, columns).to(dtype)
    ours, plain = launch.quantise_rows(x, form=form), quantise(x, form=form)
    assert same_bits(ours.scales, plain.scales)
    assert same_bits(ours.values, plain.values)
    assert ours.values.dtype == form.dtype
    assert ours.tile == plain.tile


@form_of
@type_of
@pytest.mark.parametrize("shape", [(1, 576, 256), (2, 130, 300), (1, 1, 1)])
def test_blocks_have_the_bits_of_the_plain_form(launch, hard_numbers, same_bits, form, dtype, shape):
    matrices, rows, columns = shape
    x = torch.stack([hard_numbers(rows, columns, seed=seed) for seed in range(matrices)]).to(dtype)
    x[0, 0, 0] = 1.0  # else NaN and infinity are in every block of the small shapes
    form = replace(form, tile=BLOCKS.tile)
    ours, plain = launch.quantise_blocks(x, form=form), quantise(x, form=form)
    assert same_bits(ours.scales, plain.scales)
    assert same_bits(ours.values, plain.values)


@form_of
@type_of
@pytest.mark.parametrize("rows_per_group", [(130, 0, 7, 128), (0, 1, 0)], ids=str)
def test_tiles_over_tokens_have_the_bits_of_the_plain_form(
    launch, hard_numbers, same_bits, form, dtype, rows_per_group
):
    x = hard_numbers(sum(rows_per_group), 200).to(dtype)
    ours = launch.quantise_over_tokens(x, form=form, rows_per_group=rows_per_group)
    plain = PLAIN.quantise_over_tokens(x, form=form, rows_per_group=rows_per_group)
    assert same_bits(ours.scales, plain.scales)
    for group in range(len(rows_per_group)):
        assert same_bits(ours.group(group).values, plain.group(group).values)
        assert same_bits(ours.group(group).scales, plain.group(group).scales)


@form_of
@pytest.mark.parametrize("rows_per_group", [(130, 0, 7, 128)], ids=str)
def test_tiles_over_tokens_from_quantised_rows_have_the_bits_of_the_plain_form(
    launch, hard_numbers, same_bits, form, rows_per_group
):
    rows = quantise(hard_numbers(sum(rows_per_group), 200), form=TILES)
    ours = launch.quantise_over_tokens(rows, form=form, rows_per_group=rows_per_group)
    plain = PLAIN.requantise_over_tokens(rows, form=form, rows_per_group=rows_per_group)
    assert same_bits(ours.scales, plain.scales)
    for group in range(len(rows_per_group)):
        assert same_bits(ours.group(group).values, plain.group(group).values)


def test_room_behind_the_tokens_of_a_group_is_zero(launch):
    x = torch.ones(131, 3)
    made = launch.quantise_over_tokens(x, form=TILES, rows_per_group=(130, 1))
    tokens = torch.cat([torch.ones(130), torch.zeros(126), torch.ones(1), torch.zeros(127)])
    assert torch.equal(made.values.to(torch.float32), (tokens * 448).expand(3, -1))


@settings(max_examples=15)
@given(rows=st.integers(1, 40), columns=st.integers(1, 300), skip=st.integers(0, 3), seed=st.integers(0, 99))
def test_rows_may_lie_apart_in_memory(launch, hard_numbers, same_bits, rows, columns, skip, seed):
    wide = hard_numbers(rows, columns + 2 * skip, seed=seed)
    part = wide[:, skip : skip + columns]
    turned = wide.T.contiguous().T[:, skip : skip + columns]
    plain = quantise(part, form=TILES)
    for x in (part, turned):
        ours = launch.quantise_rows(x, form=TILES)
        assert same_bits(ours.values, plain.values)
        assert same_bits(ours.scales, plain.scales)


@pytest.mark.parametrize("form", [TILES, BLOCKS], ids=["1x128", "128x128"])
def test_dequantising_has_the_bits_of_the_plain_form(launch, hard_numbers, same_bits, form):
    rows = quantise(hard_numbers(150, 300), form=form)
    assert same_bits(launch.dequantise(rows), dequantise(rows))
    weights = quantise(torch.randn(2, 130, 200), form=form)
    assert same_bits(launch.dequantise(weights), dequantise(weights))


@pytest.mark.parametrize("factors", [None, torch.rand(35)], ids=["without factors", "with factors"])
@pytest.mark.parametrize("width", [2048, 200])
@type_of
def test_fused_swiglu_is_that_of_float64_to_a_step_of_e4m3(launch, factors, width, dtype):
    gate_up = (3 * torch.randn(35, 2 * width, generator=torch.Generator().manual_seed(1))).to(dtype)
    gate, up = gate_up.double().chunk(2, dim=1)
    exact = F.silu(gate) * up * (1 if factors is None else factors.double()[:, None])
    made = launch.quantise_swiglu(gate_up, factors=factors, form=TILES)
    plain = quantise(exact.float(), form=TILES)
    assert torch.allclose(made.scales, plain.scales, rtol=2e-6, atol=0)
    # Half a step of 3 mantissa bits, or below 2^-6 of a scale, where the step is 2^-9.
    scales = made.scales.repeat_interleave(128, dim=1)[:, :width].double()
    bound = torch.maximum(exact.abs() * 2.0**-4, scales * 2.0**-10) * (1 + 1e-5)
    assert ((dequantise(made).double() - exact).abs() <= bound).all()
    assert (made.values.to(torch.float32) != plain.values.to(torch.float32)).double().mean() < 1e-3


@pytest.mark.parametrize("columns", [16, 200, 129, 1])
@type_of
def test_e5m6_has_the_bits_of_the_plain_form(launch, hard_numbers, same_bits, columns, dtype):
    x = hard_numbers(35, columns).to(dtype)
    ours, plain = launch.quantise_e5m6(x), quantise_e5m6(x)
    assert same_bits(ours.scales, plain.scales)
    assert same_bits(dequantise_e5m6(ours), dequantise_e5m6(plain))
    assert same_bits(launch.dequantise_e5m6(plain), dequantise_e5m6(plain))
    sound = plain.scales.isfinite().all(dim=1)
    assert torch.equal(ours.packed[sound], plain.packed[sound])


def test_every_number_of_e5m6_comes_back(launch):
    codes = torch.arange(4096, dtype=torch.int32)
    numbers = (codes << 4).to(torch.int16).view(torch.float16).to(torch.float32)
    numbers = torch.where(numbers.isfinite(), numbers, 0.0).view(-1, 128)
    numbers[:, -1] = 2.0**15 * (2 - 2.0**-6)  # the largest, so that every scale is 1
    assert torch.equal(launch.dequantise_e5m6(launch.quantise_e5m6(numbers)), numbers)
