"""Fprop, Dgrad and Wgrad in FP8: against the report's formulas written out in float64."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dsv3.fp8.cpu import CpuKernels
from dsv3.fp8.e5m6 import dequantise_e5m6, quantise_e5m6
from dsv3.fp8.kernels import PlainKernels
from dsv3.fp8.linear import Fp8Product, fp8_products
from dsv3.fp8.quantise import BLOCKS, TILES, Form, dequantise, quantise
from dsv3.fp8.recipe import ANYWHERE, RECIPES, Site

PLAIN = PlainKernels()
EXACT = ("fp8_v3", "fp8_per_tensor", "fp8_blockwise_all")
"""Recipes whose sums are FP32."""


def numbers(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rounded(x: Tensor, form: Form) -> Tensor:
    return dequantise(quantise(x, form=form)).double()


def product_of(*weights: Tensor, groups: list[int], recipe: str = "fp8_v3", **settings) -> Fp8Product:
    chosen = RECIPES[recipe]
    quantised = tuple(PLAIN.quantise(weight, form=chosen.weight) for weight in weights)
    return Fp8Product(recipe=chosen, kernels=PLAIN, weights=quantised, rows_per_group=tuple(groups), **settings)


def run(x: Tensor, *weights: Tensor, product: Fp8Product, seed: int = 9) -> tuple[list[Tensor], list[Tensor]]:
    """Return outputs, and the gradients of x and the weights for random slopes."""
    x = x.clone().requires_grad_()
    parameters = [weight.clone().requires_grad_() for weight in weights]
    outputs = fp8_products(x, parameters=parameters, product=product)
    slopes = [numbers(*output.shape, seed=seed + index) for index, output in enumerate(outputs)]
    torch.autograd.backward(outputs, slopes)
    return list(outputs), [x.grad, *(parameter.grad for parameter in parameters)]


def close(got: Tensor, wanted: Tensor) -> bool:
    return bool((got - wanted).abs().max() <= 2e-6 * max(1.0, wanted.abs().max().item()) * 8)


@pytest.mark.parametrize("recipe", EXACT)
@pytest.mark.parametrize("site", [ANYWHERE, Site(round_activation=True), Site(round_gradient=True)])
def test_the_three_products_are_the_reports(recipe: str, site: Site):
    """y = Q(x) Q(W)^T, dx = Q(dy) Q(W), dW = Q(dy^T) Q(Q(x)^T): tiles along what is summed over, for each of them."""
    x, weight, slope = numbers(150, 200, seed=0), numbers(140, 200, seed=1), numbers(150, 140, seed=9)
    chosen = RECIPES[recipe]
    x_form = replace(chosen.activation, power_of_two=site.round_activation and chosen.powers_of_two)
    over_form = replace(chosen.activation_over_tokens, power_of_two=site.round_activation and chosen.powers_of_two)
    dy_form, dy_over = (
        replace(form, power_of_two=site.round_gradient and chosen.powers_of_two)
        for form in (chosen.gradient, chosen.gradient_over_tokens)
    )
    x_rounded = rounded(x, x_form)
    (output,), (of_x, of_weight) = run(
        x, weight, product=product_of(weight[None], groups=[150], recipe=recipe, site=site)
    )
    assert close(output, x_rounded @ rounded(weight, chosen.weight).T)
    assert close(of_x, rounded(slope, dy_form) @ rounded(weight, chosen.weight))
    assert close(of_weight, rounded(slope.T, dy_over) @ rounded(x_rounded.float().T, over_form).T)
    assert of_weight.dtype == torch.float32


def test_tiles_stand_where_the_report_puts_them():
    """An outlier in one token and channel hurts, in each product, only what shares its tile."""
    x, weight = torch.ones(256, 256), torch.eye(256)
    x[3, 5] = 2.0**20
    (output,), _ = run(x, weight, product=product_of(weight[None], groups=[256]))
    hurt = (output - x).abs() > 0.01 * x
    assert hurt[3, :128].sum() == 127  # 1 x 128: the other channels of its tile
    assert hurt.sum() == 127


@pytest.mark.parametrize("recipe", EXACT)
def test_groups_are_products_of_their_own(recipe: str):
    groups = [70, 0, 130, 5]
    x, weight = numbers(205, 200, seed=0), numbers(4, 60, 200, seed=1)
    if recipe == "fp8_v3":
        (output,), (of_x, of_weight) = run(x, weight, product=product_of(weight, groups=groups, recipe=recipe))
        start = 0
        for group, count in enumerate(groups):
            rows = slice(start, start + count)
            start += count
            if count == 0:
                assert (of_weight[group] == 0).all()
                continue
            alone = product_of(weight[group][None], groups=[count], recipe=recipe)
            part, matrix = x[rows].clone().requires_grad_(), weight[group].clone().requires_grad_()
            (single,) = fp8_products(part, parameters=[matrix], product=alone)
            single.backward(numbers(205, 60, seed=9)[rows])
            assert torch.equal(single, output[rows])
            assert torch.equal(part.grad, of_x[rows])
            assert torch.equal(matrix.grad, of_weight[group])
    else:  # scales of these recipes look at all rows at once
        (output,), (of_x, of_weight) = run(x, weight, product=product_of(weight, groups=groups, recipe=recipe))
        assert all(found.isfinite().all() for found in (output, of_x, of_weight))
        assert (of_weight[1] == 0).all()


def test_one_input_with_two_weights_is_two_products():
    x, first, second = numbers(90, 130, seed=0), numbers(40, 130, seed=1), numbers(150, 130, seed=2)
    together, gradients = run(x, first, second, product=product_of(first[None], second[None], groups=[90]))
    (one,), (of_x_one, of_first) = run(x, first, product=product_of(first[None], groups=[90]), seed=9)
    (two,), (of_x_two, of_second) = run(x, second, product=product_of(second[None], groups=[90]), seed=10)
    assert torch.equal(together[0], one)
    assert torch.equal(together[1], two)
    assert torch.equal(gradients[0], of_x_one + of_x_two)
    assert torch.equal(gradients[1], of_first)
    assert torch.equal(gradients[2], of_second)


def test_an_input_that_is_quantised_again_gives_the_same_bits_as_one_that_was_kept():
    x, weight = numbers(90, 130, seed=0), numbers(40, 130, seed=1)
    kept = run(x, weight, product=product_of(weight[None], groups=[90]))
    again = run(x, weight, product=product_of(weight[None], groups=[90], input_is_kept=True))
    assert all(torch.equal(a, b) for a, b in zip(kept[0] + kept[1], again[0] + again[1], strict=True))


def test_wgrad_reads_the_copy_in_e5m6_where_there_is_one():
    x, weight, slope = numbers(90, 130, seed=0), numbers(40, 130, seed=1), numbers(90, 40, seed=9)
    packed = quantise_e5m6(x)
    site = Site(round_activation=True)
    (output,), (_, of_weight) = run(
        x, weight, product=product_of(weight[None], groups=[90], site=site, packed_input=packed)
    )
    form = replace(TILES, power_of_two=True)
    assert close(output, rounded(x, form) @ rounded(weight, BLOCKS).T)
    assert close(of_weight, rounded(slope.T, TILES) @ rounded(dequantise_e5m6(packed).T, form).T)


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_cpu_kernels_train_as_the_plain_form_does(recipe: str):
    groups = [70, 0, 130]
    x, weight = numbers(200, 150, seed=0), numbers(3, 64, 150, seed=1)
    product = product_of(weight, groups=groups, recipe=recipe)
    plain = run(x, weight, product=product)
    fast = run(x, weight, product=replace(product, kernels=CpuKernels()))
    for got, wanted in zip(fast[0] + fast[1], plain[0] + plain[1], strict=True):
        # 14 bits may cut one unit more or less; FP32 sums in another order.
        tolerance = 2.0**-11 if recipe == "fp8_no_promotion" else 2.0**-18
        assert (got - wanted).abs().max() <= tolerance * wanted.abs().max()


def test_what_is_kept_of_an_input_is_a_byte_a_number_and_its_scales():
    x, weight = numbers(256, 512, seed=0).requires_grad_(), numbers(128, 512, seed=1).requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        fp8_products(x, parameters=[weight], product=product_of(weight.detach()[None], groups=[256]))
    assert sum(tensor.nbytes for tensor in kept) == 256 * 512 + 4 * 256 * 4


def test_output_and_gradient_of_x_have_its_type():
    x, weight = numbers(20, 130, seed=0).bfloat16().requires_grad_(), numbers(30, 130, seed=1).requires_grad_()
    (output,) = fp8_products(x, parameters=[weight], product=product_of(weight.detach()[None], groups=[20]))
    output.sum().backward()
    assert (output.dtype, x.grad.dtype, weight.grad.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
