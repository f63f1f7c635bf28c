"""Products with weights in FP8 against float64, over the widths of the published model and ragged ones."""

import ctypes
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dsv3 import native
from dsv3.fp8 import weight_only
from dsv3.fp8.quantise import BLOCKS, Form, Quantised, dequantise, quantise
from dsv3.fp8.weight_only import FEW_ROWS, weight_only_product, weight_rows
from dsv3.runtime.compiler import FLAGS, compiled_library


def weight_of(*shape: int, form: Form = BLOCKS) -> Quantised:
    """Return group x part x out x in, with blocks that differ in size by powers of two."""
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
    return quantise(values * 2.0 ** (torch.arange(shape[-1]).div(128, rounding_mode="floor") % 9), form=form)


def rows_of(count: int, width: int) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(2))


def check(x: Tensor, weight: Quantised, *, rows_per_group: list[int]) -> None:
    """Compare with float64, element by element, to the rounding of an FP32 sum of products of that size."""
    matrices = dequantise(weight).double().flatten(1, 2)
    got = weight_only_product(x, weight=weight, rows_per_group=rows_per_group)
    assert got.dtype == x.dtype
    assert got.shape == (x.shape[0], matrices.shape[1])
    for ours, rows, matrix in zip(got.split(rows_per_group), x.double().split(rows_per_group), matrices, strict=True):
        assert ((ours - rows @ matrix.T).abs() <= 3e-7 * (rows.abs() @ matrix.abs().T)).all()


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 8, 9, FEW_ROWS, FEW_ROWS + 1])
@pytest.mark.parametrize("width", [512, 1536, 2048, 7168, 16_384, 18_432])
def test_rows_times_weights_as_wide_as_published_ones(width, rows):
    check(rows_of(rows, width), weight_of(1, 1, 19, width), rows_per_group=[rows])


@settings(max_examples=60)
@given(
    rows_per_group=st.lists(st.sampled_from([0, 0, 1, 2, 3, 7, 8, 9, 17]), min_size=1, max_size=5),
    parts=st.integers(1, 2),
    columns=st.integers(1, 40) | st.sampled_from([128, 136, 300]),
    depth=st.integers(1, 40) | st.sampled_from([127, 128, 129, 200, 256, 300]),
)
def test_rows_of_several_experts_with_ragged_matrices(rows_per_group, parts, columns, depth):
    weight = weight_of(len(rows_per_group), parts, columns, depth)
    check(rows_of(sum(rows_per_group), depth), weight, rows_per_group=rows_per_group)


