"""datatrove's local executor, but for two things: a killed worker does not hang it, and it says how far it is.

A worker that is killed takes its task with it; datatrove waits for the task forever (a pool of `multiprocess` knows
nothing of it). Here the task is run again, and the preparation ends with an error when that does not help.
"""

import ctypes
import io
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, redirect_stderr
from copy import deepcopy

from datatrove.executor.local import LocalPipelineExecutor
from datatrove.utils.logging import logger

from dsv3.errors import DataError, Dsv3Error

ATTEMPTS = 3
"""Times that a stage goes on after killed workers without having finished another task."""

M_ARENA_MAX = -8
"""Of glibc's malloc.h."""
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS"), "1")
"""Of every worker, as many as there are cores; a stage of one task has all cores to itself."""

Told = Callable[[int, int], None]
"""Called with the tasks that are done, and how many there are."""


class Workers:
    """Processes that run tasks: started when the first is wanted, and kept from stage to stage.

    Each imports for one to two seconds, so that a new one for every stage would cost more than a small stage takes.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def submit(self, executor: "LocalExecutor", rank: int) -> "Future[str]":
        """Have a task run; its result is what is wrong with it."""
        if self._pool is None:
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(
                self.count, mp_context=context, initializer=_end_with, initargs=(os.getpid(),)
            )
        with _environment(ONE_THREAD):  # A process begins when there is a task for it, and keeps what it finds.
            return self._pool.submit(_run_task, executor, rank)

    def end(self) -> None:
        """End them all; tasks that wait are not run."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None


class LocalExecutor(LocalPipelineExecutor):  # type: ignore[misc]  # datatrove has no types
    """Runs the tasks of a stage in processes of this machine, or in this one where there is one worker."""

    def run(self) -> None:
        """Run what has not been done.

        Raises:
            DataError: a task failed, or its worker is killed again and again.
        """
        with Workers(self.workers) as workers:
            self.run_and_tell(_no_telling, workers=workers)

    def run_and_tell(self, told: Told, *, workers: Workers) -> None:
        """Run as `run`, and tell; `workers` stay for the next stage."""
        waiting = self.get_incomplete_ranks(range(self.tasks))
        told(self.tasks - len(waiting), self.tasks)
        if workers.count == 1 or len(waiting) == 1:
            for number, rank in enumerate(waiting, start=1):
                _checked(_run_task(self, rank))
                told(self.tasks - len(waiting) + number, self.tasks)
            return
        attempts = 0
        while waiting:
            if attempts == ATTEMPTS:
                raise DataError(
                    f"workers were killed {ATTEMPTS} times while tasks {_some(waiting)} ran ({self.logging_dir.path}), "
                    "as the system does when memory is short; use fewer --workers, and run the same command again"
                )
            before = len(waiting)
            waiting = self._run_in_pool(waiting, told=told, workers=workers)
            attempts = attempts + 1 if len(waiting) == before else 1

    def _run_in_pool(self, ranks: list[int], *, told: Told, workers: Workers) -> list[int]:
        """Run tasks in other processes, and return those that are left because a process was killed."""
        before = self.tasks - len(ranks)
        try:
            tasks = [workers.submit(self, rank) for rank in ranks]
            for done, task in enumerate(as_completed(tasks), start=before + 1):
                _checked(task.result())
                told(done, self.tasks)
        except BrokenProcessPool:
            workers.end()
        return self.get_incomplete_ranks(ranks)


def _no_telling(done: int, total: int) -> None:
    pass


def _checked(error: str) -> None:
    if error:
        raise DataError(error)


def _run_task(executor: LocalExecutor, rank: int) -> str:
    """Run one task, and return what is wrong; other errors are bugs, and come with their traceback."""
    _keep_one_arena()
    executor = deepcopy(executor)
    logger.remove()
    with redirect_stderr(io.StringIO()):  # What datatrove says stands in the log of each task.
        try:
            executor._run_for_rank(rank, local_rank=1)
        except Dsv3Error as error:
            return str(error)
        finally:
            logger.remove()
    return ""


def _keep_one_arena() -> None:
    """Have glibc take all memory from one place, where there is glibc.

    It gives each thread its own, and the threads that tokenise texts of 1 MiB leave holes in all of them: 330 MB in
    use became 200, at the same speed.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_ARENA_MAX, 1)


def _end_with(parent: int) -> None:
    """Begin a worker: it ends when its parent has, whatever that died of, so that no two write one file."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.2)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _some(ranks: list[int]) -> str:
    named = ", ".join(map(str, ranks[:5]))
    return f"{named} and {len(ranks) - 5} more" if len(ranks) > 5 else named


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """Set environment variables for the processes that are started while the block runs."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
