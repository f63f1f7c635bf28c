import torch
from hypothesis import given
from hypothesis import strategies as st

from dsv3.fp8.blocks import blocks_of, dequantise_blocks, quantise_blocks

# Shapes of the released model whose last block is cut off, and their number of multipliers (published files).
RELEASED = {(576, 7168): (5, 56), (1536, 7168): (12, 56), (24576, 1536): (192, 12), (7168, 2048): (56, 16)}


def written_out(weight: torch.Tensor, scale_inv: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """The definition, element by element: W[i, j] * s[i // 128, j // 128]."""
    values = [
        [float(weight[i, j].float()) * float(scale_inv[i // block[0], j // block[1]]) for j in range(weight.shape[1])]
        for i in range(weight.shape[0])
    ]
    return torch.tensor(values, dtype=torch.float32)


def test_released_matrices_have_the_published_number_of_multipliers():
    assert {shape: blocks_of(shape) for shape in RELEASED} == RELEASED


def test_every_element_is_multiplied_by_its_own_block_in_ragged_matrices_too():
    generator = torch.Generator().manual_seed(0)
    for shape, block in (((5, 7), (2, 3)), ((4, 6), (2, 3)), ((1, 9), (4, 4)), ((130, 140), (128, 128))):
        weight = torch.randn(shape, generator=generator).to(torch.float8_e4m3fn)
        scale_inv = torch.rand(blocks_of(shape, block=block), generator=generator) + 0.1
        expected = written_out(weight, scale_inv, block)
        assert torch.equal(dequantise_blocks(weight, scale_inv=scale_inv, block=block), expected)


def test_multiplier_of_a_block_is_its_largest_magnitude_over_448():
    weight = torch.zeros(130, 260)
    weight[3, 5], weight[129, 200], weight[0, 259] = -7.0, 0.25, 448.0
    _, scale_inv = quantise_blocks(weight)
    expected = torch.tensor([[7 / 448, 0, 1], [0, 0.25 / 448, 0]])
    assert torch.allclose(scale_inv, expected, rtol=1e-6, atol=1e-37)


def test_an_all_zero_block_comes_back_as_zeros():
    quantised, scale_inv = quantise_blocks(torch.zeros(3, 3))
    assert torch.equal(dequantise_blocks(quantised, scale_inv=scale_inv), torch.zeros(3, 3))


@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
    block=st.tuples(st.integers(1, 17), st.integers(1, 17)),
    exponent=st.integers(-20, 20),
    seed=st.integers(0, 2**16),
)
def test_quantising_errs_by_less_than_half_a_step_of_e4m3(rows, columns, block, exponent, seed):
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    quantised, scale_inv = quantise_blocks(weight, block=block)
    back = dequantise_blocks(quantised, scale_inv=scale_inv, block=block)
    step = torch.ones_like(weight)
    spread = dequantise_blocks(step.to(torch.float8_e4m3fn), scale_inv=scale_inv, block=block)
    # E4M3 has 3 bits after the point: 2^-4 relative for normal numbers, 2^-10 of a unit below 2^-6.
    bound = torch.maximum(weight.abs() * 2**-4, spread * 2**-10) * (1 + 1e-6)
    assert ((back - weight).abs() <= bound).all()
