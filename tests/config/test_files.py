import dataclasses
import json
import os
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3 import recipes
from dsv3.config import (
    BalanceConfig,
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    OptimConfig,
    PretrainConfig,
    RuntimeConfig,
    SourceConfig,
    YarnConfig,
)
from dsv3.config.files import dotted_names, from_dict, leaves, read_config, to_dict, write_config
from dsv3.errors import ConfigError

some = st.fixed_dictionaries
# Plain values, made into records by the tests: checking the annotations of a record draws random numbers, which a
# strategy must not.
sources = some({"path": st.text(min_size=1), "name": st.text(), "weight": st.floats(0, 1e6)})
yarns = some({"factor": st.floats(1, 1e4), "beta_fast": st.floats(1e-3, 1e3)})
models = some(
    {
        "q_lora_rank": st.none() | st.integers(1, 4096),
        "rope_scaling": st.none() | yarns,
        "norm_topk_prob": st.booleans(),
        "rope_theta": st.floats(1e-6, 1e9),
        "mtp_hidden_source": st.sampled_from(["post_norm", "pre_norm"]),
    }
)
settings_of_a_run = some(
    {
        "recipe": st.text(),
        "model": models,
        "data": some({"sources": st.lists(sources, max_size=3), "fim_rate": st.floats(0, 1)}),
        "optim": some({"bf16_moments": st.booleans(), "epsilon": st.floats(1e-30, 1)}),
        "balance": some({"method": st.sampled_from(["bias", "none"])}),
        "evaluation": some({"sample_prompts": st.lists(st.text(), max_size=3)}),
        "runtime": some({"seed": st.integers(0, 2**63 - 1)}),
        "total_tokens": st.integers(1, 10**18),
    }
)


@given(values=settings_of_a_run)
def test_a_config_survives_json(values):
    model = dict(values["model"])
    yarn = model.pop("rope_scaling")
    written_out = PretrainConfig(
        recipe=values["recipe"],
        model=ModelConfig(**model, rope_scaling=None if yarn is None else YarnConfig(**yarn)),
        data=DataConfig(
            sources=tuple(SourceConfig(**source) for source in values["data"]["sources"]),
            fim_rate=values["data"]["fim_rate"],
        ),
        optim=OptimConfig(**values["optim"]),
        balance=BalanceConfig(**values["balance"]),
        evaluation=EvaluationConfig(sample_prompts=tuple(values["evaluation"]["sample_prompts"])),
        runtime=RuntimeConfig(**values["runtime"]),
        total_tokens=values["total_tokens"],
    )
    assert from_dict(PretrainConfig, values) == written_out
    assert from_dict(PretrainConfig, json.loads(json.dumps(to_dict(written_out)))) == written_out


@pytest.mark.parametrize("name", recipes.names())
def test_a_written_recipe_is_read_back_equal(name, tmp_path):
    config = recipes.by_name(name)
    write_config(config, path=tmp_path / "run" / "config.json")
    assert read_config(tmp_path / "run" / "config.json") == config


def test_the_file_has_the_settings_in_the_order_of_the_fields(tmp_path):
    write_config(recipes.tiny(), path=tmp_path / "config.json")
    values = json.loads((tmp_path / "config.json").read_text())
    assert list(values) == [field.name for field in dataclasses.fields(PretrainConfig)]
    assert list(values["model"]) == [field.name for field in dataclasses.fields(ModelConfig)]


def test_a_prompt_that_is_not_valid_unicode_survives_the_file(tmp_path):
    # What os.fsdecode makes of a Latin-1 file name.
    config = PretrainConfig(data=DataConfig(sources=(SourceConfig(path="caf\udce9.txt"),)))
    write_config(config, path=tmp_path / "config.json")
    assert read_config(tmp_path / "config.json") == config


def test_left_out_settings_take_their_defaults():
    assert from_dict(PretrainConfig, {"model": {"hidden_size": 64}}).model == ModelConfig(hidden_size=64)


@pytest.mark.parametrize("value", [1e9, 10**9])
def test_a_whole_float_is_an_integer(value):
    read = from_dict(PretrainConfig, {"total_tokens": value}).total_tokens
    assert read == 10**9
    assert type(read) is int


