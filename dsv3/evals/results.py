"""From outcomes to scores: means with their standard errors, and what two models differ by.

Errors are those of a sample of all the items that might have been asked. Items of a group (a subject, a language) are
not independent, so that their deviations are summed before they are squared; without groups, the error of a share is
the binomial one. Two models are compared item by item, as what is hard for one is hard for the other (2411.00640).
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dsv3 import __version__
from dsv3.config.files import read_json
from dsv3.errors import DataError
from dsv3.evals.question import EvalTask
from dsv3.evals.running import Outcome, TaskRun, read_outcomes
from dsv3.evals.suite import Row, Suite
from dsv3.runtime.atomic import write_json

RESULTS = "results.json"
FEWER_IS_BETTER = ("BPB",)
SURE = 1.96
"""Standard errors that a difference is beyond in 1 of 20 samples where there is none."""

Ratio = tuple[str, str]
"""The scores above and below the line, of a score that is a sum over a sum."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A score over items."""

    value: float
    standard_error: float
    count: int
    num_groups: int
    """Whose items were taken together for the error; 0 where each stands for itself."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """What one model scores more than another on the same items of a task."""

    task: str
    metric: str
    first: float
    second: float
    difference: float
    """Of the first from the second."""
    standard_error: float
    count: int
    """Items that both have answered."""
    first_better: int
    second_better: int
    unpaired: int
    """Items that one of them alone has answered, or was asked in another form; left out."""

    @property
    def is_seen(self) -> bool:
        """Whether it is more than chance makes of equal models in 19 of 20 samples."""
        return abs(self.difference) > SURE * self.standard_error


def estimate(outcomes: Sequence[Outcome], *, name: str, ratio: Ratio | None = None) -> Estimate:
    """Return the mean of a score over outcomes, or the sum of one over the sum of another."""
    value, deviations = _deviations(outcomes, name=name, ratio=ratio)
    groups = [outcome.group for outcome in outcomes]
    error, num_groups = _error(deviations, groups=groups)
    return Estimate(value=value, standard_error=error, count=len(outcomes), num_groups=num_groups)


def _deviations(outcomes: Sequence[Outcome], *, name: str, ratio: Ratio | None) -> tuple[float, list[float]]:
    """Return a score and how much each item moves it, times the number of items (of a ratio, to the first order)."""
    if ratio is None:
        scores = [outcome.scores[name] for outcome in outcomes]
        mean = math.fsum(scores) / len(scores)
        return mean, [score - mean for score in scores]
    above = [outcome.scores[ratio[0]] for outcome in outcomes]
    below = [outcome.scores[ratio[1]] for outcome in outcomes]
    value, mean_below = math.fsum(above) / math.fsum(below), math.fsum(below) / len(below)
    return value, [(one - value * other) / mean_below for one, other in zip(above, below, strict=True)]


def _error(deviations: Sequence[float], *, groups: Sequence[str]) -> tuple[float, int]:
    """Return the standard error, and the number of groups it was taken over."""
    sums: dict[str, float] = defaultdict(float)
    for deviation, group in zip(deviations, groups, strict=True):
        sums[group] += deviation
    clustered = len(sums) > 1
    parts = list(sums.values()) if clustered else deviations
    return math.sqrt(math.fsum(part * part for part in parts)) / len(deviations), len(sums) if clustered else 0


def ratios_of(task: EvalTask) -> Mapping[str, Ratio]:
    """Return the scores of a task that are a sum over a sum."""
    if task.protocol == "rolling":
        return {task.metric: ("bits", "bytes")}
    return task.ratios


def task_result(run: TaskRun) -> dict[str, Any]:
    """Return the scores of a task, for a file; shares of 1."""
    task, ratios = run.task, ratios_of(run.task)
    parts = {part for ratio in ratios.values() for part in ratio}
    names = [name for name in (run.outcomes[0].scores if run.outcomes else ()) if name not in parts]
    scores = {
        name: asdict(estimate(run.outcomes, name=name, ratio=ratios.get(name)))
        for name in dict.fromkeys([*names, *ratios])
        if run.outcomes
    }
    metric = task.metric if task.metric in scores or not scores else next(iter(scores))
    by_group: dict[str, list[Outcome]] = defaultdict(list)
    for outcome in run.outcomes:
        by_group[outcome.group].append(outcome)
    return {
        "task": task.name,
        "metric": metric,
        "shots": task.shots,
        "protocol": task.protocol,
        "normalise": task.normalise,
        "score": scores[metric]["value"] if scores else None,
        "standard_error": scores[metric]["standard_error"] if scores else None,
        "count": len(run.outcomes),
        "scores": scores,
        "ratio": list(ratios[metric]) if metric in ratios else None,
        "groups": {
            group: {"score": estimate(members, name=metric, ratio=ratios.get(metric)).value, "count": len(members)}
            for group, members in sorted(by_group.items())
        }
        if task.group_by
        else {},
        "num_cut": sum(outcome.num_cut > 0 for outcome in run.outcomes),
        "troubles": [asdict(trouble) for trouble in run.troubles],
        "first_prompt": run.first_prompt,
        "note": task.note,
    }


def write_results(
    runs: Sequence[TaskRun], *, folder: Path, suite: Suite, model: Mapping[str, Any], limits: Mapping[str, int | None]
) -> dict[str, Any]:
    """Write `results.json` and return what is in it: the tasks, and the suite's rows with what was published."""
    tasks = [task_result(run) for run in runs]
    values = {
        "dsv3": __version__,
        "model": dict(model),
        "suite": suite.name,
        **limits,
        "columns": list(suite.columns),
        "tasks": tasks,
        "rows": [_row(row, suite=suite, tasks=tasks) for row in suite.rows],
    }
    write_json(values, path=folder / RESULTS)
    return values


