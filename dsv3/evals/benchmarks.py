"""A suite put to a model: its tasks one after the other, with their results written after each."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dsv3.evals.answerer import Answerer
from dsv3.evals.question import EvalTask
from dsv3.evals.results import write_results
from dsv3.evals.running import ItemsFile, TaskRun, run_task
from dsv3.evals.suite import Suite
from dsv3.runtime.hold import hold_folder


def run_benchmarks(
    tasks: Sequence[EvalTask],
    *,
    suite: Suite,
    answerer_for: Callable[[EvalTask], Answerer],
    model: Mapping[str, Any],
    data: Path,
    folder: Path,
    limit: int | None = None,
    max_tokens: int | None = None,
    told: Callable[[TaskRun], None] | None = None,
) -> dict[str, Any]:
    """Ask a model the items of tasks that it has not answered yet, and return what is written to `results.json`.

    `model` is what the answers hang on: a folder holds those of one model. `told` hears of each task that is done.

    Raises:
        ConfigError: the folder holds the answers of another model.
        EngineError: the model broke down; what it has answered is kept, and the same call goes on.
    """
    with hold_folder(folder, lock="evaluation.lock", doing="evaluating", option="--output"):
        items = ItemsFile(folder, model=model)
        runs: list[TaskRun] = []
        for task in tasks:
            answerer = answerer_for(task)
            runs.append(run_task(task, answerer=answerer, data=data, items=items, limit=limit, max_tokens=max_tokens))
            results = write_results(
                runs, folder=folder, suite=suite, model=model, limits={"limit": limit, "max_tokens": max_tokens}
            )
            if told is not None:
                told(runs[-1])
    return results