def test_an_integer_is_a_float_where_one_is_wanted():
    read = from_dict(OptimConfig, {"weight_decay": 0}).weight_decay
    assert type(read) is float


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"total_tokens": 1.5}, "total_tokens = 1.5; it must be a whole number"),
        ({"total_tokens": True}, "total_tokens = True; it must be a whole number"),
        ({"total_tokens": "8"}, "total_tokens = '8'; it must be a whole number"),
        ({"total_tokens": None}, "total_tokens = None; it must be a whole number"),
        ({"total_tokens": float("inf")}, "it must be a whole number"),
        ({"total_tokens": float("nan")}, "it must be a whole number"),
        ({"optim": {"beta1": "0.9"}}, "optim.beta1 = '0.9'; it must be a finite number"),
        ({"optim": {"beta1": True}}, "optim.beta1 = True; it must be a finite number"),
        ({"optim": {"beta1": float("nan")}}, "it must be a finite number"),
        ({"optim": {"epsilon": 10**400}}, "it must be a finite number"),
        ({"optim": {"bf16_moments": 1}}, "optim.bf16_moments = 1; it must be true or false"),
        ({"runtime": {"device": 0}}, "runtime.device = 0; it must be text"),
        ({"model": {"rope_scaling": 40}}, "model.rope_scaling = 40; it must be a group of settings"),
        ({"model": {"rope_scaling": {"factor": "x"}}}, "model.rope_scaling.factor = 'x'"),
        ({"model": []}, "model = []; it must be a group of settings"),
        ({"data": {"sources": "a.txt"}}, "data.sources = 'a.txt'; it must be a list"),
        ({"data": {"sources": [{"path": 3}]}}, "data.sources[0].path = 3; it must be text"),
        ({"data": {"sources": [{}]}}, "data.sources[0] lacks 'path'"),
        ({"data": {"sources": [{"path": "a", "wieght": 1}]}}, "did you mean 'data.sources[0].weight'?"),
        ({"optim": {"beta1": 1.5}}, "in 'optim': beta1 = 1.5; it must lie between 0 and 1"),
        ({"optim": {"lerning_rate": {}}}, "unknown key 'optim.lerning_rate'; did you mean 'optim.learning_rate'?"),
        ({"optim": {"peak": 1}}, "unknown key 'optim.peak'; did you mean 'optim.learning_rate.peak'?"),
        ({"hidden_size": 1}, "unknown key 'hidden_size'; did you mean 'model.hidden_size'?"),
        ({"balance": {"zzz": 1}}, "unknown key 'balance.zzz'; 'balance' has method, bias_update_speed"),
    ],
)  # fmt: skip
def test_what_is_not_understood_is_refused_with_its_dotted_name(values: dict[str, Any], message: str):
    with pytest.raises(ConfigError) as caught:
        from_dict(PretrainConfig, values)
    assert message in str(caught.value)


@given(path=st.sampled_from(sorted(dotted_names(PretrainConfig))), data=st.data())
def test_a_key_with_one_letter_missing_is_refused_with_a_suggestion(path, data):
    parent, _, name = path.rpartition(".")
    place = data.draw(st.integers(0, len(name) - 1))
    misspelt = name[:place] + name[place + 1 :]
    known = set(dotted_names(PretrainConfig))
    if len(name) < 5 or f"{parent}.{misspelt}".lstrip(".") in known:
        return
    values: dict[str, Any] = {misspelt: 1}
    for group in reversed(parent.split(".") if parent else []):
        values = {group: values}
    with pytest.raises(ConfigError, match=r"unknown key .* did you mean"):
        from_dict(PretrainConfig, values)


def test_leaves_are_all_settings_and_absent_groups():
    named = dict(leaves(recipes.v3_671b()))
    assert named["optim.learning_rate.peak"] == 2.2e-4
    assert named["model.rope_scaling"] is None
    assert "model" not in named


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[1]", "holds a JSON list"),
        ("\xff", "is not JSON"),
        ('{"model_type": "deepseek_v3"}', "config.json of a published model"),
        ('{"modle": {}}', "did you mean 'model'?"),
    ],
)
def test_a_file_that_is_no_run_config_is_named_in_the_error(text, message, tmp_path):
    path = tmp_path / "config.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError) as caught:
        read_config(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_missing_file_is_named_in_the_error(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot read .*nowhere.json: No such file"):
        read_config(tmp_path / "nowhere.json")


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "config.json"
    write_config(recipes.tiny(), path=path)

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(ConfigError, match="No space left on device"):
        write_config(recipes.small(), path=path)
    assert read_config(path) == recipes.tiny()
    assert list(tmp_path.iterdir()) == [path]


def test_a_place_that_cannot_be_written_is_named_in_the_error(tmp_path):
    (tmp_path / "run").write_text("a file where the run folder should be")
    with pytest.raises(ConfigError, match=r"cannot write the settings to .*run/config.json"):
        write_config(recipes.tiny(), path=tmp_path / "run" / "config.json")
