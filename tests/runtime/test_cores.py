import os

from dsv3.runtime.cores import available_cores


def test_only_the_cores_that_this_process_may_run_on_are_counted(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {4, 6}, raising=False)
    assert available_cores() == 2


def test_a_system_that_does_not_say_so_counts_all_its_cores(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 12)
    assert available_cores() == 12
