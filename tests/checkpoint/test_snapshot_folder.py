import json
from pathlib import Path

import pytest
import torch

from dsv3.checkpoint.snapshot import read_snapshot, save_snapshot
from dsv3.checkpoint.snapshot_folder import latest_snapshot, verify_snapshot
from dsv3.config import SnapshotConfig
from dsv3.errors import SnapshotError


def save(folder: Path, step: int) -> Path:
    tensors = {"model": {"a": torch.full((3, 5), step / 3)}, "first_moment": {"a": torch.full((3, 5), step / 7)}}
    policy = SnapshotConfig(keep_last=2)
    return save_snapshot(folder, step=step, tensors=tensors, state={"tokens": step * 10}, policy=policy)


def test_a_folder_without_snapshots_has_no_latest_one(tmp_path: Path):
    assert latest_snapshot(tmp_path) is None
    assert latest_snapshot(tmp_path / "absent") is None


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


def test_a_snapshot_of_another_format_says_so(tmp_path: Path):
    path = save(tmp_path, 1)
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | {"format": 2}))
    with pytest.raises(SnapshotError, match="format 2; this version of dsv3 reads format 1"):
        read_snapshot(path)
