import pytest

from dsv3 import recipes
from dsv3.config.files import dotted_names, leaves
from dsv3.config.override import apply_overrides
from dsv3.recipes.differences import LEFT_OPEN, NO_REASON, REASONS, differences

KEYS = set(dotted_names(type(recipes.v3_671b())))


def by_key(config):
    return {difference.key: difference for difference in differences(config)}


@pytest.mark.parametrize("name", recipes.names())
def test_every_difference_of_a_named_recipe_has_a_reason(name):
    assert [found.key for found in differences(recipes.by_name(name)) if NO_REASON in found.reason] == []


@pytest.mark.parametrize("name", recipes.names())
def test_every_setting_is_as_published_or_listed(name):
    config, published = recipes.by_name(name), dict(leaves(recipes.v3_671b()))
    unequal = {key for key, value in leaves(config) if value != published[key]} - {"recipe"}
    assert set(by_key(config)) == unequal


@pytest.mark.parametrize("name", REASONS)
def test_every_recorded_reason_is_for_a_setting_that_differs(name):
    differing = set(by_key(recipes.by_name(name)))
    # Reasons shared by several recipes may be idle in one of them, never in all.
    idle = set(REASONS[name]) - differing
    used_elsewhere = {key for other in recipes.names() for key in by_key(recipes.by_name(other))}
    assert idle <= used_elsewhere
    assert set(REASONS[name]) <= KEYS


def test_the_published_recipe_differs_in_nothing():
    assert differences(recipes.v3_671b()) == ()


def test_settings_left_open_exist():
    assert set(LEFT_OPEN) <= KEYS


@pytest.mark.parametrize(
    "assignment",
    [
        "optim.beta1=0.8",
        "model.rope_scaling.factor=40",
        "balance.sequence_loss_weight=0",
        "balance.bias_update_speed=0",
        "runtime.seed=7",
    ],
)
def test_a_setting_that_a_user_changed_has_no_reason(assignment):
    # Drifts that other programs shipped unnoticed: YaRN on at 4K, no balance loss, a bias that never moves.
    config = apply_overrides(recipes.tiny(), assignments=[assignment])
    key = "model.rope_scaling" if "rope_scaling" in assignment else assignment.partition("=")[0]
    reason = next(found.reason for found in differences(config) if found.key.startswith(key))
    assert reason.startswith(NO_REASON)


def test_the_reason_of_a_recipe_is_not_lent_to_another_value():
    config = apply_overrides(recipes.tiny(), assignments=["model.hidden_size=512"])
    assert by_key(config)["model.hidden_size"].reason == f"{NO_REASON}; recipe 'tiny' has 128"


def test_a_schedule_scaled_with_the_run_is_recognised_whoever_scaled_it():
    config = apply_overrides(
        recipes.v3_671b(),
        assignments=["total_tokens=148e9", "mtp.switch_tokens=100e9", "balance.bias_freeze_tokens=150e9"],
    )
    found = by_key(config)
    assert found["mtp.switch_tokens"].reason == "the same fraction of total_tokens as published"
    assert found["balance.bias_freeze_tokens"].reason.startswith(NO_REASON)


def test_a_config_of_no_known_recipe_is_compared_all_the_same():
    config = apply_overrides(recipes.tiny(), assignments=["recipe=mine"])
    assert by_key(config)["model.hidden_size"].reason == NO_REASON
