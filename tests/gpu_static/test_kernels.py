from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from dsv3.fp8.quantise import BLOCKS, TILES, WHOLE

pytest.importorskip("triton")
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
# (in, out) of V3's products: q_a, kv_a, o_proj, an expert's gate and up, its down projection.
PRODUCTS = [(7168, 1536), (7168, 576), (16_384, 7168), (7168, 4096), (2048, 7168)]


@pytest.fixture(params=[True, False], ids=["scaled_mm", "Triton"])
def kernels(request, fake_gpu):
    from dsv3.fp8.gpu import GpuKernels

    return GpuKernels(scaled_mm=request.param)


def numbers(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda")


def described(x: torch.Tensor) -> tuple[str, torch.dtype, tuple[int, ...]]:
    return x.device.type, x.dtype, tuple(x.shape)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("fp8", [E4M3, E5M2], ids=str)
def test_quantised_matrices_are_on_the_gpu_with_fp32_scales(kernels, dtype, fp8):
    x = numbers(4096, 576, dtype=dtype)
    for form, scales in ((TILES, (4096, 5)), (BLOCKS, (32, 5)), (WHOLE, (1, 1))):
        made = kernels.quantise(x, form=replace(form, dtype=fp8))
        assert described(made.values) == ("cuda", fp8, (4096, 576))
        assert described(made.scales) == ("cuda", torch.float32, scales)
        assert described(kernels.dequantise(made)) == ("cuda", torch.float32, (4096, 576))


def test_weights_keep_their_dims_before_the_matrix(kernels):
    made = kernels.quantise(numbers(8, 2, 2048, 7168, dtype=torch.float32), form=BLOCKS)
    assert described(made.values) == ("cuda", E4M3, (8, 2, 2048, 7168))
    assert described(made.scales) == ("cuda", torch.float32, (8, 2, 16, 56))


def test_tiles_over_tokens_end_with_their_group(kernels):
    groups = (1000, 0, 24)
    x = numbers(1024, 2048)
    made = kernels.quantise_over_tokens(x, form=TILES, rows_per_group=groups)
    again = kernels.requantise_over_tokens(kernels.quantise(x, form=TILES), form=TILES, rows_per_group=groups)
    for over in (made, again):
        assert described(over.scales) == ("cuda", torch.float32, (2048, 9))
        assert [described(over.group(g).values) for g in range(3)] == [("cuda", E4M3, (2048, rows)) for rows in groups]


def test_fused_swiglu_and_e5m6_are_on_the_gpu(kernels):
    made = kernels.quantise_swiglu(numbers(512, 4096), factors=numbers(512, dtype=torch.float32), form=TILES)
    assert described(made.values) == ("cuda", E4M3, (512, 2048))
    packed = kernels.quantise_e5m6(numbers(512, 16_384))
    assert described(packed.packed) == ("cuda", torch.uint8, (512, 24_576))
    assert described(kernels.dequantise_e5m6(packed)) == ("cuda", torch.float32, (512, 16_384))


@pytest.mark.parametrize("product", PRODUCTS, ids=str)
def test_the_three_products_of_a_linear_have_their_shapes_and_keep_to_the_rules(kernels, scaled_mm, product):
    ins, outs = product
    x, slope = numbers(4096, ins), numbers(4096, outs)
    weight = kernels.quantise(numbers(1, outs, ins, dtype=torch.float32), form=BLOCKS)
    common = {"rows_per_group": (4096,), "accumulator": None}
    forward = kernels.multiply(kernels.quantise(x, form=TILES), weight=weight, **common)
    assert described(forward) == ("cuda", torch.float32, (4096, outs))
    of_x = kernels.multiply(kernels.quantise(slope, form=TILES), weight=weight.T, **common)
    assert described(of_x) == ("cuda", torch.float32, (4096, ins))
    over = [kernels.quantise_over_tokens(y, form=TILES, rows_per_group=(4096,)) for y in (slope, x)]
    of_weight = kernels.weight_gradients(over[0], rows=over[1], accumulator=None)
    assert described(of_weight) == ("cuda", torch.float32, (1, outs, ins))
    # The 576 columns of kv_a, which are the depth of its Dgrad, are no whole blocks: ours.
    blocks = ["BlockWise128x128"] * 2 if outs % 128 == 0 else []
    assert scaled_mm == ([*blocks, "BlockWise1x128"] if kernels.scaled_mm else [])


def test_products_of_experts_are_never_torchs(kernels, scaled_mm):
    groups = (1000, 0, 24)
    x = kernels.quantise(numbers(1024, 7168), form=TILES)
    weight = kernels.quantise(numbers(3, 4096, 7168), form=BLOCKS)
    made = kernels.multiply(x, weight=weight, rows_per_group=groups, accumulator=None)
    assert described(made) == ("cuda", torch.float32, (1024, 4096))
    over = [kernels.quantise_over_tokens(numbers(1024, n), form=TILES, rows_per_group=groups) for n in (4096, 7168)]
    gradients = kernels.weight_gradients(over[0], rows=over[1], accumulator=None)
    assert described(gradients) == ("cuda", torch.float32, (3, 4096, 7168))
    assert scaled_mm == []


@pytest.mark.parametrize("wrong", ["b by rows", "scales of a by rows", "scales of b not filled up", "depth of 24"])
def test_the_rules_refuse_wrong_layouts(fake_gpu, scaled_mm, wrong):
    depth = 24 if wrong == "depth of 24" else 128 * 5
    a, b = numbers(64, depth, dtype=E4M3), numbers(256, depth, dtype=E4M3).T
    tiles = -(-depth // 128)
    scale_a, scale_b = numbers(tiles, 64, dtype=torch.float32).T, numbers(2, 8, dtype=torch.float32).T
    if wrong == "b by rows":
        b = b.contiguous()
    if wrong == "scales of a by rows":
        scale_a = scale_a.contiguous()
    if wrong == "scales of b not filled up":
        scale_b = numbers(2, 5, dtype=torch.float32).T
    with pytest.raises(ValueError, match="against its rule"):
        F.scaled_mm(
            a,
            b,
            scale_a=scale_a,
            scale_recipe_a=F.ScalingType.BlockWise1x128,
            scale_b=scale_b,
            scale_recipe_b=F.ScalingType.BlockWise128x128,
        )
