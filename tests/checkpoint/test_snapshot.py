import errno
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

import dsv3.checkpoint.snapshot as snapshot_file
from dsv3.checkpoint.snapshot import latest_snapshot, read_snapshot, save_snapshot, verify_snapshot
from dsv3.config import SnapshotConfig
from dsv3.errors import SnapshotError

KEEP_2 = SnapshotConfig(keep_last=2)


def some_tensors(seed: int = 0) -> dict[str, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "model": {"a.weight": torch.randn(3, 5, generator=generator), "a.bias": torch.randn(7, generator=generator)},
        "first_moment": {"a.weight": torch.randn(3, 5, generator=generator).bfloat16()},
    }


def save(folder: Path, step: int, policy: SnapshotConfig = KEEP_2) -> Path:
    return save_snapshot(folder, step=step, tensors=some_tensors(step), state={"tokens": step * 10}, policy=policy)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_was_saved_comes_back_bit_for_bit(tmp_path: Path):
    path = save(tmp_path, 200)
    assert path == tmp_path / "step-000200" == latest_snapshot(tmp_path)
    tensors, state = read_snapshot(path)
    assert state == {"step": 200, "tokens": 2000}
    expected = some_tensors(200)
    assert tensors.keys() == expected.keys()
    for group, named in expected.items():
        assert tensors[group].keys() == named.keys()
        for name, tensor in named.items():
            assert tensors[group][name].dtype == tensor.dtype
            assert torch.equal(tensors[group][name], tensor)


def test_a_tensor_that_is_a_view_is_saved_as_what_it_shows(tmp_path: Path):
    whole = torch.arange(12.0).view(3, 4)
    path = save_snapshot(tmp_path, step=1, tensors={"model": {"a": whole.T}}, state={}, policy=KEEP_2)
    assert torch.equal(read_snapshot(path)[0]["model"]["a"], whole.T)


def test_nothing_is_pickled(tmp_path: Path):
    assert names(save(tmp_path, 1)) == ["first_moment.safetensors", "manifest.json", "model.safetensors", "state.json"]


def test_a_folder_without_snapshots_has_no_latest_one(tmp_path: Path):
    assert latest_snapshot(tmp_path) is None
    assert latest_snapshot(tmp_path / "absent") is None


def test_the_policy_keeps_the_last_ones_and_the_milestones(tmp_path: Path):
    for step in range(10, 80, 10):
        save(tmp_path, step, SnapshotConfig(keep_last=2, keep_every_steps=30))
    assert names(tmp_path) == ["step-000030", "step-000060", "step-000070"]


def test_steps_are_ordered_by_number_also_beyond_six_digits(tmp_path: Path):
    save(tmp_path, 999_999)
    assert save(tmp_path, 1_000_000) == latest_snapshot(tmp_path) == tmp_path / "step-1000000"


