"""The same stages on a cluster: datatrove's own executors for Slurm and Ray, chained stage after stage."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsv3.data.curation.pipeline import WORK, Stage, tidy
from dsv3.errors import ConfigError, DataError


@dataclass(frozen=True, kw_only=True)
class ClusterOptions:
    """Where and how tasks run."""

    workers: int = -1
    """Tasks at a time; -1 for as many as there is room for."""
    partition: str = ""
    """Of Slurm."""
    time: str = "20:00:00"
    """Slurm's limit for each task."""
    memory_gb: int = 4
    """Of each task."""
    activate: str = ""
    """Shell command that Slurm runs before a task, such as `source /shared/venv/bin/activate`."""


def submit_to_slurm(stages: list[Stage], *, output: Path, options: ClusterOptions) -> list[str]:
    """Submit all stages, each to begin when the one before is done, and return the numbers of the jobs.

    Stages that are done already are not submitted. Each has `work/logs/STAGE/launch_script.slurm`.

    Raises:
        ConfigError: this machine has no Slurm, or no partition is given.
    """
    if shutil.which("sbatch") is None:
        raise ConfigError("--executor slurm needs Slurm's sbatch, which this machine does not have; log in to one")
    if not options.partition:
        raise ConfigError("--executor slurm needs --partition NAME; `sinfo` lists them")
    from datatrove.executor.slurm import SlurmPipelineExecutor

    before = None
    jobs = []
    for stage in stages:
        executor = SlurmPipelineExecutor(
            stage.steps(),
            tasks=stage.tasks,
            workers=options.workers,
            time=options.time,
            partition=options.partition,
            mem_per_cpu_gb=options.memory_gb,
            job_name=f"dsv3-{stage.name}",
            qos="",
            env_command=options.activate,
            logging_dir=str(output / WORK / "logs" / stage.name),
            depends_job_id=before,
            max_array_size=1000,
            tasks_per_job=1,
        )
        executor.launch_job()
        if executor.job_id not in (None, -1):
            before = executor.job_id
            jobs.append(f"{stage.name}: {before}")
    return jobs


def run_on_ray(stages: list[Stage], *, output: Path, options: ClusterOptions) -> None:
    """Run all stages on the Ray cluster that this machine is part of, one after the other.

    Raises:
        ConfigError: Ray is not installed.
        DataError: a task failed; what comes after its stage has not been begun.
    """
    try:
        import ray  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            "--executor ray needs the package 'ray', which this machine does not have: pip install 'dsv3[ray]'"
        ) from error
    from datatrove.executor.ray import RayPipelineExecutor

    for stage in stages:
        logs = output / WORK / "logs" / stage.name
        executor: Any = RayPipelineExecutor(
            stage.steps(),
            tasks=stage.tasks,
            workers=options.workers,
            mem_per_cpu_gb=options.memory_gb,
            logging_dir=str(logs),
        )
        executor.run()
        # It returns all the same when tasks have failed.
        if failed := executor.get_incomplete_ranks():
            raise DataError(
                f"{len(failed)} of the {stage.tasks} tasks of stage '{stage.name}' failed on Ray, task {failed[0]} "
                f"among them; {logs}/logs says why, and the same command goes on from there"
            )
    tidy(output)
