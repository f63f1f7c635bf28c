import errno
import json
import os
import signal

import pytest

from dsv3.cli.progress import Progress, StageState
from dsv3.cli.stages import Stage, run_stages
from dsv3.errors import ConfigError, TrainingError


class Course:
    """Three stages that leave a file each and write down that they ran; `fail` makes one of them fail."""

    def __init__(self, folder):
        self.folder = folder
        self.ran = []
        self.fail = {}
        self.states = []

    def go(self, settings=None, may_change=lambda name, done: False):
        stages = [
            Stage(name=name, title=name.title(), run=self.work(name), is_done=(self.folder / name).exists)
            for name in ("one", "two", "three")
        ]
        progress = Progress(title="", stages=[StageState(name=stage.name, title=stage.title) for stage in stages])
        self.states = progress.stages
        run_stages(stages, folder=self.folder, settings=settings or {"a": 1}, may_change=may_change, progress=progress)

    def work(self, name):
        def run():
            self.ran.append(name)
            if name in self.fail:
                raise self.fail.pop(name)
            (self.folder / name).write_text("made")
            return f"{name} made"

        return run


@pytest.fixture
def course(tmp_path):
    return Course(tmp_path / "run")


def test_stages_run_in_order_and_only_once(course):
    course.go()
    course.go()
    assert course.ran == ["one", "two", "three"]
    assert [(stage.state, stage.note) for stage in course.states] == [
        ("skipped", "one made"),
        ("skipped", "two made"),
        ("skipped", "three made"),
    ]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("broken")])
def test_after_an_interruption_the_stopped_stage_runs_again_and_those_before_it_do_not(course, error):
    course.fail["two"] = error
    with pytest.raises(type(error)):
        course.go()
    assert [stage.state for stage in course.states] == ["done", "stopped", "waiting"]
    course.go()
    assert course.ran == ["one", "two", "two", "three"]


def test_a_removed_result_is_made_again_with_all_that_follows_from_it(course):
    course.go()
    (course.folder / "two").unlink()
    course.ran.clear()
    course.go()
    assert course.ran == ["two", "three"]


def test_when_the_making_again_is_stopped_what_follows_is_not_taken_for_done(course):
    course.go()
    (course.folder / "one").unlink()
    course.fail["one"] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        course.go()
    (course.folder / "one").write_text("half")
    course.ran.clear()
    course.go()
    assert course.ran == ["one", "two", "three"]


def test_changed_settings_are_refused_by_name_before_anything_is_touched(course):
    course.go(settings={"a": 1, "b": "x"})
    before = (course.folder / "stages.json").read_text()
    with pytest.raises(ConfigError, match=r'a was 1 and is now 2; b was "x" and is now null.*--run FOLDER'):
        course.go(settings={"a": 2})
    assert (course.folder / "stages.json").read_text() == before
    assert course.ran == ["one", "two", "three"]


def test_settings_may_change_while_nothing_is_done_and_where_allowed(course):
    course.fail["one"] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        course.go(settings={"a": 1})
    course.go(settings={"a": 2})
    course.go(settings={"a": 3}, may_change=lambda name, done: name == "a" and done == {"one", "two", "three"})
    assert json.loads((course.folder / "stages.json").read_text())["settings"] == {"a": 2}


def test_a_full_disk_says_how_to_go_on(course):
    course.fail["two"] = OSError(errno.ENOSPC, "No space left on device", "report.html")
    with pytest.raises(TrainingError, match=r"'two' stopped: No space left on device \(report\.html\).*same command"):
        course.go()
    course.go()
    assert course.ran == ["one", "two", "two", "three"]


def test_sigterm_stops_like_ctrl_c_and_its_handler_is_put_back(course):
    before = signal.getsignal(signal.SIGTERM)
    course.work = lambda name: lambda: os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        course.go()
    assert signal.getsignal(signal.SIGTERM) is before


def test_two_commands_in_one_folder_are_refused(course):
    inner = Course(course.folder)
    course.work = lambda name: inner.go
    with pytest.raises(TrainingError, match="another process is at work"):
        course.go()


def test_a_folder_that_cannot_be_made_is_refused_with_a_way_out(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainingError, match=r"cannot write to the run folder .*file.*--run FOLDER"):
        Course(tmp_path / "file" / "run").go()


def test_a_damaged_record_is_refused_by_name(course):
    course.go()
    (course.folder / "stages.json").write_text("{")
    with pytest.raises(ConfigError, match=r"stages\.json is damaged"):
        course.go()
