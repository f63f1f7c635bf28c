from dataclasses import replace
from pathlib import Path

import pytest

from dsv3.config import PretrainConfig, YarnConfig
from dsv3.config.files import read_config
from dsv3.errors import ConfigError, TrainingError
from dsv3.train.run_folder import open_run_folder


def begin(folder: Path, config: PretrainConfig, *, with_snapshot: bool = True) -> None:
    with open_run_folder(folder, config=config):
        pass
    if with_snapshot:
        (folder / "snapshots" / "step-000001").mkdir(parents=True)


def test_the_settings_are_written_and_read_back_the_same(tmp_path: Path):
    config = PretrainConfig()
    begin(tmp_path / "a" / "run", config)
    assert read_config(tmp_path / "a" / "run" / "config.json") == config


def test_changed_settings_are_refused_by_name_with_both_values(tmp_path: Path):
    config = PretrainConfig()
    begin(tmp_path, config)
    changed = replace(config, total_tokens=5, model=replace(config.model, rms_norm_eps=1e-5, rope_scaling=YarnConfig()))
    with pytest.raises(ConfigError) as refused, open_run_folder(tmp_path, config=changed):
        pass
    message = str(refused.value)
    assert "total_tokens was 14800000000000 and is now 5" in message
    assert "model.rms_norm_eps was 1e-06 and is now 1e-05" in message
    assert "model.rope_scaling.factor was null and is now 40.0" in message
    assert "--run" in message
    assert read_config(tmp_path / "config.json") == config


def test_settings_that_change_no_result_may_change(tmp_path: Path):
    config = PretrainConfig()
    begin(tmp_path, config)
    changed = replace(
        config,
        snapshot=replace(config.snapshot, every_steps=7),
        evaluation=replace(config.evaluation, max_tokens=9),
        runtime=replace(config.runtime, threads=3),
        batch=replace(config.batch, micro_batch_sequences=2),
    )
    begin(tmp_path, changed, with_snapshot=False)
    assert read_config(tmp_path / "config.json") == changed


def test_before_the_first_snapshot_everything_may_change(tmp_path: Path):
    begin(tmp_path, PretrainConfig(), with_snapshot=False)
    begin(tmp_path, PretrainConfig(total_tokens=5))
    assert read_config(tmp_path / "config.json").total_tokens == 5


def test_two_processes_cannot_train_in_one_folder(tmp_path: Path):
    config = PretrainConfig()
    with (
        open_run_folder(tmp_path, config=config),
        pytest.raises(TrainingError, match="another process is training in"),
        open_run_folder(tmp_path, config=config),
    ):
        pass


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(TrainingError, match=r"cannot write to the run folder .*file/run: Not a directory"),
        open_run_folder(tmp_path / "file" / "run", config=PretrainConfig()),
    ):
        pass
