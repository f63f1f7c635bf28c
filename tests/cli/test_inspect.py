import json
import subprocess
import sys

import pytest

from dsv3 import recipes
from dsv3.cli.inspect import compare, examine, find_subject, schedule
from dsv3.cli.main import main
from dsv3.config import PretrainConfig
from dsv3.config.files import from_dict, write_config
from dsv3.config.override import apply_overrides
from dsv3.config.published import published_from_model_config
from dsv3.errors import ConfigError


def inspect(*arguments, capsys):
    with pytest.raises(SystemExit) as left:
        main(["--quiet", "inspect", *arguments])
    assert left.value.code == 0
    return capsys.readouterr().out


def findings(*arguments, capsys):
    return json.loads(inspect(*arguments, "--json", capsys=capsys))


def test_json_holds_every_number_of_v3(capsys):
    found = findings("v3_671b", capsys=capsys)
    assert found["parameters"]["total"] == 671_026_419_200
    assert found["parameters"]["active"] == 36_625_618_432
    assert found["parameters"]["mtp"] == 11_610_068_224
    assert found["parameters"]["total_with_mtp_copies"] == 684_489_845_504
    assert found["parameters_of_one"]["expert"] == 44_040_192
    assert found["cache"]["bytes_per_token"] == 70_272
    assert found["cache"]["bytes_of_context"] == 163_840 * 70_272
    assert found["flops_per_token"]["training"] == 250_456_015_872
    assert found["published_format"]["fp8"] == {"tensors": 91_991, "num_bytes": 688_574_839_360}
    assert found["schedule"]["final_batch_tokens"] == 62_914_560


def test_the_settings_in_json_repeat_the_run(capsys):
    found = findings("tiny", "--set", "runtime.seed=5", capsys=capsys)
    config = apply_overrides(recipes.tiny(), assignments=["runtime.seed=5"])
    assert from_dict(PretrainConfig, found["settings"]) == config


@pytest.mark.parametrize("name", recipes.names())
def test_the_table_states_the_exact_counts_in_eighty_columns(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    printed = inspect(name, capsys=capsys)
    found = findings(name, capsys=capsys)
    assert f"{found['parameters']['total']:,}" in printed
    assert f"{found['parameters']['active']:,}" in printed
    assert f"{found['schedule']['total_steps']:,}" in printed
    assert max(map(len, printed.splitlines())) <= 80


def test_a_set_is_obeyed(capsys):
    found = findings("v3_671b", "--set", "model.num_hidden_layers=60", capsys=capsys)
    assert found["parameters"]["total"] == 671_026_419_200 - 11_507_286_272
    assert found["cache"]["bytes_per_token"] == 70_272 - 576 * 2


def test_the_context_is_obeyed_or_refused(capsys):
    found = findings("tiny", "--context", "100", capsys=capsys)
    assert found["cache"]["bytes_of_context"] == 100 * 3 * (32 + 16) * 2
    kept = found["activation_bytes"]
    # Two losses; for fewer tokens than the hidden state is wide, slopes of logits wait instead of the head's gradient.
    assert kept["of_row"] == 100 * kept["per_token"] + 2 * 100 * 4 * 4096
    assert kept["per_pass"] == 2 * 128 * 4 * 4096
    assert found["flops_per_token"]["training_at_context"] < found["flops_per_token"]["training"]
    with pytest.raises(ConfigError, match=r"a context of 4097 was asked for, but model.max_position_embeddings = 4096"):
        examine(find_subject("tiny", assignments=[]), context=4097)


def test_a_run_folder_and_its_config_file_are_read_alike(tmp_path, capsys):
    config = apply_overrides(recipes.tiny(), assignments=["model.hidden_size=128"])
    write_config(config, path=tmp_path / "config.json")
    of_folder = findings(str(tmp_path), capsys=capsys)
    assert of_folder == findings(str(tmp_path / "config.json"), capsys=capsys)
    assert from_dict(PretrainConfig, of_folder["settings"]) == config


def test_a_published_config_file_is_read_without_a_schedule(tmp_path, capsys):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(published_from_model_config(recipes.v3_671b().model, dtype="bfloat16")))
    found = findings(str(path), capsys=capsys)
    assert found["parameters"]["total"] == 671_026_419_200
    assert "schedule" not in found
    assert "671,026,419,200" in inspect(str(path), capsys=capsys)
    changed = findings(str(path), "--set", "model.num_nextn_predict_layers=0", capsys=capsys)
    assert changed["parameters"]["mtp"] == 0
    with pytest.raises(ConfigError, match="no training settings to compare"):
        compare(find_subject(str(path), assignments=[]), against="report")


