import errno
import json
import logging
import math
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import dsv3.train.loop as loop_file
from dsv3.checkpoint.published import load_published
from dsv3.checkpoint.snapshot import read_snapshot
from dsv3.config import HealthConfig, PretrainConfig, SnapshotConfig
from dsv3.config.files import read_config
from dsv3.data.prepare import load_prepared
from dsv3.errors import ConfigError, NonFiniteError, SnapshotError, TrainingError
from dsv3.model.transformer import Transformer
from dsv3.train.event import TrainEvent
from dsv3.train.loop import pretrain


def records(folder: Path, kind: str) -> list[dict]:
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def test_a_run_goes_from_text_to_an_exported_model(small_run: PretrainConfig, tmp_path: Path):
    events: list[TrainEvent] = []
    result = pretrain(small_run, folder=tmp_path, on_event=events.append)
    assert (result.finished, result.interrupted, result.step, result.tokens) == (True, False, 12, 12 * 4 * 32)
    assert read_config(tmp_path / "config.json") == small_run
    assert sorted(path.name for path in (tmp_path / "snapshots").iterdir()) == ["step-000008", "step-000012"]

    steps = records(tmp_path, "step")
    assert [record["step"] for record in steps] == list(range(1, 13))
    assert steps[-1]["loss"] < steps[0]["loss"] - 1
    validations = records(tmp_path, "validation")
    assert [record["step"] for record in validations] == [6, 12]
    assert validations[1]["bits_per_byte"] < validations[0]["bits_per_byte"]
    assert validations[1]["bits_per_byte"] == result.validation.bits_per_byte
    assert validations[1]["ema_bits_per_byte"] > 0

    tensors, _ = read_snapshot(tmp_path / "snapshots" / "step-000012")
    exported = load_published(result.export, dtype=torch.float32, device="cpu").state_dict()
    assert exported.keys() == tensors["model"].keys()
    assert all(torch.equal(exported[name], tensor) for name, tensor in tensors["model"].items())

    assert {event.kind for event in events} == {"corpus", "step", "validation", "snapshot", "export"}
    assert {event.stage for event in events} == {"corpus", "train", "export"}
    assert [event.metrics for event in events if event.kind == "step"] == steps
    assert {event.total_steps for event in events if event.stage == "train"} == {12}


def test_stopping_after_some_steps_ends_the_call_and_not_the_run(small_run: PretrainConfig, tmp_path: Path):
    first = pretrain(small_run, folder=tmp_path, stop_after_steps=5)
    assert (first.finished, first.interrupted, first.step, first.export) == (False, False, 5, None)
    assert first.snapshot == tmp_path / "snapshots" / "step-000005"
    events: list[TrainEvent] = []
    second = pretrain(small_run, folder=tmp_path, on_event=events.append)
    assert (second.finished, second.step) == (True, 12)
    assert [event.step for event in events if event.kind == "resume"] == [5]
    assert [record["step"] for record in records(tmp_path, "step")] == list(range(1, 13))
    assert [record["step"] for record in records(tmp_path, "resume")] == [5]


def test_a_finished_run_is_left_as_it_is(without_extras: PretrainConfig, tmp_path: Path):
    pretrain(without_extras, folder=tmp_path)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "export").iterdir()}
    result = pretrain(without_extras, folder=tmp_path)
    assert (result.finished, result.step) == (True, 12)
    assert result.export == tmp_path / "export"
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "export").iterdir()} == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_call_after_the_step_with_a_snapshot(
    without_extras: PretrainConfig, tmp_path: Path, number: signal.Signals
):
    def interrupt(event: TrainEvent) -> None:
        if event.kind == "step" and event.step == 3:
            os.kill(os.getpid(), number)

    result = pretrain(without_extras, folder=tmp_path, on_event=interrupt)
    assert (result.interrupted, result.finished, result.step) == (True, False, 3)
    assert result.snapshot == tmp_path / "snapshots" / "step-000003"
    assert pretrain(without_extras, folder=tmp_path).finished


def test_a_second_signal_stops_at_once_and_the_last_snapshot_is_good(without_extras: PretrainConfig, tmp_path: Path):
    def interrupt(event: TrainEvent) -> None:
        if event.kind == "step" and event.step >= 6:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        pretrain(without_extras, folder=tmp_path, on_event=interrupt)
    result = pretrain(without_extras, folder=tmp_path)
    assert result.finished
    assert [record["step"] for record in records(tmp_path, "resume")] == [4]


def test_settings_changed_on_resume_are_refused_and_nothing_is_lost(without_extras: PretrainConfig, tmp_path: Path):
    pretrain(without_extras, folder=tmp_path, stop_after_steps=2)
    changed = replace(without_extras, total_tokens=99)
    with pytest.raises(ConfigError, match="total_tokens was 1536 and is now 99"):
        pretrain(changed, folder=tmp_path)
    saving_more = replace(without_extras, snapshot=SnapshotConfig(every_steps=1, keep_last=3))
    assert pretrain(saving_more, folder=tmp_path).step == 12
    assert len(list((tmp_path / "snapshots").iterdir())) == 3


