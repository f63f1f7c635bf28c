import json

import pytest

from dsv3.checkpoint.published import save_published
from dsv3.errors import CheckpointError, SnapshotError
from dsv3.infer.model_folder import find_model


def test_a_published_folder_is_taken_as_it_is(published):
    found = find_model(published)
    assert (found.weights, found.run, found.is_snapshot) == (published, None, False)
    assert found.tokenizer == published / "tokenizer.json"


def test_a_run_without_export_gives_its_newest_snapshot(run_with_snapshots):
    found = find_model(run_with_snapshots)
    assert found.is_snapshot
    assert found.weights == run_with_snapshots / "snapshots" / "step-000020"
    assert found.tokenizer == run_with_snapshots / "corpus" / "tokenizer" / "tokenizer.json"


def test_a_finished_export_goes_before_snapshots(run_with_snapshots, model):
    export = run_with_snapshots / "export"
    save_published(model, folder=export, tokenizer_folder=run_with_snapshots / "corpus" / "tokenizer")
    for folder in (run_with_snapshots, export):
        found = find_model(folder)
        assert (found.weights, found.run, found.is_snapshot) == (export, run_with_snapshots, False)


def test_an_unfinished_export_is_passed_over(run_with_snapshots):
    (run_with_snapshots / "export").mkdir()
    (run_with_snapshots / "export" / "config.json").write_text('{"model_type": "deepseek_v3"}')
    assert find_model(run_with_snapshots).is_snapshot


def test_a_run_that_has_saved_nothing_says_so(new_run):
    with pytest.raises(CheckpointError, match="neither a snapshot nor an export yet"):
        find_model(new_run)


def test_a_damaged_newest_snapshot_gives_the_one_before(run_with_snapshots):
    weights = run_with_snapshots / "snapshots" / "step-000020" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    assert find_model(run_with_snapshots).weights.name == "step-000010"


def test_a_run_with_damaged_snapshots_alone_is_refused(run_with_snapshots):
    for weights in run_with_snapshots.glob("snapshots/*/model.safetensors"):
        weights.write_bytes(b"")
    with pytest.raises(SnapshotError, match="no snapshot"):
        find_model(run_with_snapshots)


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ({}, "it is empty"),
        ({"notes.txt": "", "pytorch_model.bin": ""}, "it holds notes.txt, pytorch_model.bin"),
        ({"model.safetensors": ""}, "weights but no config.json"),
        ({"model.safetensors": "", "config.json": "{}"}, "its config.json names no model_type"),
        ({"config.json": '{"model_type": "deepseek_v3"}'}, "neither model.safetensors nor model.safetensors.index"),
        ({f"part{n}": "" for n in range(11)}, "and 3 more"),
        ({"config.json": "{oh no"}, "is not JSON"),
    ],
)
def test_a_folder_that_is_no_model_says_what_was_found(tmp_path, files, found):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(CheckpointError, match=found):
        find_model(tmp_path)


def test_the_error_says_what_each_kind_of_model_needs(tmp_path):
    with pytest.raises(CheckpointError, match=r"there is no such folder.*run folder.*export folder.*published"):
        find_model(tmp_path / "absent")


def test_a_file_is_not_a_model(tmp_path):
    (tmp_path / "model.gguf").write_text(json.dumps({}))
    with pytest.raises(CheckpointError, match="it is a file"):
        find_model(tmp_path / "model.gguf")
