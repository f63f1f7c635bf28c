"""Runs that an experiment trains: to their end, or not at all."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from dsv3.config import PretrainConfig
from dsv3.config.files import write_config
from dsv3.errors import TrainingError
from dsv3.runtime.cores import available_cores
from dsv3.train.loop import pretrain
from dsv3.train.stop import stop_on_signals

LOOK_SECONDS = 0.2


def train_to_the_end(config: PretrainConfig, *, folder: Path, ranks: int = 1) -> None:
    """Train a run in `folder`, or go on with it; called once more after its end it does nothing.

    Where there is a core for each of `ranks` they share the work, one thread each, as under torchrun; otherwise this
    process does it all. Every step's rows must divide by the ranks.

    Raises:
        KeyboardInterrupt: a signal has stopped it, after a snapshot.
        TrainingError: ranks ended with an error, and have said which.
        Dsv3Error: what `pretrain` raises, without ranks.
    """
    if ranks == 1 or available_cores() < ranks:
        if pretrain(config, folder=folder).interrupted:
            raise KeyboardInterrupt
        return
    with TemporaryDirectory() as scratch:
        settings = Path(scratch) / "config.json"
        write_config(replace(config, runtime=replace(config.runtime, threads=1)), path=settings)
        _run_ranks(["pretrain", "--config", str(settings), "--run", str(folder)], ranks=ranks, where=folder)


def _run_ranks(arguments: list[str], *, ranks: int, where: Path) -> None:
    """Run the command line on ranks of this machine; the first signal stops it as it stops one process."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command = [*launcher, "--no-python", "--", sys.executable, "-m", "dsv3.cli.main", *arguments]
    told = False
    with stop_on_signals() as stop:
        # A session of its own: Ctrl-C reaches the ranks once, through here.
        process = subprocess.Popen(command, start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        try:
            while process.poll() is None:
                time.sleep(LOOK_SECONDS)
                if stop.requested and not told:
                    process.terminate()
                    told = True
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    if stop.requested:
        raise KeyboardInterrupt
    if process.returncode:
        raise TrainingError(f"{ranks} ranks that trained in {where} ended with an error, which stands above")
