"""GpuKernels on the CPU: Triton kernels interpreted, torch's `scaled_mm` written out with the layouts it asks for."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from dsv3.fp8.gemm import HOPPER
from dsv3.fp8.kernels import PlainKernels
from dsv3.fp8.quantise import BLOCKS, TILES, WHOLE, Form, Quantised, dequantise

PLAIN = PlainKernels()
TALL = Form(tile=(1, 32))
"""Tiles that only the plain form knows."""


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def kernels(launch):
    from dsv3.fp8.gpu import GpuKernels

    return GpuKernels(scaled_mm=False)


@pytest.fixture
def with_scaled_mm(launch, monkeypatch):
    """GpuKernels that take torch's product, and a list of what it was called with."""
    from dsv3.fp8.gpu import GpuKernels

    calls = []

    def scaled_mm(a, b, *, scale_a, scale_recipe_a, scale_b, scale_recipe_b, output_dtype):
        assert scale_recipe_a == F.ScalingType.BlockWise1x128
        calls.append(scale_recipe_b)
        rows = dequantise(Quantised(values=a, scales=scale_a, tile=(1, 128)))
        if scale_recipe_b == F.ScalingType.BlockWise128x128:  # depth tile x column block, filled up to 4 depth tiles
            scales, tile = scale_b[: a.shape[1] // 128].T, (128, 128)
        else:
            scales, tile = scale_b, (1, 128)
        return (rows @ dequantise(Quantised(values=b.T, scales=scales, tile=tile)).T).to(output_dtype)

    monkeypatch.setattr(F, "scaled_mm", scaled_mm)
    return GpuKernels(scaled_mm=True), calls


@pytest.mark.parametrize("form", [TILES, BLOCKS, TALL, WHOLE], ids=["1x128", "128x128", "1x32", "whole"])
@pytest.mark.parametrize("shape", [(20, 200), (2, 20, 200), (2, 2, 20, 200)], ids=str)
def test_quantising_agrees_with_the_plain_form_for_every_form_and_number_of_dims(kernels, same_bits, form, shape):
    x = random(*shape)
    ours, plain = kernels.quantise(x, form=form), PLAIN.quantise(x, form=form)
    assert ours.tile == plain.tile
    assert same_bits(ours.values, plain.values)
    assert ours.scales.shape == plain.scales.shape
    assert same_bits(ours.scales, plain.scales)
    assert same_bits(kernels.dequantise(ours), PLAIN.dequantise(plain))


@pytest.mark.parametrize("form", [TILES, TALL, WHOLE], ids=["1x128", "1x32", "whole"])
def test_over_tokens_agrees_with_the_plain_form_for_every_form(kernels, same_bits, form):
    groups = (130, 0, 20)
    x = random(150, 40)
    rows = PLAIN.quantise(x, form=TILES)
    pairs = [
        (made.quantise_over_tokens(x, form=form, rows_per_group=groups), made.requantise_over_tokens(
            rows, form=form, rows_per_group=groups
        ))
        for made in (kernels, PLAIN)
    ]  # fmt: skip
    for ours, plain in zip(*pairs, strict=True):
        for group in range(3):
            assert same_bits(ours.group(group).values, plain.group(group).values)
            assert same_bits(ours.group(group).scales, plain.group(group).scales)


@pytest.mark.parametrize("form", [TILES, TALL, WHOLE], ids=["1x128", "1x32", "whole"])
@pytest.mark.parametrize("accumulator", [None, replace(HOPPER, promote_every=128)], ids=["FP32", "14 bits"])
def test_products_agree_with_the_plain_form(kernels, form, accumulator):
    groups = (20, 0, 3)
    x, slope, w = random(23, 160), random(23, 40, seed=1), random(3, 40, 160, seed=2)
    rows = kernels.quantise(x, form=form)
    weight = kernels.quantise(w, form=WHOLE if form is WHOLE else BLOCKS if form is TILES else TALL)
    common = {"rows_per_group": groups, "accumulator": accumulator}
    ours, plain = (made.multiply(rows, weight=weight, **common) for made in (kernels, PLAIN))
    assert torch.allclose(ours, plain, rtol=0, atol=1e-5)
    ours, plain = (
        made.weight_gradients(
            made.quantise_over_tokens(slope, form=form, rows_per_group=groups),
            rows=made.quantise_over_tokens(x, form=form, rows_per_group=groups),
            accumulator=accumulator,
        )
        for made in (kernels, PLAIN)
    )
    assert torch.allclose(ours, plain, rtol=0, atol=1e-5)


@pytest.mark.parametrize("depth", [128, 256, 640])
def test_torch_gets_the_scales_in_its_own_layout(with_scaled_mm, depth):
    kernels, calls = with_scaled_mm
    rows = kernels.quantise(random(20, depth), form=TILES)
    slope = kernels.quantise(random(20, 384, seed=1), form=TILES)
    weight = kernels.quantise(random(1, 384, depth, seed=2), form=BLOCKS)
    narrow = kernels.quantise(random(1, 48, depth, seed=3), form=TILES)
    for a, b in ((rows, weight), (slope, weight.T), (rows, narrow)):
        common = {"weight": b, "rows_per_group": (20,), "accumulator": None}
        assert torch.allclose(kernels.multiply(a, **common), PLAIN.multiply(a, **common), rtol=0, atol=1e-4)
    assert [recipe.name for recipe in calls] == ["BlockWise128x128"] * 2 + ["BlockWise1x128"]
    over = {"form": TILES, "rows_per_group": (20,)}
    pairs = [[made.quantise_over_tokens(random(20, n), **over) for n in (48, 32)] for made in (kernels, PLAIN)]
    ours, plain = (
        made.weight_gradients(a, rows=b, accumulator=None) for made, (a, b) in zip((kernels, PLAIN), pairs, strict=True)
    )
    assert torch.allclose(ours, plain, rtol=0, atol=1e-5)
    assert len(calls) == 4


def test_what_torch_refuses_is_ours(with_scaled_mm):
    kernels, calls = with_scaled_mm
    e5m2 = replace(TILES, dtype=torch.float8_e5m2)
    for rows, depth, columns, form in ((7, 128, 16, TILES), (8, 96, 16, TILES), (8, 128, 9, TILES), (8, 128, 16, e5m2)):
        common = {
            "weight": kernels.quantise(random(1, columns, depth), form=BLOCKS),
            "rows_per_group": (rows,),
            "accumulator": None,
        }
        a = kernels.quantise(random(rows, depth), form=form)
        assert torch.allclose(kernels.multiply(a, **common), PLAIN.multiply(a, **common), rtol=0, atol=1e-4)
    assert calls == []


@pytest.mark.skipif(torch.__version__ >= "2.14", reason="torch checks layouts without a GPU up to 2.13 only")
@pytest.mark.parametrize("depth", [128, 256, 640])
def test_torch_accepts_every_layout_that_it_is_given(launch, depth):
    from dsv3.fp8.gpu import GpuKernels

    kernels = GpuKernels(scaled_mm=True)
    x, w = torch.empty(20, depth, device="meta"), torch.empty(1, 384, depth, device="meta")
    slope = torch.empty(20, 384, device="meta")
    rows, weight = kernels.quantise(x, form=TILES), kernels.quantise(w, form=BLOCKS)
    common = {"rows_per_group": (20,), "accumulator": None}
    assert kernels.multiply(rows, weight=weight, **common).shape == (20, 384)
    assert kernels.multiply(kernels.quantise(slope, form=TILES), weight=weight.T, **common).shape == (20, depth)
    assert kernels.multiply(rows, weight=kernels.quantise(w, form=TILES), **common).shape == (20, 384)
    over = [kernels.quantise_over_tokens(y, form=TILES, rows_per_group=(20,)) for y in (slope, x)]
    assert kernels.weight_gradients(over[0], rows=over[1], accumulator=None).shape == (1, 384, depth)
    with pytest.raises(RuntimeError, match="stride"):
        F.scaled_mm(
            rows.values,
            weight.values[0].T,
            rows.scales.contiguous(),
            F.ScalingType.BlockWise1x128,
            weight.scales[0].T,
            F.ScalingType.BlockWise128x128,
        )


def test_name_says_which_product_is_taken_and_why(launch):
    from dsv3.fp8.gpu import GpuKernels

    assert "scaled_mm (cuBLAS)" in GpuKernels(scaled_mm=True).name
    assert "switched off" in GpuKernels(scaled_mm=False).name
    if not torch.cuda.is_available():
        assert "no scaled_mm: " in GpuKernels().name


def test_a_gpu_older_than_hopper_is_refused(launch, monkeypatch):
    from dsv3.errors import ConfigError
    from dsv3.fp8.gpu import GpuKernels

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 9))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA L40")
    with pytest.raises(ConfigError, match=r"NVIDIA L40, whose compute capability is 8\.9"):
        GpuKernels()


def test_without_triton_the_error_says_what_to_install():
    import subprocess
    import sys

    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import dsv3, dsv3.fp8.choose\n"
        "from dsv3.errors import MissingExtraError\n"
        "try:\n    import dsv3.fp8.gpu\n"
        "except MissingExtraError as error: print(error)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "FP8 on a GPU needs the package 'triton'" in run.stdout
