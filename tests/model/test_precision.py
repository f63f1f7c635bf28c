"""Which weights and activations an FP8 recipe touches, and which it leaves alone."""

from dataclasses import replace

import pytest
import torch

from dsv3 import recipes
from dsv3.batch import TokenBatch
from dsv3.checkpoint.names import published_layout
from dsv3.config import KEEP_ALL, PrecisionConfig, RecomputeConfig
from dsv3.fp8.quantise import BLOCKS, dequantise, quantise
from dsv3.fp8.recipe import RECIPES
from dsv3.model.precision import ORIGINAL, Fp8Precision, quantise_weight, quantise_weights
from dsv3.model.transformer import Transformer
from dsv3.train.loss import WholeBatch, pretraining_loss
from dsv3.train.resume import new_state


def model_of(**changes) -> Transformer:
    model = Transformer(replace(recipes.tiny().model, **changes))
    model.init_weights(generator=torch.Generator().manual_seed(0))
    return model


def rows(count: int = 4) -> torch.Tensor:
    return torch.randint(4096, (count, 65), generator=torch.Generator().manual_seed(1))


def gradients(model: Transformer, *, recipe: str, recompute: RecomputeConfig = KEEP_ALL) -> dict[str, torch.Tensor]:
    batch = TokenBatch.from_rows(rows())
    precision = quantise_weights(model.weights_in_fp8(), config=PrecisionConfig(recipe=recipe))
    output = model(batch, mtp=True, recompute=recompute, precision=precision)
    balance = recipes.tiny().balance
    whole = WholeBatch.of([batch])
    loss = pretraining_loss(model, output=output, batch=batch, whole=whole, mtp_weight=0.3, balance=balance)
    model.zero_grad()
    loss.total.backward()
    return {"loss": loss.total.detach()} | {name: weight.grad.clone() for name, weight in model.named_parameters()}


def test_weights_in_fp8_are_those_that_the_published_files_have_in_fp8():
    model = model_of()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {names[id(weight)] for weight, _ in model.weights_in_fp8()}
    assert found == {tensor.source for tensor in published_layout(model.config) if tensor.in_fp8}


def test_gate_and_up_projection_of_an_expert_never_share_a_block():
    """In `tiny` they are 64 rows each, so that a block of 128 would span both."""
    weight = torch.randn(2, 128, 200)
    weight[:, 64:] *= 2.0**20
    whole = quantise_weight(weight, parts=2, form=BLOCKS)
    halves = torch.stack([dequantise(quantise(half, form=BLOCKS)) for half in weight.view(4, 64, 200)])
    assert torch.equal(dequantise(whole), halves.view(2, 128, 200))


def test_only_products_of_layers_change_numbers():
    """With weights and activations that E4M3 has exactly, an FP8 pass is the pass it replaces: nothing else rounds."""
    model = model_of()
    batch = TokenBatch.from_rows(rows())
    precision = quantise_weights(model.weights_in_fp8(), config=PrecisionConfig(recipe="fp8_v3"))
    assert isinstance(precision, Fp8Precision)
    with torch.no_grad():
        for weight, _ in model.weights_in_fp8():
            weight.zero_()
        for block in model.layers:
            block.input_layernorm.weight.fill_(0.5)
    nothing = quantise_weights(model.weights_in_fp8(), config=PrecisionConfig(recipe="fp8_v3"))
    with torch.no_grad():
        assert torch.equal(model(batch, precision=nothing).hidden, model(batch).hidden)
        assert not torch.equal(model(batch, precision=precision).hidden, model(batch).hidden)


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_gives_every_weight_a_gradient_near_the_original_one(recipe: str):
    model = model_of()
    wanted, got = gradients(model, recipe="original"), gradients(model, recipe=recipe)
    assert got["loss"] == pytest.approx(wanted["loss"].item(), rel=2e-3)
    names = [name for name, weight in model.named_parameters() if weight.dim() >= 2 and "gate.weight" not in name]
    for name in names:
        a, b = got[name].flatten(), wanted[name].flatten()
        assert torch.cosine_similarity(a, b, dim=0) > 0.8, name  # some tokens go to other experts
        assert torch.isfinite(a).all(), name


@pytest.mark.parametrize(
    "recompute",
    [RecomputeConfig(), *(replace(KEEP_ALL, **{name: True}) for name in ("norms", "up_projections", "swiglu"))],
    ids=["as published", "norms", "up-projections", "swiglu"],
)
@pytest.mark.parametrize("recipe", ["fp8_v3", "fp8_per_tensor"])
@pytest.mark.parametrize("changes", [{}, {"q_lora_rank": None}], ids=["V3", "direct queries"])
def test_recomputation_changes_no_bit_in_fp8_either(recipe: str, recompute: RecomputeConfig, changes: dict):
    model = model_of(**changes)
    kept, again = gradients(model, recipe=recipe), gradients(model, recipe=recipe, recompute=recompute)
    assert all(torch.equal(kept[name], again[name]) for name in kept)


def test_two_activations_are_kept_in_fewer_bits_and_that_is_all_the_caches_do():
    """Without the narrow caches a recipe has the same loss, and gradients that differ by what E4M3 and E5M6 round."""
    model = model_of()
    batch = TokenBatch.from_rows(rows())
    results = []
    for narrow in (True, False):
        recipe = replace(RECIPES["fp8_v3"], narrow_caches=narrow)
        weights = {
            weight: quantise_weight(weight, parts=parts, form=BLOCKS) for weight, parts in model.weights_in_fp8()
        }
        output = model(batch, precision=Fp8Precision(recipe=recipe, weights=weights))
        model.zero_grad()
        output.hidden.square().sum().backward()
        results.append((output.hidden.detach(), model.layers[1].mlp.experts.gate_up_proj.grad.clone()))
    assert torch.equal(results[0][0], results[1][0])
    assert not torch.equal(results[0][1], results[1][1])
    difference = (results[0][1] - results[1][1]).norm() / results[1][1].norm()
    assert difference < 2**-4


def test_original_precision_is_asked_for_by_name():
    model = model_of()
    assert quantise_weights(model.weights_in_fp8(), config=PrecisionConfig(recipe="original")) is ORIGINAL


def test_in_bf16_the_quantised_weights_keep_their_fp32_masters_and_gradients():
    base = recipes.tiny()
    config = replace(
        base, precision=PrecisionConfig(recipe="fp8_v3"), runtime=replace(base.runtime, dtype="bfloat16", device="cpu")
    )
    state = new_state(config)
    in_fp8 = {weight for weight, _ in state.model.weights_in_fp8()}
    kinds = {weight: (weight.dtype, weight in in_fp8) for weight in state.model.parameters()}
    assert set(kinds.values()) == {(torch.float32, True), (torch.bfloat16, False)}
    precision = quantise_weights(state.model.weights_in_fp8(), config=config.precision)
    output = state.model(TokenBatch.from_rows(rows()), precision=precision)
    assert output.hidden.dtype == torch.bfloat16
    output.hidden.float().square().sum().backward()
    assert all(weight.grad.dtype == torch.float32 for weight in in_fp8 if weight.grad is not None)
    with torch.no_grad():  # validation computes in the original precision
        assert state.model(TokenBatch.from_rows(rows())).hidden.dtype == torch.bfloat16
