import errno
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import dsv3.checkpoint.snapshot as snapshot_file
from dsv3.checkpoint.snapshot import OpenSnapshot, Saving, piece_name, read_snapshot, save_snapshot
from dsv3.checkpoint.snapshot_folder import latest_snapshot
from dsv3.config import SnapshotConfig
from dsv3.errors import SnapshotError
from dsv3.parallel.ranks import Alone

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


def test_the_policy_keeps_the_last_ones_and_the_milestones(tmp_path: Path):
    for step in range(10, 80, 10):
        save(tmp_path, step, SnapshotConfig(keep_last=2, keep_every_steps=30))
    assert names(tmp_path) == ["step-000030", "step-000060", "step-000070"]


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


class Crew(Alone):
    """Ranks in threads of one process, who meet to gather."""

    def __init__(self, rank, *, size, board):
        super().__init__()
        self.rank, self.size, self._board = rank, size, board

    def gather(self, value):
        barrier, values = self._board
        values[self.rank] = value
        barrier.wait(20)
        found = list(values)
        barrier.wait(20)
        return found

    def total(self, values):
        return [sum(one) for one in zip(*self.gather(list(values)), strict=True)]


def on_crew(do, *, size):
    """Call a function once for each rank, all at a time; return what each has returned or raised."""
    board, found = (threading.Barrier(size), [None] * size), [None] * size

    def one(rank):
        try:
            found[rank] = do(Crew(rank, size=size, board=board))
        except Exception as error:
            found[rank] = error

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return found


@given(st.integers(1, 5), st.integers(1, 11), st.booleans(), st.data())
def test_pieces_of_many_ranks_are_read_as_whole_tensors_or_as_any_rows(tmp_path_factory, size, rows, late, data):
    folder = tmp_path_factory.mktemp("pieces")
    whole, plain = torch.arange(rows * 3.0).view(rows, 3), torch.ones(2, dtype=torch.bfloat16)
    cuts = [rows * rank // size for rank in range(size + 1)]

    def save(ranks):
        first, end = cuts[ranks.rank : ranks.rank + 2]
        named = {piece_name("w", first=first, end=end): whole[first:end]} if end > first else {}
        tensors = {"model": named | ({"plain": plain} if ranks.rank == 0 else {})}
        saving = Saving(
            folder, step=7, tensors=tensors, state={"tokens": 70}, policy=KEEP_2, ranks=ranks, in_background=late
        )
        named.clear()
        return saving.finish()

    assert on_crew(save, size=size) == [folder / "step-000007"] * size
    tensors, state = read_snapshot(folder / "step-000007")
    assert state == {"step": 7, "tokens": 70}
    assert torch.equal(tensors["model"]["w"], whole)
    assert torch.equal(tensors["model"]["plain"], plain)
    first = data.draw(st.integers(0, rows))
    count = data.draw(st.integers(0, rows - first))
    found = OpenSnapshot(folder / "step-000007").read("model", "w", first=first, count=count)
    assert torch.equal(found, whole[first : first + count])


def test_what_fails_on_one_rank_fails_on_all_and_leaves_the_last_good_one(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def fail(tensors, path):
        if path.name.endswith("-00001.safetensors"):
            raise OSError(errno.ENOSPC, "No space left on device")
        original(tensors, path)

    original = safetensors.torch.save_file
    monkeypatch.setattr(safetensors.torch, "save_file", fail)
    found = on_crew(
        lambda ranks: save_snapshot(
            tmp_path, step=2, tensors={"model": {f"w{ranks.rank}": torch.ones(2)}}, state={}, policy=KEEP_2, ranks=ranks
        ),
        size=3,
    )
    assert [type(one) for one in found] == [SnapshotError] * 3
    assert len({str(one) for one in found}) == 1
    assert "the last good one, step-000001, is untouched" in str(found[0])
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]


def test_what_is_changed_while_it_is_written_is_written_as_it_was(tmp_path):
    weights = torch.ones(1000)
    saving = Saving(
        tmp_path, step=1, tensors={"model": {"w": weights}}, state={}, policy=KEEP_2, ranks=Alone(), in_background=True
    )
    weights.zero_()
    tensors, _ = read_snapshot(saving.finish())
    assert torch.equal(tensors["model"]["w"], torch.ones(1000))


def test_rows_that_no_rank_has_written_are_missed(tmp_path):
    pieces = {piece_name("w", first=0, end=2): torch.ones(2), piece_name("w", first=3, end=4): torch.ones(1)}
    path = save_snapshot(tmp_path, step=1, tensors={"model": pieces}, state={}, policy=KEEP_2)
    with pytest.raises(SnapshotError, match="rows of w are missing from model"):
        read_snapshot(path)
