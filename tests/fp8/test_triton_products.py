import pytest
import torch

from dsv3.fp8.kernels import PlainKernels
from dsv3.fp8.quantise import BLOCKS, TILES, WHOLE, Quantised, dequantise, quantise

PLAIN = PlainKernels()
BOUND = 5e-7
"""Of the largest result: FP32 sums of 128 exact products, and of as many as there are tiles of depth."""


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def product_in_float64(rows: Quantised, *, weight: Quantised, rows_per_group: tuple[int, ...]) -> torch.Tensor:
    matrices = dequantise(weight).double()
    parts = dequantise(rows).double().split(list(rows_per_group))
    return torch.cat([part @ matrix.T for part, matrix in zip(parts, matrices, strict=True)])


def relative_error(ours: torch.Tensor, exact: torch.Tensor) -> float:
    return ((ours.double() - exact).abs().max() / exact.abs().max()).item()


@pytest.fixture
def multiply(launch):
    from dsv3.fp8.gpu import as_operand

    def run(rows: Quantised, *, weight: Quantised, rows_per_group: tuple[int, ...], **settings) -> torch.Tensor:
        return launch.multiply(as_operand(rows), weight=as_operand(weight), rows_per_group=rows_per_group, **settings)

    return run


# (rows, depth, columns): few rows of gate_up, down projection, kv_a and its Dgrad; then ragged in every dim.
@pytest.mark.parametrize("shape", [(3, 7168, 64), (70, 2048, 64), (3, 256, 576), (3, 576, 128), (131, 300, 7)], ids=str)
@pytest.mark.parametrize("form", [BLOCKS, TILES], ids=["128x128", "1x128"])
def test_a_product_is_that_of_float64_to_the_rounding_of_fp32(multiply, shape, form):
    rows, depth, columns = shape
    x, w = quantise(random(rows, depth), form=TILES), quantise(random(1, columns, depth, seed=1), form=form)
    ours = multiply(x, weight=w, rows_per_group=(rows,))
    assert ours.dtype == torch.float32
    assert relative_error(ours, product_in_float64(x, weight=w, rows_per_group=(rows,))) < BOUND


@pytest.mark.parametrize("rows_per_group", [(3, 0, 70, 1), (0, 0, 130, 0), (0, 0, 0, 0)], ids=str)
def test_rows_meet_the_matrix_of_their_group(multiply, rows_per_group):
    rows = sum(rows_per_group)
    x, w = quantise(random(rows, 200), form=TILES), quantise(random(4, 140, 200, seed=1), form=BLOCKS)
    ours = multiply(x, weight=w, rows_per_group=rows_per_group)
    assert ours.shape == (rows, 140)
    if rows:
        assert relative_error(ours, product_in_float64(x, weight=w, rows_per_group=rows_per_group)) < BOUND


def test_a_transposed_weight_is_multiplied_without_quantising_again(multiply):
    x, w = quantise(random(9, 300), form=TILES), quantise(random(1, 300, 200, seed=1), form=BLOCKS)
    exact = dequantise(x).double() @ dequantise(w)[0].double()
    assert relative_error(multiply(x, weight=w.T, rows_per_group=(9,)), exact) < BOUND


def test_operands_with_one_scale_and_of_both_formats_are_multiplied(multiply):
    from dataclasses import replace

    gradient = replace(TILES, dtype=torch.float8_e5m2)
    for form, weight_form in ((WHOLE, WHOLE), (gradient, BLOCKS), (BLOCKS, BLOCKS)):
        x, w = quantise(random(150, 300), form=form), quantise(random(1, 40, 300, seed=1), form=weight_form)
        exact = product_in_float64(x, weight=w, rows_per_group=(150,))
        assert relative_error(multiply(x, weight=w, rows_per_group=(150,)), exact) < BOUND


def test_a_result_can_be_rounded_to_bf16(multiply):
    x, w = quantise(random(5, 256), form=TILES), quantise(random(1, 16, 256, seed=1), form=BLOCKS)
    wide = multiply(x, weight=w, rows_per_group=(5,))
    assert torch.equal(multiply(x, weight=w, rows_per_group=(5,), dtype=torch.bfloat16), wide.to(torch.bfloat16))


def test_a_fault_in_a_row_spoils_that_row_alone(multiply):
    x = random(3, 256)
    x[1, 7] = float("inf")
    w = quantise(random(1, 16, 256, seed=1), form=BLOCKS)
    ours = multiply(quantise(x, form=TILES), weight=w, rows_per_group=(3,))
    assert ours.isnan().all(dim=1).tolist() == [False, True, False]


def test_weight_gradients_are_those_of_float64_group_by_group(launch):
    rows_per_group = (130, 0, 7, 128)
    slopes, rows = random(265, 140), random(265, 200, seed=1)
    a, b = (launch.quantise_over_tokens(x, form=TILES, rows_per_group=rows_per_group) for x in (slopes, rows))
    ours = launch.weight_gradients(a, rows=b)
    assert ours.shape == (4, 140, 200)
    assert not ours[1].any()
    for group in (0, 2, 3):
        exact = dequantise(a.group(group)).double() @ dequantise(b.group(group)).double().T
        assert relative_error(ours[group], exact) < BOUND


def test_weight_gradients_without_tokens_are_zero(launch):
    a, b = (launch.quantise_over_tokens(torch.ones(0, 5), form=TILES, rows_per_group=(0, 0)) for _ in range(2))
    assert torch.equal(launch.weight_gradients(a, rows=b), torch.zeros(2, 5, 5))
