"""Workers that are killed, and errors that reach the person."""

import importlib

import pytest

pytest.importorskip("datatrove", reason="needs the extra 'data'")

from datatrove.pipeline.base import PipelineStep

from dsv3.data.curation.local import LocalExecutor, Workers
from dsv3.errors import DataError

DYING = """
import os, signal
from pathlib import Path
from datatrove.pipeline.base import PipelineStep

class DieOnce(PipelineStep):
    name, type = "die", "test"

    def __init__(self, folder, *, always=False):
        super().__init__()
        self.folder, self.always = folder, always

    def run(self, data, rank=0, world_size=1):
        mark = Path(self.folder) / "died"
        if rank == 1 and (self.always or not mark.exists()):
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        (Path(self.folder) / f"done-{rank}").touch()
        yield from ()
"""


@pytest.fixture
def die_once(tmp_path, monkeypatch):
    """A step that kills its worker the first time that its second task runs; other processes must import it."""
    (tmp_path / "dying_step.py").write_text(DYING)
    monkeypatch.syspath_prepend(tmp_path)
    return importlib.import_module("dying_step").DieOnce


class Refuse(PipelineStep):
    name, type = "refuse", "test"

    def run(self, data, rank=0, world_size=1):
        raise DataError("no such thing; give another")
        yield


def test_the_task_of_a_killed_worker_is_run_again(tmp_path, die_once):
    told = []
    executor = LocalExecutor([die_once(str(tmp_path))], tasks=3, workers=2, logging_dir=str(tmp_path / "logs"))
    with Workers(2) as workers:
        executor.run_and_tell(lambda done, total: told.append((done, total)), workers=workers)
    assert sorted(file.name for file in tmp_path.glob("done-*")) == ["done-0", "done-1", "done-2"]
    assert told[0] == (0, 3)
    assert told[-1] == (3, 3)


@pytest.mark.slow
def test_a_task_that_kills_every_worker_ends_in_one_clear_line(tmp_path, die_once):
    executor = LocalExecutor(
        [die_once(str(tmp_path), always=True)], tasks=2, workers=2, logging_dir=str(tmp_path / "logs")
    )
    with pytest.raises(DataError, match="workers were killed 3 times while tasks 1 ran"):
        executor.run()


def test_a_mistake_of_the_person_is_no_traceback(tmp_path, capfd):
    executor = LocalExecutor([Refuse()], tasks=1, workers=1, logging_dir=str(tmp_path / "logs"))
    with pytest.raises(DataError, match=r"^no such thing; give another$"):
        executor.run()
    assert capfd.readouterr().err == ""
