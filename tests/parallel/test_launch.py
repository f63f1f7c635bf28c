"""Ranks that torchrun has started find each other."""

import subprocess
import sys

AGAIN_AND_AGAIN = """
import os, time
from dsv3.config import ModelConfig, ParallelConfig
from dsv3.parallel.launch import open_ranks

for _ in range(3):
    time.sleep(0.7 * int(os.environ["RANK"]))  # the first is there long before the second
    with open_ranks(ParallelConfig(timeout_seconds=30), model=ModelConfig(), sequence_length=8) as ranks:
        os.write(1, f"{ranks.size} ".encode())  # at once, as print() does not
"""


def test_ranks_meet_as_often_as_a_program_asks_them_to(tmp_path):
    """As the phases of an extension do: the addresses of the last time are no good."""
    (tmp_path / "program.py").write_text(AGAIN_AND_AGAIN)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run([*command, str(tmp_path / "program.py")], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["2"] * 6
