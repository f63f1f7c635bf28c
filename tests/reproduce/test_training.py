"""Runs of experiments: alone, on ranks, and stopped on the way."""

import json
import os
import signal
import threading
from dataclasses import replace

import pytest

from dsv3.config import BatchConfig, DataConfig, EvaluationConfig, ParallelConfig, SourceConfig
from dsv3.errors import TrainingError
from dsv3.recipes import tiny
from dsv3.reproduce import training
from dsv3.reproduce.training import train_to_the_end

STEPS, ROWS, LENGTH = 60, 4, 32


@pytest.fixture
def config(tmp_path):
    text = tmp_path / "text"
    text.mkdir()
    for number in range(40):
        (text / f"{number}.txt").write_text(f"The river {number} lies by the stone of {number * 7}. " * 60)
    start = tiny()
    return replace(
        start,
        recipe="",
        total_tokens=STEPS * ROWS * LENGTH,
        model=replace(start.model, vocab_size=320, num_nextn_predict_layers=0),
        data=DataConfig(sources=(SourceConfig(path=str(text)),), held_out_rate=0.0, fim_rate=0.0),
        batch=BatchConfig(sequence_length=LENGTH, micro_batch_sequences=ROWS // 2).steady(ROWS),
        evaluation=EvaluationConfig(every_steps=1000),
    )


def steps_of(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == "step"]


def test_a_run_that_a_signal_stopped_stops_all(monkeypatch, tmp_path, config):
    monkeypatch.setattr(training, "pretrain", lambda config, folder: type("R", (), {"interrupted": True}))
    with pytest.raises(KeyboardInterrupt):
        train_to_the_end(config, folder=tmp_path / "run")


def test_without_a_core_for_each_rank_one_process_does_it(monkeypatch, tmp_path, config):
    monkeypatch.setattr(training, "available_cores", lambda: 1)
    monkeypatch.setattr(training, "_run_ranks", None)
    train_to_the_end(replace(config, total_tokens=2 * ROWS * LENGTH), folder=tmp_path / "run", ranks=2)
    assert len(steps_of(tmp_path / "run")) == 2


def test_ranks_that_are_stopped_go_on_from_there_to_the_end(monkeypatch, tmp_path, config):
    monkeypatch.setattr(training, "available_cores", lambda: 2)
    folder = tmp_path / "run"

    is_over = threading.Event()

    def stop():
        while not is_over.wait(0.05):
            if (folder / "metrics.jsonl").exists() and steps_of(folder):
                os.kill(os.getpid(), signal.SIGTERM)
                break

    stopper = threading.Thread(target=stop)
    stopper.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            train_to_the_end(config, folder=folder, ranks=2)
    finally:
        is_over.set()
        stopper.join()
    stopped = steps_of(folder)
    assert 0 < len(stopped) < STEPS
    train_to_the_end(config, folder=folder, ranks=2)
    steps = steps_of(folder)
    assert [record["step"] for record in steps] == list(range(1, STEPS + 1))
    assert {len(record["rank_loss"]) for record in steps} == {2}
    assert steps[: len(stopped)] == stopped


def test_ranks_that_fail_say_so(monkeypatch, tmp_path, config, capfd):
    monkeypatch.setattr(training, "available_cores", lambda: 2)
    with pytest.raises(TrainingError, match="2 ranks"):
        train_to_the_end(replace(config, parallel=ParallelConfig(pipeline=3)), folder=tmp_path / "run", ranks=2)
    assert "parallel.pipeline" in capfd.readouterr().err