def test_a_damaged_snapshot_is_passed_over_for_the_one_before(
    without_extras: PretrainConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    pretrain(without_extras, folder=tmp_path / "left", stop_after_steps=9)
    pretrain(without_extras, folder=tmp_path / "hurt", stop_after_steps=9)
    file = tmp_path / "hurt" / "snapshots" / "step-000009" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    ends = [pretrain(without_extras, folder=tmp_path / name).snapshot for name in ("left", "hurt")]
    assert "step-000009 is damaged" in caplog.text
    assert [record["step"] for record in records(tmp_path / "hurt", "step")] == list(range(1, 13))
    (ours, _), (theirs, _) = (read_snapshot(end) for end in ends)
    assert all(torch.equal(ours["model"][name], tensor) for name, tensor in theirs["model"].items())


def test_a_snapshot_of_a_run_on_other_text_is_refused(without_extras: PretrainConfig, tmp_path: Path):
    pretrain(without_extras, folder=tmp_path, stop_after_steps=2)
    marker = tmp_path / "corpus" / "corpus.json"
    marker.write_text(marker.read_text().replace('"duplicates": 0', '"duplicates": 1'))
    with pytest.raises(SnapshotError, match=r"is not what .*step-000002 was trained on"):
        pretrain(without_extras, folder=tmp_path)


def test_a_loss_that_is_not_finite_names_step_documents_and_snapshot(
    without_extras: PretrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    pretrain(without_extras, folder=tmp_path, stop_after_steps=4)
    original = loop_file.new_state

    def spoiled(config: PretrainConfig, **given: object) -> loop_file.TrainState:
        state = original(config, **given)
        steps = []

        def spoil(*arguments: object) -> None:
            steps.append(1)
            if len(steps) == 4:  # the second micro-batch of the second step
                with torch.no_grad():
                    state.model.norm.weight[0] = math.inf

        state.model.register_forward_pre_hook(spoil)
        return state

    monkeypatch.setattr(loop_file, "new_state", spoiled)
    with pytest.raises(NonFiniteError) as stopped:
        pretrain(without_extras, folder=tmp_path)
    message = str(stopped.value)
    assert "step 6 cannot be taken: the loss is" in message
    assert "in rows 22 to 23 of the data" in message
    assert ".txt of '" in message
    assert "snapshots/step-000004" in message
    assert records(tmp_path, "step")[-1]["step"] == 5
    monkeypatch.setattr(loop_file, "new_state", original)
    assert pretrain(without_extras, folder=tmp_path).finished


def test_a_full_disk_while_logging_is_said_and_loses_nothing(
    without_extras: PretrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def full(*arguments: object, **settings: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    pretrain(without_extras, folder=tmp_path, stop_after_steps=4)
    with monkeypatch.context() as patch:
        patch.setattr(loop_file.MetricsLog, "step", full)
        with pytest.raises(TrainingError, match=r"No space left on device.*same command"):
            pretrain(without_extras, folder=tmp_path)
    assert pretrain(without_extras, folder=tmp_path).finished


def test_the_sampler_is_asked_at_every_validation(small_run: PretrainConfig, tmp_path: Path):
    config = replace(small_run, evaluation=replace(small_run.evaluation, sample_prompts=("the sea", "a moon")))
    modes = []

    def sampler(model: Transformer, prompt: str) -> str:
        modes.append(model.training)
        return f"{prompt}!"

    pretrain(config, folder=tmp_path, sampler=sampler)
    samples = records(tmp_path, "sample")
    assert [(record["step"], record["prompt"], record["text"]) for record in samples] == [
        (6, "the sea", "the sea!"),
        (6, "a moon", "a moon!"),
        (12, "the sea", "the sea!"),
        (12, "a moon", "a moon!"),
    ]
    assert modes == [False] * 4


def test_watching_and_validating_change_nothing_that_is_learned(
    small_run: PretrainConfig, without_extras: PretrainConfig, tmp_path: Path
):
    ends = [
        pretrain(small_run, folder=tmp_path / "watched", sampler=lambda model, prompt: "").snapshot,
        pretrain(without_extras, folder=tmp_path / "alone").snapshot,
    ]
    (ours, _), (theirs, _) = (read_snapshot(end) for end in ends)
    for group, named in ours.items():
        assert all(torch.equal(tensor, theirs[group][name]) for name, tensor in named.items())


def test_a_step_that_cannot_be_taken_is_passed_over_where_that_is_wanted(
    without_extras: PretrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    original = loop_file.train_step

    def faulty(state: loop_file.TrainState, **given: object) -> loop_file.StepMetrics:
        if state.step == 5:
            raise NonFiniteError("step 6 cannot be taken: the loss is nan")
        return original(state, **given)

    monkeypatch.setattr(loop_file, "train_step", faulty)
    config = replace(without_extras, health=HealthConfig(on_non_finite="skip"))
    result = pretrain(config, folder=tmp_path)
    assert result.finished
    assert [record["step"] for record in records(tmp_path, "step")] == [*range(1, 6), *range(7, 13)]
    (skipped,) = records(tmp_path, "skipped")
    assert skipped["step"] == 6
    assert skipped["message"].startswith("step 6 cannot be taken: the loss is nan; its rows are passed over")
    assert load_prepared(tmp_path / "corpus")  # and the run's snapshots go on from there
    assert pretrain(config, folder=tmp_path).step == 12


def test_without_held_out_text_it_trains_and_says_so(
    without_extras: PretrainConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    config = replace(without_extras, data=replace(without_extras.data, held_out_rate=0.0))
    result = pretrain(config, folder=tmp_path, stop_after_steps=1)
    assert result.validation is None
    assert "no document was held out" in caplog.text


def test_the_progress_of_the_corpus_is_told(without_extras: PretrainConfig, tmp_path: Path):
    events: list[TrainEvent] = []
    pretrain(without_extras, folder=tmp_path, stop_after_steps=1, on_event=events.append)
    told = [event.metrics for event in events if event.stage == "corpus"]
    assert told
    assert all(metrics.keys() == {"part", "done", "total"} for metrics in told)
    assert load_prepared(tmp_path / "corpus").sources


@pytest.fixture(autouse=True)
def _hear_the_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="dsv3")
