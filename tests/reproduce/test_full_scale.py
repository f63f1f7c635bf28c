"""What is written for a cluster is the report's: 15.7 billion parameters, 1.33T tokens."""

import pytest

from dsv3.config.files import read_config
from dsv3.plan.counts import count_parameters, training_flops_per_token
from dsv3.reproduce.catalogue import EXPERIMENTS
from dsv3.reproduce.full_scale import BIAS, FULL, full_scale_run, full_scale_text


def test_every_experiment_says_how_it_is_made_at_full_scale():
    assert FULL.keys() == EXPERIMENTS.keys()


def test_the_ablation_of_balancing_is_table_5s(tmp_path):
    text = full_scale_text("balancing", folder=tmp_path)
    assert text.count("torchrun --nnodes 32 --nproc-per-node 8") == 4
    config = read_config(tmp_path / "bias.json")
    assert config == full_scale_run(BIAS)
    assert config.total_tokens == 1_330_000_000_000
    assert count_parameters(config.model).total == pytest.approx(15.7e9, rel=0.01)
    assert (config.model.scoring_func, config.model.norm_topk_prob) == ("sigmoid", True)
    assert (config.balance.method, config.balance.sequence_loss_weight) == ("bias", 0.0)


def test_the_dense_model_has_the_flops_of_the_mixture():
    mixture, dense = (full_scale_run(FULL["moe"].arms[name]).model for name in ("v3", "dense"))
    flops = [training_flops_per_token(model, sequence_length=4096) for model in (mixture, dense)]
    assert flops[1] == pytest.approx(flops[0], rel=0.02)


def test_what_is_at_scale_already_says_so(tmp_path):
    assert "leave out --scale full" in full_scale_text("bubbles", folder=tmp_path)
    assert not list(tmp_path.iterdir())
