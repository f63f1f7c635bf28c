import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3 import recipes
from dsv3.config import SourceConfig, YarnConfig
from dsv3.config.files import leaves, to_dict
from dsv3.config.override import apply_overrides
from dsv3.errors import ConfigError

TINY = recipes.tiny()


def changed(*assignments: str):
    return apply_overrides(TINY, assignments=list(assignments))


@pytest.mark.parametrize("name", recipes.names())
def test_assigning_every_setting_of_one_recipe_to_another_gives_that_recipe(name):
    config = recipes.by_name(name)
    values = {key: to_json(value) for key, value in leaves(config)}
    assert changed(*(f"{key}={value}" for key, value in values.items())) == config


def to_json(value):
    return json.dumps(
        [to_dict(item) for item in value]
        if value and isinstance(value, tuple) and not isinstance(value[0], str | int)
        else value
    )


@given(text=st.text(max_size=20).map(str.strip))
def test_a_text_setting_takes_bare_text_as_it_stands(text):
    # A quoted string is JSON and loses its quotes; anything else is kept, even `3`, `true` and `null`.
    if text.startswith('"'):
        return
    assert changed(f"data.tokenizer={text}").data.tokenizer == text


def test_a_quoted_text_loses_its_quotes():
    assert changed('runtime.device="cpu"').runtime.device == "cpu"


def test_nothing_assigned_changes_nothing():
    assert changed() == TINY


def test_the_last_assignment_wins():
    assert changed("runtime.seed=1", "runtime.seed=2").runtime.seed == 2


def test_a_setting_of_an_absent_group_makes_the_group():
    assert changed("model.rope_scaling.factor=40").model.rope_scaling == YarnConfig(factor=40.0)
    assert changed('model.rope_scaling={"beta_slow": 2}').model.rope_scaling == YarnConfig(beta_slow=2.0)


def test_null_removes_an_optional_group():
    with_yarn = replace(TINY, model=replace(TINY.model, rope_scaling=YarnConfig()))
    assert apply_overrides(with_yarn, assignments=["model.rope_scaling=null"]) == TINY


def test_an_object_changes_the_settings_it_names_and_leaves_the_others():
    rate = changed('optim.learning_rate={"peak": 0.5}').optim.learning_rate
    assert rate == replace(TINY.optim.learning_rate, peak=0.5)
    nested = changed('optim={"learning_rate": {"peak": 0.5}, "beta1": 0.5}').optim
    assert nested == replace(TINY.optim, beta1=0.5, learning_rate=rate)


def test_a_list_is_given_whole():
    sources = changed('data.sources=[{"path": "a.txt", "weight": 2}]').data.sources
    assert sources == (SourceConfig(path="a.txt", weight=2.0),)
    assert changed('evaluation.sample_prompts=["a", "b"]').evaluation.sample_prompts == ("a", "b")


def test_settings_that_bind_one_another_may_be_changed_together():
    # The first alone would put the plateau after the end of the cosine.
    rate = changed(
        "optim.learning_rate.constant_until_tokens=3e6",
        "optim.learning_rate.cosine_until_tokens=4e6",
        "optim.learning_rate.hold_until_tokens=5e6",
    ).optim.learning_rate
    assert (rate.constant_until_tokens, rate.hold_until_tokens) == (3_000_000, 5_000_000)


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("optim.lerning_rate=1", "unknown key 'optim.lerning_rate'; did you mean 'optim.learning_rate'?"),
        ("optim.learning_rate.warmpu_steps=1", "did you mean 'optim.learning_rate.warmup_steps'?"),
        ("optim.warmpu_steps=1", "unknown key 'optim.warmpu_steps'; did you mean 'optim.learning_rate.warmup_steps'?"),
        ("optmi.beta1=1", "unknown key 'optmi'; did you mean 'optim'?"),
        ("model.rope_scaling.fcator=1", "did you mean 'model.rope_scaling.factor'?"),
        ('model.rope_scaling={"fcator": 1}', "did you mean 'model.rope_scaling.factor'?"),
        ("optim.learning_rate=1", "set one of them, such as optim.learning_rate.peak=1"),
        ("runtime.seed.x=1", "'runtime.seed' is a single setting and has no parts"),
        ("data.sources.0=1", "'data.sources' is a single setting"),
        ("runtime.seed", "write it as name=value"),
        ("=3", "write it as name=value"),
        ("runtime.seed=", "runtime.seed = ''; it must be a whole number"),
        ("runtime.seed=one", "runtime.seed = 'one'; it must be a whole number"),
        ("optim.bf16_moments=yes", "optim.bf16_moments = 'yes'; it must be true or false"),
        ("model=null", "model = None; it must be a group of settings"),
        ("runtime.dtype=float8", "in 'runtime': dtype = 'float8'; choose one of 'auto', 'float32', 'bfloat16'"),
        ("batch.sequence_length=100000", "is longer than model.max_position_embeddings"),
        ("runtime.seed=" + "9" * 5000, "must be a whole number"),
    ],
)
def test_what_cannot_be_obeyed_is_refused(assignment, message):
    with pytest.raises(ConfigError) as caught:
        changed(assignment)
    assert message in str(caught.value)
