"""A finished run, extended: the same weights to begin with, longer rows, YaRN in what comes out."""

import json
from dataclasses import replace

import pytest
import torch

from dsv3 import load
from dsv3.checkpoint.snapshot import read_snapshot
from dsv3.checkpoint.snapshot_folder import latest_snapshot
from dsv3.cli.main import main
from dsv3.config.files import read_config
from dsv3.errors import SnapshotError
from dsv3.train import loop as loop_file
from dsv3.train.loop import pretrain
from dsv3.train.resume import new_state, take_weights


@pytest.fixture
def finished(small_run, tmp_path):
    config = replace(small_run, model=replace(small_run.model, max_position_embeddings=128))
    pretrain(config, folder=tmp_path / "run")
    return tmp_path / "run"


def status(*arguments):
    with pytest.raises(SystemExit) as left:
        main(list(map(str, arguments)))
    return left.value.code


def test_a_run_is_extended_in_two_phases_and_taken_up_where_it_was_stopped(finished, monkeypatch, capsys):
    begun = []
    original = loop_file.take_weights

    def watched(state, *, folder):
        original(state, folder=folder)
        begun.append({name: weight.clone() for name, weight in state.optimizer.master.items()})

    monkeypatch.setattr(loop_file, "take_weights", watched)
    assert status("extend", finished, "--lengths", "64,96", "--steps", "2", "--set", "snapshot.every_steps=1") == 0
    for start, phase, length in (
        (finished, finished / "extended-64", 64),
        (finished / "extended-64", finished / "extended-96", 96),
    ):
        weights = read_snapshot(latest_snapshot(start / "snapshots"))[0]["model"]
        given = begun.pop(0)
        assert all(torch.equal(weight, weights[name]) for name, weight in given.items())
        config = read_config(phase / "config.json")
        assert config.batch.sequence_length == length
        assert (phase / "corpus").resolve() == (finished / "corpus").resolve()
        steps = [json.loads(line) for line in (phase / "metrics.jsonl").read_text().splitlines()]
        rates = {one["learning_rate"] for one in steps if one["kind"] == "step"}
        assert rates == {read_config(finished / "config.json").optim.learning_rate.final}
        exported = json.loads((phase / "export" / "config.json").read_text())
        assert exported["rope_scaling"]["type"] == "yarn"
        assert exported["rope_scaling"]["original_max_position_embeddings"] == 32
        model = load(phase, device="cpu")
        assert model.trained_length == length
        assert model.config.rope_scaling is not None
        assert model.config.max_position_embeddings == 128
    capsys.readouterr()
    assert status("extend", finished, "--lengths", "64,96", "--steps", "2", "--set", "snapshot.every_steps=1") == 0
    assert begun == []  # nothing was trained again
    found = json.loads((finished / "extension.json").read_text())
    assert (found["trained"], found["lengths"]) == (32, [64, 96])
    assert "finished after 2 steps" in capsys.readouterr().out


def test_what_cannot_be_extended_is_told(finished, small_run, tmp_path, capsys):
    assert status("extend", tmp_path / "absent") == 2
    assert "is no run folder" in capsys.readouterr().err
    pretrain(small_run, folder=tmp_path / "half", stop_after_steps=1)
    assert status("extend", tmp_path / "half") == 2
    assert "has not finished; go on with" in capsys.readouterr().err
    assert status("extend", finished, "--lengths", "long") == 2
    assert "give whole numbers" in capsys.readouterr().err
    assert status("extend", finished, "--lengths", "16") == 2
    assert "each must be longer than the last" in capsys.readouterr().err


def test_weights_of_another_model_are_refused(finished, small_run, tmp_path):
    wider = new_state(replace(small_run, model=replace(small_run.model, moe_intermediate_size=24)))
    with pytest.raises(SnapshotError, match=r"is of another model: .* has shape"):
        take_weights(wider, folder=finished)
    deeper = new_state(replace(small_run, model=replace(small_run.model, num_hidden_layers=3)))
    with pytest.raises(SnapshotError, match="is of another model: it lacks"):
        take_weights(deeper, folder=finished)
    with pytest.raises(SnapshotError, match="has no snapshot"):
        take_weights(deeper, folder=tmp_path / "absent")