def test_what_a_published_file_leaves_out_is_said(tmp_path, capsys):
    values = published_from_model_config(recipes.v3_671b().model, dtype="bfloat16")
    del values["scoring_func"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    assert "scoring_func" in inspect(str(tmp_path), capsys=capsys)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("tniy", "unknown recipe 'tniy'; did you mean 'tiny'?"),
        ("runs/nowhere", "there is no file or folder runs/nowhere; the recipes are tiny"),
        ("nowhere.json", "there is no file or folder nowhere.json"),
    ],
)
def test_what_is_not_there_is_refused(what, message):
    with pytest.raises(ConfigError) as caught:
        find_subject(what, assignments=[])
    assert message in str(caught.value)


def test_a_folder_without_settings_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot read .*config.json: No such file"):
        find_subject(str(tmp_path), assignments=[])


def test_milestones_stand_at_the_steps_where_the_schedule_changes():
    found = schedule(recipes.v3_671b())
    by_event = {milestone["event"]: milestone for milestone in found["milestones"]}
    cosine = by_event["learning rate leaves 0.00022 by a cosine"]
    floor = by_event["learning rate reaches 2.2e-05"]
    assert (cosine["tokens"], floor["tokens"]) == (10**13, 14_300_000_000_000)
    # At full batch 4.3T tokens take this many steps; both ends may fall inside a step.
    assert abs(floor["step"] - cosine["step"] - 4_300_000_000_000 / 62_914_560) <= 1
    assert by_event["router biases freeze"]["step"] == floor["step"]


def test_milestones_after_the_end_are_said_never_to_come():
    found = schedule(apply_overrides(recipes.tiny(), assignments=["total_tokens=100000"]))
    assert "router biases freeze" in found["never_reached"]
    assert all(milestone["tokens"] < 100_000 for milestone in found["milestones"])


def test_v2_has_no_cosine_no_mtp_and_no_bias_among_its_milestones():
    events = " ".join(milestone["event"] for milestone in schedule(recipes.v3_236b())["milestones"])
    assert "cosine" not in events
    assert "MTP" not in events
    assert "bias" not in events
    assert "learning rate reaches 7.584e-05" in events


def test_against_the_report_prints_every_difference_and_its_reason(capsys):
    printed = inspect("tiny", "--against", "report", "--set", "balance.sequence_loss_weight=0", capsys=capsys)
    assert "the same fraction of total_tokens as published" in printed
    assert "model.hidden_size" in printed
    assert "no reason recorded; recipe 'tiny' has 0.0001" in printed
    found = findings("tiny", "--against", "report", capsys=capsys)
    assert all(difference["reason"] for difference in found["differences"])
    assert all(difference["key"] in printed for difference in found["differences"])


def test_against_the_report_the_published_recipe_stands_as_published(capsys):
    printed = inspect("v3_671b", "--against", "report", capsys=capsys)
    assert "every setting is as published" in printed
    assert "optim.epsilon = 1e-08" in printed


def test_a_comparison_with_anything_else_is_refused():
    with pytest.raises(ConfigError, match="settings can be compared with 'report'"):
        compare(find_subject("tiny", assignments=[]), against="paper")


def test_ranks_that_share_a_row_keep_its_latents_and_a_part_of_everything_else(capsys):
    alone = findings("v3_671b", "--context", "131072", capsys=capsys)["activation_bytes"]
    shared = findings("v3_671b", "--context", "131072", "--set", "parallel.context=8", capsys=capsys)[
        "activation_bytes"
    ]
    others = 62 * (512 + 64) * 4 * (131_072 - 131_072 // 16)  # latents and rope keys, FP32, of 61 layers and one of MTP
    head = 2 * 129_280 * 7168 * 4  # its gradient, twice, FP32: with so many tokens less than the slopes of all logits
    assert shared["of_row"] - head == (alone["of_row"] - head) // 8 + others


def test_the_context_beside_a_comparison_is_refused_rather_than_ignored():
    code = "from dsv3.cli.main import main; main()"
    arguments = ["inspect", "tiny", "--against", "report", "--context", "5"]
    finished = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert finished.returncode == 2
    assert "error: --context" in finished.stderr
