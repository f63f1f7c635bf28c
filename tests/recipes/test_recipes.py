"""The recipes are pinned whole. After a change that is meant, write the pins anew and look at what git shows:

.venv/bin/python tests/recipes/test_recipes.py
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dsv3 import recipes
from dsv3.config import LearningRateConfig
from dsv3.config.files import to_dict, write_config
from dsv3.errors import ConfigError

PINS = Path(__file__).parents[1] / "golden" / "recipes"


@pytest.mark.parametrize("name", recipes.names())
def test_a_recipe_is_what_its_pin_says(name):
    assert to_dict(recipes.by_name(name)) == json.loads((PINS / f"{name}.json").read_text())


def test_every_pin_is_of_a_recipe():
    assert {path.stem for path in PINS.iterdir()} == set(recipes.names())


@pytest.mark.parametrize("name", recipes.names())
def test_a_recipe_carries_its_own_name(name):
    assert recipes.by_name(name).recipe == name
    assert getattr(recipes, name)() == recipes.by_name(name)


def test_an_unknown_recipe_is_refused_with_the_nearest_name():
    with pytest.raises(ConfigError, match=r"unknown recipe 'v3_617b'; did you mean 'v3_671b'\?"):
        recipes.by_name("v3_617b")
    with pytest.raises(ConfigError, match="there are tiny, small, v3_16b, v3_236b, v3_671b"):
        recipes.by_name("zzz")


def test_the_published_recipe_is_the_table_of_report_4_2():
    config = recipes.v3_671b()
    assert config.optim.learning_rate == LearningRateConfig(
        peak=2.2e-4,
        warmup_steps=2000,
        constant_until_tokens=10 * 10**12,
        cosine_until_tokens=(10_000 + 4_300) * 10**9,
        cosine_floor=2.2e-5,
        hold_until_tokens=(10_000 + 4_300 + 333) * 10**9,
        final=7.3e-6,
    )
    assert config.total_tokens == (10_000 + 4_300 + 333 + 167) * 10**9
    optim, batch, balance, mtp = config.optim, config.batch, config.balance, config.mtp
    assert (optim.beta1, optim.beta2, optim.weight_decay, optim.clip_gradient_norm) == (0.9, 0.95, 0.1, 1.0)
    assert (batch.sequence_length, batch.start_sequences, batch.final_sequences) == (4096, 3072, 15360)
    assert batch.ramp_tokens == 469 * 10**9
    assert batch.final_sequences * batch.sequence_length == 62_914_560
    assert (balance.method, balance.bias_update_speed, balance.sequence_loss_weight) == ("bias", 1e-3, 1e-4)
    assert config.total_tokens - balance.bias_freeze_tokens == 500 * 10**9
    assert (mtp.early_weight, mtp.late_weight, mtp.switch_tokens) == (0.3, 0.1, 10**13)
    assert config.model.initializer_range == 0.006
    assert config.data.fim_rate == 0.1


@pytest.mark.parametrize("name", recipes.names())
def test_no_recipe_has_yarn_on_before_the_context_extension(name):
    assert recipes.by_name(name).model.rope_scaling is None


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        # Columns of the table in section 1.1 of the fact sheet, in its order.
        ("v3_16b", (102400, 2048, 10944, 1408, 27, 1, 16, 64, 2, 6, 1, 1, 1.0, "softmax", None)),
        ("v3_236b", (102400, 5120, 12288, 1536, 60, 1, 128, 160, 2, 6, 8, 3, 16.0, "softmax", 1536)),
        ("v3_671b", (129280, 7168, 18432, 2048, 61, 3, 128, 256, 1, 8, 8, 4, 2.5, "sigmoid", 1536)),
    ],
)
def test_the_published_shapes_are_those_of_the_inference_configs(name, sizes):
    model = recipes.by_name(name).model
    assert sizes == (
        model.vocab_size,
        model.hidden_size,
        model.intermediate_size,
        model.moe_intermediate_size,
        model.num_hidden_layers,
        model.first_k_dense_replace,
        model.num_attention_heads,
        model.n_routed_experts,
        model.n_shared_experts,
        model.num_experts_per_tok,
        model.n_group,
        model.topk_group,
        model.routed_scaling_factor,
        model.scoring_func,
        model.q_lora_rank,
    )
    heads = (model.kv_lora_rank, model.qk_nope_head_dim, model.qk_rope_head_dim, model.v_head_dim)
    assert heads == (512, 128, 64, 128)


def test_recipes_import_neither_torch_nor_numpy():
    code = (
        "import sys, dsv3; [dsv3.recipes.by_name(name) for name in dsv3.recipes.names()]; "
        "import dsv3.recipes.differences; sys.exit(bool({'torch', 'numpy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


if __name__ == "__main__":
    for recipe in recipes.names():
        write_config(recipes.by_name(recipe), path=PINS / f"{recipe}.json")
