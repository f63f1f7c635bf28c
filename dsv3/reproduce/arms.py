"""The same training under several settings and seeds: the runs that ablations compare.

Every run is a run folder of its own below the experiment's, so that one which was stopped goes on where it was, and
`dsv3 report` shows it. All settings of a seed read the same rows of the same corpus.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from dsv3.config import PretrainConfig
from dsv3.config.override import apply_overrides
from dsv3.data.prepare import prepare_corpus
from dsv3.recipes import tiny
from dsv3.recipes.milestones import learning_rate, milestones
from dsv3.reproduce.experiment import Ask
from dsv3.reproduce.training import train_to_the_end
from dsv3.runtime.hold import hold_folder
from dsv3.train.run_folder import lend_corpus

SMALL = (
    "model.vocab_size=2048",
    "batch.start_sequences=8",
    "batch.final_sequences=8",
    "batch.ramp_tokens=0",
    "batch.micro_batch_sequences=8",
    "optim.ema_decay=0.0",
    "snapshot.every_steps=100",
    "evaluation.every_steps=1000000",
    "evaluation.max_tokens=60000",
    "evaluation.sample_prompts=[]",
    "runtime.threads=1",
)
"""What all these runs have otherwise than `tiny`: half its vocabulary, which saves a third of the time, and a batch
that does not grow. Validation is at the end."""
PEAK_RATE, WARMUP_STEPS = 3e-3, 50


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One of the settings that are compared."""

    name: str
    label: str
    """For pictures and tables."""
    settings: Mapping[str, str]
    """Beyond those that all share, by dotted name."""


@dataclass(frozen=True, kw_only=True)
class TrainedRun:
    """What one run has written down."""

    folder: Path
    steps: tuple[dict[str, Any], ...]
    validation: dict[str, Any]
    """Of the end."""

    @property
    def losses(self) -> list[float]:
        """Next-token loss in nats, step by step."""
        return [step["loss"] for step in self.steps]

    @property
    def loss(self) -> float:
        """Next-token loss of held-out text, in nats."""
        return float(self.validation["loss"])

    @property
    def bits_per_byte(self) -> float:
        """Of held-out text."""
        return float(self.validation["bits_per_byte"])

    @property
    def max_violation(self) -> float:
        """MaxVio over the held-out text, the mean of the MoE layers."""
        return fmean(self.validation["max_violation"])

    @property
    def last_batch_violation(self) -> float:
        """MaxVio of single batches: the mean of the layers and of the last fifth of the steps."""
        last = self.steps[-max(1, len(self.steps) // 5) :]
        return fmean(fmean(step["max_violation"]) for step in last)


def small_run(tokens: int, *, seed: int, settings: Mapping[str, str]) -> PretrainConfig:
    """Return the settings of a run: recipe `tiny`, its published schedule scaled to so many tokens, and `settings`."""
    start, scaled = tiny(), milestones(tokens)
    config = replace(
        start,
        total_tokens=tokens,
        optim=replace(
            start.optim, learning_rate=learning_rate(PEAK_RATE, total_tokens=tokens, warmup_steps=WARMUP_STEPS)
        ),
        mtp=replace(start.mtp, switch_tokens=scaled.mtp_switch_tokens),
        balance=replace(start.balance, bias_freeze_tokens=scaled.bias_freeze_tokens),
    )
    assignments = [*SMALL, f"runtime.seed={seed}", *(f"{name}={value}" for name, value in settings.items())]
    return apply_overrides(config, assignments=assignments)


def train_arms(ask: Ask, *, arms: Sequence[Arm], folder: Path | None = None) -> dict[str, list[TrainedRun]]:
    """Train every arm with every seed, seed after seed, and return the runs of each arm in the order of the seeds.

    `folder` is where the runs lie, when they are those of another experiment, which may have trained them already.

    Raises:
        KeyboardInterrupt: a signal has ended a run; the next call goes on with it.
    """
    folder = folder or ask.folder
    found: dict[str, list[TrainedRun]] = {arm.name: [] for arm in arms}
    total = len(arms) * len(ask.seeds)
    for seed in ask.seeds:
        for arm in arms:
            config = small_run(ask.tokens, seed=seed, settings=arm.settings)
            run = _train(config, folder=folder / "runs" / f"{arm.name}-{ask.tokens}-seed-{seed}", root=folder.parent)
            found[arm.name].append(run)
            done = sum(map(len, found.values()))
            ask.tell(f"{done} of {total}: {arm.label}, seed {seed}: held-out loss {run.loss:.4f}")
    return found


def settings_of(arms: Sequence[Arm]) -> dict[str, Any]:
    """Return for the record what was run."""
    return {
        "recipe": "tiny",
        "all": [*SMALL, f"optim.learning_rate.peak={PEAK_RATE}"],
        "arms": {arm.label: dict(arm.settings) for arm in arms},
    }


def seeds_of(runs: Sequence[TrainedRun], *, name: str) -> tuple[float, ...]:
    """Return a property of each run, in the order of the seeds."""
    return tuple(float(getattr(run, name)) for run in runs)


def smoothed(values: list[float], *, weight: float) -> list[float]:
    """Return the exponential average, its start included without a bias."""
    found, total, mass = [], 0.0, 0.0
    for value in values:
        total, mass = weight * total + value, weight * mass + 1
        found.append(total / mass)
    return found


def _train(config: PretrainConfig, *, folder: Path, root: Path) -> TrainedRun:
    """Train a run to its end; its corpus is the one of its seed, which all experiments share."""
    shared = root / "corpus" / f"vocab-{config.model.vocab_size}-seed-{config.runtime.seed}"
    with hold_folder(shared, lock=".lock", doing="preparing text", option="--runs"):
        prepare_corpus(config, folder=shared)
    lend_corpus(shared.resolve(), folder=folder)
    train_to_the_end(config, folder=folder)
    return read_run(folder)


def read_run(folder: Path) -> TrainedRun:
    """Return what a finished run has written down."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    validations = [record for record in records if record["kind"] == "validation"]
    return TrainedRun(
        folder=folder,
        steps=tuple(record for record in records if record["kind"] == "step"),
        validation=validations[-1],
    )
