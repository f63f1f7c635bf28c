"""Training in FP8: the step, its loss scale, and a run that is stopped and resumed."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dsv3.batch import TokenBatch
from dsv3.config import PrecisionConfig, PretrainConfig
from dsv3.errors import ConfigError, NonFiniteError
from dsv3.fp8.recipe import RECIPES
from dsv3.model import precision as seam
from dsv3.train.loop import pretrain
from dsv3.train.resume import new_state
from dsv3.train.step import train_step


def in_recipe(config: PretrainConfig, recipe: str, **settings: object) -> PretrainConfig:
    return replace(config, precision=PrecisionConfig(recipe=recipe, **settings))


def batches(config: PretrainConfig, *, seed: int = 0, size: int = 4) -> list[TokenBatch]:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(10, config.model.vocab_size, (4, config.batch.sequence_length + 1), generator=generator)
    return [TokenBatch.from_rows(part) for part in rows.split(size)]


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_learns(small_run: PretrainConfig, recipe: str):
    state = new_state(in_recipe(small_run, recipe))
    losses = [train_step(state, batches=batches(small_run)).loss for _ in range(6)]
    assert losses[-1] < losses[0] - 0.5


def test_weights_are_quantised_once_a_step_whatever_the_micro_batches(small_run, monkeypatch):
    state = new_state(in_recipe(small_run, "fp8_v3"))
    quantised: list[int] = []
    quantise = seam.quantise_weight

    def count(weight, **settings):
        quantised.append(id(weight))
        return quantise(weight, **settings)

    monkeypatch.setattr(seam, "quantise_weight", count)
    train_step(state, batches=batches(small_run, size=1))
    wanted = [id(weight) for weight, _ in state.model.weights_in_fp8()]
    assert sorted(quantised) == sorted(wanted)


def test_each_step_reads_the_weights_as_they_then_are(small_run):
    """A second step from the first one's weights, in a state that has taken no step before, is the same step."""
    config = in_recipe(small_run, "fp8_v3")
    state, fresh = new_state(config), new_state(config)
    train_step(state, batches=batches(config))
    fresh.model.load_state_dict(state.model.state_dict())
    assert (
        train_step(state, batches=batches(config, seed=1)).loss
        == train_step(fresh, batches=batches(config, seed=1)).loss
    )


def test_a_loss_scale_that_is_not_needed_changes_no_bit(small_run):
    """It is a power of two, and with FP32 scales a power of two goes through every tile untouched."""
    plain, scaled = (new_state(in_recipe(small_run, "fp8_v3", loss_scale=scale)) for scale in (1.0, 1024.0))
    for seed in range(3):
        one, other = (train_step(state, batches=batches(small_run, seed=seed)) for state in (plain, scaled))
        assert (one.loss, one.gradient_norm) == (other.loss, other.gradient_norm)


def test_a_loss_scale_that_overflows_is_halved_until_it_does_not(small_run):
    wanted, scaled = (new_state(in_recipe(small_run, "fp8_v3", loss_scale=scale)) for scale in (1.0, 2.0**127))
    one, other = (train_step(state, batches=batches(small_run)) for state in (wanted, scaled))
    assert other.gradient_norm == pytest.approx(one.gradient_norm, rel=1e-4)


def test_a_fault_is_a_fault_at_every_loss_scale(small_run):
    state = new_state(in_recipe(small_run, "fp8_per_tensor"))
    with torch.no_grad():
        state.model.layers[0].self_attn.o_proj.weight[0, 0] = math.nan
    with pytest.raises(NonFiniteError, match="the loss is nan"):
        train_step(state, batches=batches(small_run))


@pytest.mark.parametrize("scale", [-1.0, 0.5, 3.0, math.inf, math.nan])
def test_a_loss_scale_that_would_round_is_refused(scale: float):
    with pytest.raises(ConfigError, match="power of two"):
        PrecisionConfig(loss_scale=scale)


def test_an_unknown_recipe_is_refused_with_those_there_are():
    with pytest.raises(ConfigError, match=r"choose one of 'original', 'fp8_v3'"):
        PrecisionConfig(recipe="fp8")


def test_a_run_in_fp8_that_stopped_goes_on_bit_for_bit(small_run: PretrainConfig, tmp_path: Path):
    config = in_recipe(small_run, "fp8_v3")
    whole = pretrain(config, folder=tmp_path / "whole")
    pretrain(config, folder=tmp_path / "cut", stop_after_steps=3)
    again = pretrain(config, folder=tmp_path / "cut")
    assert whole.step == again.step
    from safetensors.torch import load_file

    ours, theirs = (
        {
            name: tensor
            for file in sorted(result.export.glob("*.safetensors"))
            for name, tensor in load_file(file).items()
        }
        for result in (whole, again)
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
