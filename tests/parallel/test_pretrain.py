"""Whole runs on many ranks, started by torchrun: the same losses, the same files, and a life after a kill."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

from dsv3.checkpoint.snapshot import read_snapshot
from dsv3.config import ParallelConfig, SnapshotConfig
from dsv3.config.files import write_config
from dsv3.errors import ConfigError
from dsv3.infer.loaded import load
from dsv3.parallel import launch as launch_file
from dsv3.train.loop import pretrain

TRAIN = """
import sys
from pathlib import Path
from dsv3.config.files import read_config
from dsv3.train.loop import pretrain

limit = int(sys.argv[3]) if len(sys.argv) > 3 else None
pretrain(read_config(Path(sys.argv[1])), folder=Path(sys.argv[2]), stop_after_steps=limit)
"""


@pytest.fixture
def torchrun(tmp_path):
    """Start a run on so many ranks."""
    started = []

    def start(config, *, folder, size, restarts=0, steps=None):
        write_config(config, path=tmp_path / "wanted.json")
        (tmp_path / "train.py").write_text(TRAIN)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}"]
        command += [f"--max-restarts={restarts}", "--monitor-interval=0.1"]
        command += [str(tmp_path / "train.py"), str(tmp_path / "wanted.json"), str(folder)]
        command += [] if steps is None else [str(steps)]
        log = (tmp_path / f"log-{len(started)}").open("w+")
        started.append((subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True), log))
        return started[-1]

    yield start
    for process, log in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        log.close()


def ended_well(started, *, seconds=180):
    process, log = started
    status = process.wait(seconds)
    log.seek(0)
    assert status == 0, log.read()[-40000:]


def records(folder, kind):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def losses(folder):
    return [record["loss"] for record in records(folder, "step")]


@pytest.fixture
def run_config(small_run):
    """Its batch of four rows, on one rank or on several; moments in FP32, so that nothing is rounded away."""
    return replace(small_run, optim=replace(small_run.optim, bf16_moments=False))


def in_fours(config, *, data):
    """Give every pipeline two micro-batches at least; DualPipe of two ranks takes no fewer than four."""
    rows = config.batch.start_sequences
    return replace(config, batch=replace(config.batch, micro_batch_sequences=max(1, rows // data // 4)))


@pytest.mark.parametrize(
    ("size", "parallel"),
    [
        pytest.param(2, {"expert": 2}, marks=pytest.mark.slow),
        pytest.param(2, {"zero": True}, marks=pytest.mark.slow),
        pytest.param(4, {"expert": 2}, marks=pytest.mark.slow),
        (4, {"pipeline": 2, "expert": 2, "zero": True, "schedule": "zb1p"}),
    ],
)
def test_a_run_on_many_ranks_is_the_run_on_one(run_config, tmp_path, torchrun, size, parallel):
    config = in_fours(run_config, data=size // parallel.get("pipeline", 1))
    pretrain(run_config, folder=tmp_path / "one")
    shared = ParallelConfig(**parallel, trace_steps=2)
    started = torchrun(replace(config, parallel=shared), folder=tmp_path / "many", size=size)
    ended_well(started)
    assert losses(tmp_path / "many") == pytest.approx(losses(tmp_path / "one"), abs=2e-6)
    one, many = (records(tmp_path / name, "validation")[-1]["bits_per_byte"] for name in ("one", "many"))
    assert many == pytest.approx(one, abs=1e-5)
    snapshots = [sorted(path.name for path in (tmp_path / name / "snapshots").iterdir()) for name in ("one", "many")]
    assert snapshots[0] == snapshots[1]
    (one, _), (many, _) = (read_snapshot(tmp_path / name / "snapshots" / snapshots[0][-1]) for name in ("one", "many"))
    assert one.keys() == many.keys()
    for group, named in one.items():
        assert named.keys() == many[group].keys()
        for name, tensor in named.items():
            assert (many[group][name] - tensor).abs().max() < 1e-4, name
    (trace,) = (tmp_path / "many" / "traces").iterdir()
    assert {event["pid"] for event in json.loads(trace.read_text())["traceEvents"]} == set(range(size))
    last = records(tmp_path / "many", "step")[-1]
    assert sum(last["rank_loss"]) == pytest.approx(last["loss"])
    assert len(last["rank_grad_norm"]) == size
    assert all(0 < spent < last["seconds"] * 1.5 for spent in last["rank_seconds"])
    assert not (tmp_path / "many" / "stacks").exists()
    answers = [load(tmp_path / name).generate("the sea", max_tokens=8, temperature=0.0) for name in ("one", "many")]
    assert answers[0] == answers[1]


def test_a_snapshot_does_not_know_how_many_ranks_there_were(run_config, tmp_path, torchrun):
    """Four steps on four ranks that share experts and optimizer, four on a pipeline of two, four on one rank."""
    pretrain(run_config, folder=tmp_path / "whole")
    folder = tmp_path / "run"
    shared = replace(run_config, parallel=ParallelConfig(expert=4, zero=True))
    ended_well(torchrun(shared, folder=folder, size=4, steps=4))
    piped = replace(in_fours(run_config, data=1), parallel=ParallelConfig(pipeline=2))
    ended_well(torchrun(piped, folder=folder, size=2, steps=4))
    pretrain(run_config, folder=folder)
    assert len(losses(folder)) == 12
    assert losses(folder) == pytest.approx(losses(tmp_path / "whole"), abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_a_rank_that_is_killed_costs_the_steps_since_the_last_snapshot_and_nothing_else(
    run_config, tmp_path, torchrun, seed
):
    layouts = (ParallelConfig(expert=2), ParallelConfig(pipeline=2, expert=2, zero=True, schedule="zb1p"))
    config = replace(
        in_fours(run_config, data=2),
        parallel=layouts[seed % 2],
        total_tokens=40 * 128,
        snapshot=SnapshotConfig(every_steps=5, in_background=seed % 4 > 1),
        evaluation=replace(run_config.evaluation, every_steps=1000),
    )
    kill_once(config, tmp_path=tmp_path, torchrun=torchrun, chance=random.Random(seed))


def kill_once(config, *, tmp_path, torchrun, chance):
    """Kill one of four ranks somewhere, and hold what comes of it to a run that nobody touched."""
    ended_well(torchrun(config, folder=tmp_path / "untouched", size=4))
    started = torchrun(config, folder=tmp_path / "killed", size=4, restarts=2)
    metrics = tmp_path / "killed" / "metrics.jsonl"
    wait_for = chance.randint(1, 30)
    deadline = time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count('"kind": "step"') >= wait_for):
        assert time.monotonic() < deadline
        assert started[0].poll() is None
        time.sleep(0.01)
    victims = subprocess.run(
        ["pgrep", "-f", f"train.py {tmp_path / 'wanted.json'} {tmp_path / 'killed'}"],
        capture_output=True,
        text=True,
        check=True,
    )
    ranks = [int(pid) for pid in victims.stdout.split() if int(pid) != started[0].pid]
    os.kill(chance.choice(ranks), signal.SIGKILL)
    ended_well(started)
    assert losses(tmp_path / "killed") == losses(tmp_path / "untouched")  # bit for bit: the same layout
    assert records(tmp_path / "killed", "resume") or wait_for < 10  # the first may not have been complete


def test_what_does_not_divide_is_refused_before_anything_is_made(run_config, tmp_path, torchrun):
    with pytest.raises(ConfigError, match="torchrun --nproc-per-node 2"):
        pretrain(replace(run_config, parallel=ParallelConfig(expert=2)), folder=tmp_path / "run")
    with pytest.raises(ConfigError, match="weaves what ranks wait for"):
        pretrain(replace(run_config, parallel=ParallelConfig(schedule="dualpipe_v")), folder=tmp_path / "run")
    process, log = torchrun(run_config, folder=tmp_path / "run", size=3)
    assert process.wait(60) != 0
    log.seek(0)
    assert "do not divide over 3 ranks that read different ones: batch.start_sequences = 4" in log.read()
    assert not (tmp_path / "run").exists()


def test_every_rank_takes_the_gpu_of_its_number_and_talks_over_both(monkeypatch):
    taken = []
    monkeypatch.setattr(launch_file, "choose_device", torch.device)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert launch_file._backend("cpu") == "gloo"
    for place in ("0", "1"):
        monkeypatch.setenv("LOCAL_RANK", place)
        assert launch_file._backend("cuda") == "cpu:gloo,cuda:nccl"
    assert taken == [0, 1]
    with pytest.raises(ConfigError, match=r"3 ranks on this machine and runtime.device = 'cuda:0'"):
        launch_file._backend("cuda:0")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ConfigError, match="3 ranks on this machine and 2 GPUs"):
        launch_file._backend("cuda")