def _row(row: Row, *, suite: Suite, tasks: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    found = next((task for task in tasks if task["task"] == row.task), None)
    return {
        "benchmark": row.benchmark,
        "metric": row.metric,
        "shots": row.shots,
        "protocol": row.protocol,
        "published": dict(suite.scores(row)),
        "task": row.task,
        "lm_eval": row.lm_eval,
        "needs": row.needs,
        "score": None if found is None else found["score"],
        "standard_error": None if found is None else found["standard_error"],
        "count": 0 if found is None else found["count"],
    }


def read_results(folder: Path) -> dict[str, Any]:
    """Return what `write_results` has written.

    Raises:
        DataError: there is nothing.
    """
    if not (folder / RESULTS).is_file():
        raise DataError(f"there is no {folder / RESULTS}; `dsv3 eval run --output {folder}` writes it")
    return read_json(folder / RESULTS)


def compare(first: Path, second: Path) -> list[Difference]:
    """Compare two folders of results by the items that they share.

    Raises:
        DataError: they share none.
    """
    tasks = [{task["task"]: task for task in read_results(folder)["tasks"]} for folder in (first, second)]
    ours, theirs = (_by_task(folder) for folder in (first, second))
    found = []
    for name in tasks[0]:
        if name in tasks[1] and (ours[name].keys() & theirs[name].keys()):
            found.append(_difference(tasks[0][name], first=ours[name], second=theirs[name]))
    if not found:
        raise DataError(f"{first} and {second} share no item; run the same tasks, with the same data, for both")
    return found


Key = tuple[str, str]


def _by_task(folder: Path) -> dict[str, dict[Key, Outcome]]:
    found: dict[str, dict[Key, Outcome]] = defaultdict(dict)
    for outcome in read_outcomes(folder)[1]:
        found[outcome.task][outcome.id, outcome.prompt_hash] = outcome
    return found


def _difference(task: Mapping[str, Any], *, first: Mapping[Key, Outcome], second: Mapping[Key, Outcome]) -> Difference:
    metric, ratio = task["metric"], tuple(task["ratio"]) if task["ratio"] else None
    keys = [key for key in first if key in second]
    pairs = [(first[key], second[key]) for key in keys]
    one, moved = _deviations([pair[0] for pair in pairs], name=metric, ratio=ratio)
    other, moved_other = _deviations([pair[1] for pair in pairs], name=metric, ratio=ratio)
    error, _ = _error(
        [a - b for a, b in zip(moved, moved_other, strict=True)], groups=[pair[0].group for pair in pairs]
    )
    sign = -1 if metric in FEWER_IS_BETTER else 1
    gains = [sign * (_value(a, metric, ratio) - _value(b, metric, ratio)) for a, b in pairs]
    return Difference(
        task=task["task"],
        metric=metric,
        first=one,
        second=other,
        difference=one - other,
        standard_error=error,
        count=len(pairs),
        first_better=sum(gain > 0 for gain in gains),
        second_better=sum(gain < 0 for gain in gains),
        unpaired=len(first) + len(second) - 2 * len(pairs),
    )


def _value(outcome: Outcome, metric: str, ratio: Ratio | None) -> float:
    if ratio is None:
        return outcome.scores[metric]
    return outcome.scores[ratio[0]] / (outcome.scores[ratio[1]] or 1.0)


def shown(value: float | None, *, metric: str, error: float | None = None) -> str:
    """Write a score as the report does: per cent, but for bits per byte."""
    if value is None:
        return "-"
    if metric in FEWER_IS_BETTER:
        return f"{value:.3f}" + (f" ± {error:.3f}" if error is not None else "")
    return f"{100 * value:.1f}" + (f" ± {100 * error:.1f}" if error is not None else "")


def table_beside_published(results: Mapping[str, Any]) -> list[list[str]]:
    """Return a row for each that was measured, with a header: ours, its items, and the published columns."""
    table = [["benchmark", "metric", "shots", "here", "items", *results["columns"]]]
    in_rows = set()
    for row in results["rows"]:
        if row["score"] is None:
            continue
        in_rows.add(row["task"])
        published = ["-" if value is None else f"{value:g}" for value in row["published"].values()]
        table.append([*_ours(row, name=row["benchmark"]), *published])
    for task in results["tasks"]:
        if task["task"] not in in_rows and task["score"] is not None:
            table.append([*_ours(task, name=task["task"]), *("-" for _ in results["columns"])])
    return table


def _ours(row: Mapping[str, Any], *, name: str) -> list[str]:
    here = shown(row["score"], metric=row["metric"], error=row["standard_error"])
    return [name, row["metric"], "-" if row["shots"] is None else str(row["shots"]), here, f"{row['count']:,}"]


def what_is_missing(results: Mapping[str, Any]) -> list[str]:
    """Return a sentence for each row of the suite that has no score, and for what went wrong in the others."""
    asked = {task["task"] for task in results["tasks"]}
    missing = []
    for row in results["rows"]:
        if row["score"] is None and row["task"] not in asked:
            lacks = f"needs {row['needs']}" if row["needs"] else f"not asked; --tasks {row['task']}"
            elsewhere = f"; lm-eval has {row['lm_eval']}" if row["needs"] and row["lm_eval"] else ""
            missing.append(f"{row['benchmark']}: {lacks}{elsewhere}")
    for task in results["tasks"]:
        troubles = task["troubles"]
        missing += [f"{task['task']}: {trouble['reason']}" for trouble in troubles if not trouble["item"]]
        of_items = [trouble for trouble in troubles if trouble["item"]]
        missing += [f"{task['task']}, item {trouble['item']}: {trouble['reason']}" for trouble in of_items[:3]]
        if len(of_items) > 3:
            missing.append(f"{task['task']}: {len(of_items) - 3} more items were not scored (results.json)")
        if task["num_cut"]:
            missing.append(f"{task['task']}: {task['num_cut']} prompts were too long, and lost their beginning")
    return missing