@pytest.mark.parametrize("depth", [1, 5, 128, 200])
def test_every_code_is_decoded_exactly(depth):
    """Subnormals and zeros with their signs, and NaN; sums of one number are that number."""
    codes = torch.arange(256, dtype=torch.uint8)
    place = depth - 1
    values = torch.zeros(1, 1, 256, depth, dtype=torch.uint8)
    values[..., place] = codes
    scales = torch.full((1, 1, 2, -(-depth // 128)), 0.75)
    weight = Quantised(values=values.view(torch.float8_e4m3fn), scales=scales, tile=(128, 128))
    expected = codes.view(torch.float8_e4m3fn).float() * 0.75
    product = weight_only_product(torch.ones(1, depth), weight=weight, rows_per_group=[1])[0]
    assert torch.equal(product.nan_to_num(999.0), expected.nan_to_num(999.0))
    wide = weight_rows(weight[0][0], first=0, count=256)[:, place]
    same = wide.view(torch.int32) == expected.view(torch.int32)
    assert (same | (wide.isnan() & expected.isnan())).all()


def test_rows_of_weights_are_widened_exactly():
    for shape in ((3, 7), (130, 300), (257, 512)):
        weight = weight_of(1, 1, *shape)[0][0]
        assert torch.equal(weight_rows(weight, first=0, count=shape[0]), dequantise(weight))
    assert torch.equal(weight_rows(weight, first=128, count=128), dequantise(weight)[128:256])
    assert torch.equal(weight_rows(weight, first=256, count=1), dequantise(weight)[256:])


def test_a_row_gives_the_same_bits_alone_and_beside_others_on_any_number_of_threads():
    x, weight = rows_of(FEW_ROWS, 300), weight_of(1, 2, 77, 300)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for count in range(1, FEW_ROWS + 1):
                together = weight_only_product(x[:count], weight=weight, rows_per_group=[count])
                alone = weight_only_product(x[count - 1 : count], weight=weight, rows_per_group=[1])
                if (threads, count) == (1, 1):
                    first = together
                assert torch.equal(together[:1], first)
                assert torch.equal(together[-1:], alone)
    finally:
        torch.set_num_threads(before)


def test_experts_without_rows_are_not_read():
    weight = weight_of(3, 2, 40, 200)
    weight.values[1].view(torch.uint8).fill_(0x7F)  # NaN
    counts = [2, 0, FEW_ROWS + 1]
    output = weight_only_product(rows_of(sum(counts), 200), weight=weight, rows_per_group=counts)
    assert output.isfinite().all()


@pytest.mark.parametrize("rows", [1, FEW_ROWS, FEW_ROWS + 1])
def test_a_strided_input_is_as_good_as_a_dense_one(rows):
    x, weight = rows_of(rows, 600), weight_of(1, 1, 20, 200)
    got = weight_only_product(x[:, 100:300], weight=weight, rows_per_group=[rows])
    dense = x[:, 100:300].contiguous()
    assert torch.equal(got, weight_only_product(dense, weight=weight, rows_per_group=[rows]))


def test_no_more_than_a_panel_of_a_weight_is_ever_wide(monkeypatch):
    largest = []

    def watched(weight, **rows):
        panel = weight_rows(weight, **rows)
        largest.append(panel.shape[0])
        return panel

    monkeypatch.setattr(weight_only, "weight_rows", watched)
    rows = FEW_ROWS + 1
    check(rows_of(rows, 40), weight_of(1, 2, 600, 40), rows_per_group=[rows])
    assert largest == [256, 256, 88] * 2


def test_other_types_and_other_tiles_take_the_plain_form():
    x = rows_of(3, 200)
    for form in (BLOCKS, Form(tile=(64, 32))):
        weight = weight_of(1, 1, 300, 200, form=form)
        exact = x.double() @ dequantise(weight)[0, 0].double().T
        got = weight_only_product(x.double(), weight=weight, rows_per_group=[3])
        assert torch.allclose(got, exact, rtol=1e-13, atol=1e-11)
        native.choose_cpu_kernels("torch")
        check(x, weight, rows_per_group=[3])
        native.choose_cpu_kernels("native")
        check(x, weight, rows_per_group=[3])
    narrow = weight_only_product(x.bfloat16(), weight=weight, rows_per_group=[3])
    assert narrow.dtype == torch.bfloat16
    assert torch.equal(narrow, weight_only_product(x.bfloat16().float(), weight=weight, rows_per_group=[3]).bfloat16())


@pytest.mark.slow  # half a minute of compiling each
@pytest.mark.parametrize("floats", [4, 16])
def test_vectors_of_other_processors(floats, monkeypatch):
    """The widths of NEON and AVX-512, made of this machine's vectors."""
    sources = sorted(Path(native.__file__).parent.glob("*.cpp"))
    library = compiled_library(
        f"cpu-{floats}", sources=sources, flags=(*FLAGS, f"-DVECTOR_FLOATS={floats}", "-Wno-psabi")
    )
    monkeypatch.setattr(native, "_load", lambda: ctypes.CDLL(str(library)))
    for depth in (1, 5, 128, 200):
        test_every_code_is_decoded_exactly(depth)
    test_rows_of_weights_are_widened_exactly()
    test_rows_of_several_experts_with_ragged_matrices.hypothesis.inner_test([9, 0, 1, 17], 2, 136, 300)