@pytest.mark.parametrize("file", ["model.safetensors", "first_moment.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["cut", "flip", "gone"])
def test_any_damage_is_noticed_and_the_snapshot_before_is_used(
    tmp_path: Path, file: str, damage: str, caplog: pytest.LogCaptureFixture
):
    save(tmp_path, 1)
    victim = save(tmp_path, 2) / file
    content = bytearray(victim.read_bytes())
    if damage == "cut":
        victim.write_bytes(content[:-9])
    elif damage == "flip":
        content[len(content) // 2] ^= 1
        victim.write_bytes(content)
    else:
        victim.unlink()
    with pytest.raises(SnapshotError, match="step-000002"):
        read_snapshot(tmp_path / "step-000002")
    assert latest_snapshot(tmp_path) == tmp_path / "step-000001"
    assert "step-000002" in caplog.text
    assert "going back" in caplog.text


def test_every_single_bit_of_the_smallest_file_is_guarded(tmp_path: Path):
    file = save(tmp_path, 1) / "state.json"
    good = file.read_bytes()
    for place in range(len(good)):
        for bit in range(8):
            bad = bytearray(good)
            bad[place] ^= 1 << bit
            file.write_bytes(bad)
            with pytest.raises(SnapshotError):
                verify_snapshot(file.parent)


def test_when_all_snapshots_are_damaged_the_run_is_not_started_over(tmp_path: Path):
    for step in (1, 2):
        (save(tmp_path, step) / "state.json").write_text("{}")
    with pytest.raises(SnapshotError, match=r"no snapshot .* can be used.*step-000002.*step-000001"):
        latest_snapshot(tmp_path)


def test_a_damaged_snapshot_is_never_what_retention_keeps(tmp_path: Path):
    keep_one = SnapshotConfig(keep_last=1)
    save(tmp_path, 20, keep_one)
    (tmp_path / "step-000020" / "state.json").write_text("{}")
    save(tmp_path, 10, keep_one)
    assert latest_snapshot(tmp_path) == tmp_path / "step-000010"
    save(tmp_path, 20, keep_one)
    assert latest_snapshot(tmp_path) == tmp_path / "step-000020"
    assert names(tmp_path) == ["step-000020"]


def test_leftovers_of_a_kill_are_cleaned_and_never_taken_for_snapshots(tmp_path: Path):
    (tmp_path / ".step-000005.partial").mkdir()
    (tmp_path / ".step-000005.partial" / "model.safetensors").write_bytes(b"half")
    assert latest_snapshot(tmp_path) is None
    save(tmp_path, 1)
    assert names(tmp_path) == ["step-000001"]


def test_a_snapshot_of_another_format_says_so(tmp_path: Path):
    path = save(tmp_path, 1)
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | {"format": 2}))
    with pytest.raises(SnapshotError, match="format 2; this version of dsv3 reads format 1"):
        read_snapshot(path)


def test_a_disk_too_small_is_refused_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    save(tmp_path, 1)
    usage = snapshot_file.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(snapshot_file.shutil, "disk_usage", lambda path: usage._replace(free=10))
    with pytest.raises(SnapshotError, match=r"disk is full.*step-000002.*last good one, step-000001, is untouched"):
        save(tmp_path, 2)
    assert names(tmp_path) == ["step-000001"]


@pytest.mark.parametrize("failing", ["fsync", "text"])
def test_a_disk_that_fills_while_writing_leaves_the_last_good_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
):
    save(tmp_path, 1)

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(snapshot_file, "force_to_disk" if failing == "fsync" else "_write_text", full)
    with pytest.raises(SnapshotError, match="disk is full"):
        save(tmp_path, 2)
    assert names(tmp_path) == ["step-000001"]
    assert latest_snapshot(tmp_path) == tmp_path / "step-000001"


def test_the_systems_own_refusal_to_write_a_tensor_file_is_understood(tmp_path: Path):
    # A limit on the size of files makes write() fail in the kernel, as a full disk does, inside safetensors.
    save(tmp_path, 1)
    large = {"model": {"a": torch.zeros(1 << 18)}}
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, before[1]))
        with pytest.raises(SnapshotError, match="disk is full"):
            save_snapshot(tmp_path, step=2, tensors=large, state={}, policy=KEEP_2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert names(tmp_path) == ["step-000001"]


def test_a_place_that_is_no_folder_is_named(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SnapshotError, match="could not be written"):
        save(tmp_path / "file" / "snapshots", 1)


SAVE_FOREVER = """
import sys, torch
from pathlib import Path
from dsv3.checkpoint.snapshot import save_snapshot
from dsv3.config import SnapshotConfig
torch.set_num_threads(1)
for step in range(1, 100_000):
    tensors = {"model": {"a": torch.full((1 << 18,), float(step))}}
    save_snapshot(Path(sys.argv[1]), step=step, tensors=tensors, state={}, policy=SnapshotConfig(keep_last=1))
    if step == 1:
        print("ready", flush=True)
"""


def test_a_kill_at_any_moment_leaves_a_good_snapshot(tmp_path: Path):
    for delay in (0.0, 0.003, 0.011, 0.027):
        folder = tmp_path / str(delay)
        child = subprocess.Popen([sys.executable, "-c", SAVE_FOREVER, str(folder)], stdout=subprocess.PIPE, text=True)
        assert child.stdout is not None
        with child.stdout:
            assert child.stdout.readline() == "ready\n"
        time.sleep(delay)
        child.send_signal(signal.SIGKILL)
        child.wait()
        newest = latest_snapshot(folder)
        assert newest is not None
        tensors, state = read_snapshot(newest)
        assert torch.equal(tensors["model"]["a"], torch.full((1 << 18,), float(state["step"])))
