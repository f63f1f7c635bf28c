"""Products with weights in every format against float64, and the promise that a row's company does not matter."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3.errors import CheckpointError, ConfigError
from dsv3.fp8.quantise import BLOCKS, dequantise, quantise
from dsv3.infer.packed_weights import PackedMatrix, Storage, formats_named, panel_columns

STORAGES = list(Storage)


@pytest.fixture(autouse=True)
def compiled(our_kernels):
    """All of this needs a compiler."""


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rounded_in_groups(x, *, size, most):
    """Round to `most` steps of the largest number of each group of `size` along the last dim: the definition."""
    groups = torch.nn.functional.pad(x.double(), (0, -x.shape[-1] % size)).unflatten(-1, (-1, size))
    # As in FP32, which decides ties: a number times the inverse of its step.
    top = groups.abs().amax(-1, keepdim=True).float()
    inverse = torch.where(top > 0, most / top, 0.0)
    whole = (groups.float() * inverse).round()
    return (whole.double() * (top / most).double()).flatten(-2)[..., : x.shape[-1]]


def as_kept(weight, storage):
    """Return what a format makes of a weight, in float64, by another way than the kernels'."""
    if storage is Storage.BF16:
        return weight.bfloat16().double()
    if storage is Storage.FP8:
        return dequantise(quantise(weight, form=BLOCKS)).double()
    if storage is Storage.INT8:
        return rounded_in_groups(weight, size=128, most=127)
    return rounded_in_groups(weight, size=64, most=7) if storage is Storage.INT4 else weight.double()


def packed(weight, storage):
    matrix = PackedMatrix(storage, part_columns=(weight.shape[0],), depth=weight.shape[1])
    matrix.fill(weight, name="w")
    return matrix


@pytest.mark.parametrize("storage", STORAGES)
@settings(max_examples=25)
@given(
    rows=st.integers(1, 30),
    columns=st.integers(1, 70) | st.sampled_from([128, 200]),
    depth=st.integers(1, 40) | st.sampled_from([64, 96, 127, 128, 129, 200, 256, 300, 520]),
)
def test_a_product_is_that_of_the_numbers_as_they_are_kept(storage, rows, columns, depth):
    weight, x = random(columns, depth), random(rows, depth, seed=1)
    kept = as_kept(weight, storage)
    met = rounded_in_groups(x, size=128, most=127) if storage in (Storage.INT8, Storage.INT4) else x.double()
    difference = (packed(weight, storage)(x) - met @ kept.T).abs()
    assert (difference <= 1e-6 * (met.abs() @ kept.abs().T) + 1e-30).all()


@pytest.mark.parametrize("storage", STORAGES)
@settings(max_examples=15)
@given(
    rows=st.integers(2, 60),
    columns=st.integers(1, 70),
    depth=st.sampled_from([1, 7, 64, 130, 300, 700]),
    data=st.data(),
)
def test_a_row_comes_out_the_same_to_the_last_bit_whoever_stands_beside_it(storage, rows, columns, depth, data):
    matrix, x = packed(random(columns, depth), storage), random(rows, depth, seed=1)
    together = matrix(x)
    first = data.draw(st.integers(0, rows - 1))
    end = data.draw(st.integers(first + 1, rows))
    assert torch.equal(matrix(x[first:end].contiguous()), together[first:end])


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("depth", [512, 2048, 7168, 16_384, 18_432])
def test_the_published_widths(storage, depth):
    weight, x = random(40, depth), random(3, depth, seed=1)
    kept = as_kept(weight, storage)
    met = rounded_in_groups(x, size=128, most=127) if storage in (Storage.INT8, Storage.INT4) else x.double()
    assert ((packed(weight, storage)(x) - met @ kept.T).abs() <= 1e-6 * (met.abs() @ kept.abs().T)).all()


@pytest.mark.parametrize("storage", STORAGES)
def test_parts_begin_at_a_panel_and_groups_stand_alone(storage):
    panel = panel_columns()
    matrix = PackedMatrix(storage, part_columns=(5, panel + 3), depth=96, groups=2)
    parts = [random(columns, 96, seed=seed) for seed, columns in enumerate((5, panel + 3))]
    for part, weight in enumerate(parts):
        matrix.fill(weight, name="w", part=part, group=0)
        matrix.fill(2 * weight, name="w", part=part, group=1)
    assert matrix.is_filled
    x = random(2, 96, seed=9)
    joined = matrix(x)
    assert joined.shape == (2, 2 * panel + 3)
    assert torch.equal(joined[:, :5], packed(parts[0], storage)(x))
    assert torch.equal(joined[:, panel:], packed(parts[1], storage)(x))


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("threads", [2, 3])
def test_threads_do_not_change_a_bit(storage, threads):
    matrix, x = packed(random(300, 260), storage), random(20, 260, seed=1)
    alone = matrix(x)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        again = packed(random(300, 260), storage)(x)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(alone, again)


def test_weights_that_come_in_bf16_are_packed_as_their_floats_would_be():
    weight, x = random(70, 200).bfloat16(), random(3, 200, seed=1)
    for storage in STORAGES:
        assert torch.equal(packed(weight, storage)(x), packed(weight.float(), storage)(x))


def test_published_fp8_blocks_keep_their_bytes():
    weight = quantise(random(200, 300), form=BLOCKS)
    matrix = PackedMatrix(Storage.FP8, part_columns=(200,), depth=300)
    matrix.fill(weight, name="w")
    # One weight a row, read with a one: the sum of a single product is that weight exactly.
    got = torch.cat([matrix(torch.eye(300)[first : first + 30]) for first in range(0, 300, 30)])
    assert torch.equal(got.T, dequantise(weight))


def test_a_row_of_zeros_and_a_weight_of_zeros_give_zeros():
    for storage in STORAGES:
        assert not packed(torch.zeros(33, 130), storage)(random(2, 130)).any()
        assert not packed(random(33, 130), storage)(torch.zeros(2, 130)).any()


def test_fp8_refuses_what_is_no_number():
    weight = quantise(random(4, 8), form=BLOCKS)
    weight.values.view(torch.uint8)[1, 2] = 0x7F
    matrix = PackedMatrix(Storage.FP8, part_columns=(4,), depth=8)
    with pytest.raises(CheckpointError, match=r"layers\.3.*1 weights that are no numbers"):
        matrix.fill(weight, name="layers.3")


def test_a_format_there_is_none_of_is_refused_by_name():
    with pytest.raises(ConfigError, match="weights = 'q8'; choose one of 'fp32'"):
        formats_named("q8")
