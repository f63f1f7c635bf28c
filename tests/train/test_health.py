"""What goes wrong in a run is found."""

import random
import subprocess
import sys

from hypothesis import given
from hypothesis import strategies as st

from dsv3.config import HealthConfig
from dsv3.train.health import LEAST, PATIENCE, SpikeFinder, StragglerFinder


@given(st.integers(0, 1000))
def test_an_ordinary_curve_has_no_spike_and_a_jump_is_one(seed):
    chance, finder = random.Random(seed), SpikeFinder(HealthConfig())
    losses = [10 * (step + 1) ** -0.2 + chance.gauss(0, 0.05) for step in range(300)]
    assert [finder.add(loss) for loss in losses] == [None] * 300
    expected = finder.add(losses[-1] + 2)
    assert expected is not None
    assert abs(expected - sum(losses[-100:]) / 100) < 1e-9
    assert finder.add(losses[-1] + 2) is not None  # and again: it was not taken for ordinary
    assert finder.add(losses[-1]) is None


def test_no_spike_is_seen_before_there_is_something_to_hold_it_against():
    finder = SpikeFinder(HealthConfig())
    assert [finder.add(1.0) for _ in range(LEAST - 1)] + [finder.add(1e9)] == [None] * LEAST
    off = SpikeFinder(HealthConfig(spike_deviations=0.0))
    assert [off.add(loss) for loss in [1.0] * 50 + [1e9]] == [None] * 51


def test_a_rank_is_named_once_when_it_has_been_slow_for_long_enough():
    finder = StragglerFinder(HealthConfig())
    told = [finder.add([1.0, 1.0, 1.6, 1.1]) for _ in range(PATIENCE + 3)]
    assert told == [[]] * (PATIENCE - 1) + [[2]] + [[]] * 3
    assert finder.add([1.0, 1.0, 1.4, 1.1]) == []
    assert [finder.add([1.0, 1.0, 1.6, 1.1]) for _ in range(PATIENCE)][-1] == [2]
    assert StragglerFinder(HealthConfig()).add([1.0]) == []
    off = StragglerFinder(HealthConfig(straggler_factor=0.0))
    assert [off.add([1.0, 9.0, 1.0]) for _ in range(9)] == [[]] * 9


HANG = """
import sys, time
from pathlib import Path
from dsv3.config import HealthConfig
from dsv3.parallel.ranks import Alone
from dsv3.train.health import HangWatch

ranks = Alone()
ranks.rank, ranks.size = 3, 4
watch = HangWatch(HealthConfig(hang_seconds=0.3), folder=Path(sys.argv[1]), ranks=ranks)
watch.wind_up()

def stuck_in_something(seconds):
    time.sleep(seconds)

stuck_in_something(float(sys.argv[2]))
watch.close()
"""


def test_a_rank_that_hangs_writes_down_where(tmp_path):
    subprocess.run([sys.executable, "-c", HANG, str(tmp_path), "1.5"], check=True, timeout=120)
    assert "stuck_in_something" in (tmp_path / "stacks" / "rank-3.txt").read_text()
    subprocess.run([sys.executable, "-c", HANG, str(tmp_path), "0.0"], check=True, timeout=120)
    assert not (tmp_path / "stacks" / "rank-3.txt").exists()
