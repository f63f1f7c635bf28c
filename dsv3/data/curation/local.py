"""datatrove's local executor, but for two things: a killed worker does not hang it, and it says how far it is.

A worker that is killed takes its task with it; datatrove waits for the task forever (a pool of `multiprocess` knows
nothing of it). Here the task is run again, and the preparation ends with an error when that does not help.
"""

import io
import multiprocessing
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import redirect_stderr
from copy import deepcopy
from typing import Any

from datatrove.executor.local import LocalPipelineExecutor
from datatrove.utils.logging import logger

from dsv3.errors import DataError, Dsv3Error

ATTEMPTS = 3
"""Times that a stage goes on after killed workers without having finished another task."""

Told = Callable[[int, int], None]
"""Called with the tasks that are done, and how many there are."""


class LocalExecutor(LocalPipelineExecutor):  # type: ignore[misc]  # datatrove has no types
    """Runs the tasks of a stage in processes of this machine, or in this one where there is one worker."""

    def run(self) -> None:
        """Run what has not been done.

        Raises:
            DataError: a task failed, or its worker is killed again and again.
        """
        self.run_and_tell(_no_telling)

    def run_and_tell(self, told: Told) -> None:
        """Run as `run`, and tell."""
        waiting = self.get_incomplete_ranks(range(self.tasks))
        told(self.tasks - len(waiting), self.tasks)
        if self.workers == 1 or len(waiting) == 1:
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
            waiting = self._run_in_pool(waiting, told=told)
            attempts = attempts + 1 if len(waiting) == before else 1

    def _run_in_pool(self, ranks: list[int], *, told: Told) -> list[int]:
        """Run tasks in new processes, and return those that are left because a process was killed."""
        context = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(
            min(self.workers, len(ranks)), mp_context=context, initializer=_end_with, initargs=(os.getpid(),)
        )
        try:
            tasks = [pool.submit(_run_task, self, rank) for rank in ranks]
            for task in as_completed(tasks):
                _checked(task.result())
                told(self.tasks - len(self.get_incomplete_ranks(range(self.tasks))), self.tasks)
        except BrokenProcessPool:
            pass
        finally:
            pool.shutdown(cancel_futures=True)
        return self.get_incomplete_ranks(ranks)


def _no_telling(done: int, total: int) -> None:
    pass


def _checked(error: str) -> None:
    if error:
        raise DataError(error)


def _run_task(executor: LocalExecutor, rank: int) -> str:
    """Run one task, and return what is wrong; other errors are bugs, and come with their traceback."""
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


def thread_environment(workers: int) -> dict[str, Any]:
    """Return environment variables that keep every worker to one thread."""
    if workers == 1:
        return {}
    return dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS"), "1")
