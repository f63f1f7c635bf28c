"""Group relative policy optimisation (report 5.2.2), from a model that answers to one that answers better.

    problems -> groups of answers, drawn by the engine -> rewards -> advantages -> steps on the policy loss -> again

Answers may be drawn beside the steps on those before them (`draw_ahead`), by weights that are one rollout old.

What is drawn, in which order, and every step hang on seeds and counts alone, so a stopped run goes on as if it had not
been. Of several ranks each has all weights and draws the answers to its share of the problems; all learn from all.
"""

import copy
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, zip_longest
from pathlib import Path
from random import Random
from statistics import fmean
from typing import Any

import torch

from dsv3.batch import IGNORE, TokenBatch
from dsv3.checkpoint.published import load_published, save_published
from dsv3.config import MtpLossConfig, PretrainConfig
from dsv3.config.teaching import GrpoConfig
from dsv3.errors import ConfigError
from dsv3.infer.runner import Runner
from dsv3.model.transformer import Transformer
from dsv3.parallel.launch import open_ranks
from dsv3.posttrain.ahead import Ahead, forget_answers, read_answers, write_answers
from dsv3.posttrain.lesson import Lesson, open_lesson
from dsv3.posttrain.policy import PolicyBatch, PolicyLoss, advantages_of
from dsv3.posttrain.problem import Problem
from dsv3.posttrain.rewards import Reward, rewards_named
from dsv3.posttrain.rollout import Answer, draw_answers, runner_for
from dsv3.posttrain.sft import data_hash
from dsv3.posttrain.tasks import Task, task_named
from dsv3.runtime.cores import available_cores
from dsv3.runtime.device import set_threads
from dsv3.train.step import StepMetrics, train_step
from dsv3.train.stop import stop_on_signals

PEAK = 3e-6
"""Learning rate, constant: R1's; that of V3 is unpublished."""
SAMPLES = 2
"""Held-out problems whose answers are kept at each validation."""

Progress = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, kw_only=True)
class GrpoResult:
    """Where a call of `grpo` has left the run."""

    folder: Path
    iteration: int
    finished: bool
    interrupted: bool
    scores: dict[str, float]
    """Mean of each reward over the held-out problems, when they were last looked at by this call."""
    export: Path | None


@dataclass(frozen=True, kw_only=True)
class Judged:
    """An answer, what it is worth, and how much more than the others of its group."""

    answer: Answer
    reward: float
    scores: dict[str, float]
    advantage: float | None
    """None where all of a group are worth the same."""


def grpo_settings(base: PretrainConfig, *, start_from: Path, peak: float = PEAK) -> PretrainConfig:
    """Return the settings of training: those of the base, but for what reinforcement has otherwise.

    A constant rate; no MTP loss, no balance loss, router biases as they are, no weight decay, no weight average.
    """
    schedule = replace(
        base.optim.learning_rate,
        peak=peak,
        warmup_steps=0,
        constant_until_tokens=1 << 62,
        cosine_until_tokens=1 << 62,
        hold_until_tokens=1 << 62,
        cosine_floor=peak,
        final=peak,
    )
    return replace(
        base,
        recipe="",
        start_from=str(start_from.absolute()),
        optim=replace(base.optim, learning_rate=schedule, ema_decay=0.0, weight_decay=0.0),
        mtp=MtpLossConfig(early_weight=0.0, late_weight=0.0, switch_tokens=0),
        balance=replace(base.balance, bias_update_speed=0.0, sequence_loss_weight=0.0),
    )


def grpo(
    config: PretrainConfig,
    *,
    lesson: GrpoConfig,
    folder: Path,
    task: Task | None = None,
    rewards: Sequence[Reward] = (),
    on_record: Progress | None = None,
    stop_after_iterations: int | None = None,
) -> GrpoResult:
    """Teach in the run folder `folder`, from its newest snapshot if it has one, until all iterations are done.

    `task` and `rewards` stand in the place of those that `lesson` names: for tasks and rules of the user's own.

    Raises:
        ConfigError, DataError, SnapshotError, CheckpointError, NonFiniteError, TrainingError: as their texts say.
    """
    if config.balance.method == "batch_loss":
        raise ConfigError("balance.method = 'batch_loss' is for pre-training; use 'bias' or 'none'")
    split = {name: getattr(config.parallel, name) for name in ("pipeline", "expert", "context")}
    if any(number > 1 for number in split.values()):
        told = ", ".join(f"parallel.{name} = {number}" for name, number in split.items() if number > 1)
        raise ConfigError(f"{told}: answers are drawn by ranks that each have all weights; leave it at 1")
    task, rules = task or task_named(lesson.task), list(rewards) or rewards_named(lesson.rewards, judge=lesson.judge)
    data = data_hash([lesson.task]) if lesson.task.endswith(".jsonl") else task.name
    length, device = config.batch.sequence_length, config.runtime.device
    with (
        open_ranks(config.parallel, model=config.model, sequence_length=length, device=device) as ranks,
        open_lesson(config, lesson=lesson, name="grpo", data=data, folder=folder, ranks=ranks) as run,
    ):
        teaching = Teaching(run=run, lesson=lesson, task=task, rewards=rules, notify=on_record or _ignore)
        return teaching.go(stop_after_iterations)


class Teaching:
    """The loop of GRPO and what it works with."""

    def __init__(
        self, *, run: Lesson, lesson: GrpoConfig, task: Task, rewards: Sequence[Reward], notify: Progress
    ) -> None:
        self.run, self.lesson, self.task, self.rewards, self.notify = run, lesson, task, rewards, notify
        self.state, self.tokenizer, self.ranks = run.state, run.tokenizer, run.state.ranks
        self.loss = PolicyLoss(lesson=lesson, vocab_size=self.tokenizer.vocab_size)
        self.reference = self._take_up_reference() if lesson.kl_weight else None
        self.scores: dict[str, float] = {}
        self.ahead = Ahead()

    @property
    def iteration(self) -> int:
        """Iterations done. A group that teaches nothing costs its update, not its number."""
        return self.state.step // self.lesson.updates_per_rollout

    def go(self, limit: int | None) -> GrpoResult:
        """Iterate until all is done, `limit` iterations are, or a signal comes."""
        state, lesson = self.state, self.lesson
        state.describe_rows = lambda _: f"answers of iteration {self.iteration + 1}"
        with stop_on_signals() as stop, closing(self.ahead):
            taken, stopping = 0, False
            if lesson.draw_ahead:
                self._share_threads()
                self._take_up_ahead()
            if self.iteration == 0:
                self.validate()
            while self.iteration < lesson.iterations and not stopping and taken != limit:
                self.iterate()
                taken += 1
                if self.iteration % lesson.validate_every == 0 or self.iteration == lesson.iterations:
                    self.validate()
                if self.iteration % self.run.config.snapshot.every_steps == 0:
                    self.save()
                stopping = self.ranks.total([stop.requested])[0] > 0
            self.save()
        finished = self.iteration >= lesson.iterations
        return GrpoResult(
            folder=self.run.folder,
            iteration=self.iteration,
            finished=finished,
            interrupted=stopping and not finished,
            scores=self.scores,
            export=self.run.export() if finished else None,
        )

    def iterate(self) -> None:
        """Draw answers, judge them, and learn from them: the spine."""
        lesson, number = self.lesson, self.iteration
        if lesson.reference_every and number and number % lesson.reference_every == 0:
            self._make_reference()
        started = time.perf_counter()
        waited = self.ahead.take(number)
        answers = self._rollout(runner_for(self.state.model), number=number) if waited is None else waited
        if lesson.draw_ahead and number + 1 < lesson.iterations:
            runner = runner_for(self.state.model, alone=True)
            self.ahead.begin(number + 1, partial(self._rollout, runner, number=number + 1))
        drawn = time.perf_counter()
        judged = self._of_all(judge(answers, rewards=self.rewards, lesson=lesson), size=lesson.group_size)
        scored = time.perf_counter()
        metrics, seen = self.learn([one for one in judged if one.advantage is not None], number=number)
        self._tell(
            judged,
            metrics=metrics,
            seen=seen,
            seconds=(drawn - started, scored - drawn, time.perf_counter() - scored),
            stale_steps=0 if waited is None else lesson.updates_per_rollout,
        )

    def learn(self, judged: Sequence[Judged], *, number: int) -> tuple[list[StepMetrics], list[dict[str, float]]]:
        """Take the optimizer steps of an iteration, each on its part of the answers, in an order of their own."""
        order = list(judged)
        Random(f"{self.lesson.seed} updates {number}").shuffle(order)
        updates = self.lesson.updates_per_rollout
        parts = [order[part::updates] for part in range(updates)]
        batches = [self._batches(part) for part in parts]
        metrics, seen = [], []
        for part in batches:
            if not part:
                self.state.step += 1
                continue
            metrics.append(train_step(self.state, batches=part, loss=self.loss))
            seen.append(self._seen_by_all(self.loss.take_seen()))
        return metrics, seen

    def validate(self) -> None:
        """Answer held-out problems with the likeliest tokens, and score them."""
        problems = self.task.held_out[: self.lesson.held_out]
        runner = runner_for(self.state.model)
        own = self._draw(runner, problems=problems, group_size=1, temperature=0.0, seed=0, with_logprobs=False)
        scored = list(zip(own, scores_of(own, rewards=self.rewards), strict=True))
        everyone = self._of_all(scored, size=1)
        answers = [answer for answer, _ in everyone]
        self.scores = {rule.name: fmean(scores[rule.name] for _, scores in everyone) for rule in self.rewards}
        step = self.state.step
        values = {
            "iteration": self.iteration,
            "scores": self.scores,
            "length": fmean(len(answer.ids) for answer in answers),
            "problems": len(problems),
        }
        self.notify(self.run.log.record("grpo_validation", step=step, values=values))
        for answer in answers[:SAMPLES]:
            self.run.log.sample(step=step, prompt=answer.problem.messages[-1]["content"], text=answer.text)

    def save(self) -> None:
        """Write a snapshot, and before it the answers that wait for the next iteration."""
        waiting = self.ahead.waiting()
        if self.lesson.draw_ahead and self.iteration < self.lesson.iterations and waiting is not None:
            number, own = waiting
            everyone = self._of_all(own, size=self.lesson.group_size)
            if self.ranks.rank == 0:
                write_answers(self.run.folder, step=self.state.step, number=number, answers=everyone)
        self.run.save()
        if self.ranks.rank == 0:
            forget_answers(self.run.folder)

    def _problems(self, number: int) -> list[Problem]:
        return self.task.problems_of(number, count=self.lesson.problems_per_iteration, seed=self.lesson.seed)

    def _rollout(self, runner: Runner, *, number: int) -> list[Answer]:
        """Return this rank's answers of iteration `number`."""
        lesson = self.lesson
        if lesson.draw_ahead:
            self._share_threads()  # each thread of Python has a count of its own
        return self._draw(
            runner,
            problems=self._problems(number),
            group_size=lesson.group_size,
            temperature=lesson.temperature,
            seed=_seed(lesson.seed, number),
            with_logprobs=lesson.old_logprobs == "engine",
            with_experts=lesson.routing != "own",
        )

    def _share_threads(self) -> None:
        set_threads(max(1, (self.run.config.runtime.threads or available_cores()) // 2))

    def _take_up_ahead(self) -> None:
        """Have the answers that were drawn ahead before the run stopped."""
        found = read_answers(
            self.run.folder,
            step=self.state.step,
            problems_of=self._problems,
            group_size=self.lesson.group_size,
            tokenizer=self.tokenizer,
        )
        if found is not None:
            number, everyone = found
            size = self.lesson.group_size
            groups = [everyone[first : first + size] for first in range(0, len(everyone), size)]
            self.ahead.restore(
                number, [one for group in groups[self.ranks.row_rank :: self.ranks.row_size] for one in group]
            )

    def _draw(
        self,
        runner: Runner,
        *,
        problems: Sequence[Problem],
        group_size: int,
        temperature: float,
        seed: int,
        with_logprobs: bool,
        with_experts: bool = False,
    ) -> list[Answer]:
        """Return this rank's answers: to every problem whose number, divided by that of the ranks, leaves its own."""
        own = range(self.ranks.row_rank, len(problems), self.ranks.row_size)
        if not own:
            return []
        return draw_answers(
            runner,
            tokenizer=self.tokenizer,
            problems=[problems[place] for place in own],
            places=own,
            group_size=group_size,
            temperature=temperature,
            max_tokens=self.lesson.max_answer_tokens,
            seed=seed,
            with_logprobs=with_logprobs,
            with_experts=with_experts,
        )

    def _of_all(self, own: Sequence[Any], *, size: int) -> list[Any]:
        """Return what all ranks have of their problems, `size` for each, in the order of the problems."""
        parts = [[part[first : first + size] for first in range(0, len(part), size)] for part in self.ranks.gather(own)]
        rounds = zip_longest(*parts, fillvalue=())
        return [one for groups in rounds for group in groups for one in group]

    def _seen_by_all(self, seen: dict[str, float]) -> dict[str, float]:
        """Return sums over all ranks, and the largest distance of a ratio from 1."""
        sums = {name: value for name, value in seen.items() if name != "ratio_off"}
        total = dict(zip(sums, self.ranks.total(list(sums.values())), strict=True))
        return total | {"ratio_off": max(numbers[0] for numbers in self.ranks.gather_numbers([seen["ratio_off"]]))}

    def _batches(self, everyone: Sequence[Judged]) -> list[PolicyBatch]:
        """Return this rank's micro-batches of a step, in which every answer has its share of the mean.

        A rank for which there is none goes over an answer that does not count.
        """
        config = self.run.config.batch
        judged = everyone[self.ranks.row_rank :: self.ranks.row_size]
        idle = not judged and bool(everyone)
        if idle:
            judged = everyone[:1]
        room = config.micro_batch_sequences * config.sequence_length
        groups: list[list[Judged]] = []
        for one in sorted(judged, key=lambda one: one.answer.num_tokens):
            if not groups or sum(other.answer.num_tokens for other in groups[-1]) + one.answer.num_tokens > room:
                groups.append([])
            groups[-1].append(one)
        all_tokens = sum(len(one.answer.ids) for one in everyone)
        batches = []
        for group in groups:
            batch = policy_batch(group, lesson=self.lesson, num_answers=len(everyone), num_tokens=all_tokens)
            batch = replace(batch, shares=batch.shares * (not idle)).to(self.state.model.device)
            self.state.model.eval()
            if self.lesson.old_logprobs == "trainer":
                batch = replace(batch, old_logprobs=self.loss.logprobs(self.state.model, batch=batch))
            if self.reference is not None:
                batch = replace(
                    batch, reference_logprobs=self.loss.logprobs(self.reference, batch=replace(batch, experts=None))
                )
            batches.append(batch)
        return batches

    def _take_up_reference(self) -> Transformer:
        folder = self.run.folder / "reference"
        if (folder / "config.json").exists() and self.state.step:
            model = load_published(folder, dtype=self.state.model.dtype, device=self.state.model.device)
            return model.eval().requires_grad_(False)
        return self._make_reference()

    def _make_reference(self) -> Transformer:
        """Take the model as it is for the reference, and keep it for a run that goes on."""
        self.reference = copy.deepcopy(self.state.model).eval().requires_grad_(False)
        folder = self.run.folder / "reference"
        if self.ranks.rank == 0:
            save_published(self.reference, folder=folder, tokenizer_folder=None, dtype=torch.float32)
        self.ranks.gather(None)  # It is there for all of them.
        return self.reference

    def _tell(
        self,
        judged: Sequence[Judged],
        *,
        metrics: Sequence[StepMetrics],
        seen: Sequence[dict[str, float]],
        seconds: tuple[float, float, float],
        stale_steps: int,
    ) -> None:
        """Write down what an iteration brought."""
        answers = [one.answer for one in judged]
        values: dict[str, Any] = {
            "iteration": self.iteration,
            "reward": fmean(one.reward for one in judged),
            "scores": {rule.name: fmean(one.scores[rule.name] for one in judged) for rule in self.rewards},
            "length": fmean(len(answer.ids) for answer in answers),
            "cut_off": fmean(not answer.finished for answer in answers),
            "alike_groups": sum(one.advantage is None for one in judged) / len(judged),
            "seconds": dict(zip(("rollout", "rewards", "learn"), seconds, strict=True)),
            "answer_tokens": sum(len(answer.ids) for answer in answers),
            "stale_steps": stale_steps,
        }
        if metrics:
            means = {name: fmean(one[name] for one in seen) for name in ("kl", "clipped", "entropy", "ratio")}
            values |= means | {
                "first_ratio_off": seen[0]["ratio_off"],
                **({"first_rerouted": seen[0]["rerouted"]} if "rerouted" in seen[0] else {}),
                "loss": fmean(one.loss for one in metrics),
                "grad_norm": fmean(one.gradient_norm for one in metrics),
                "learning_rate": metrics[-1].learning_rate,
            }
        self.notify(self.run.log.record("grpo", step=self.state.step, values=values))


def judge(answers: Sequence[Answer], *, rewards: Sequence[Reward], lesson: GrpoConfig) -> list[Judged]:
    """Score answers, which come group by group, and compare those of each group."""
    judged: list[Judged] = []
    all_scores = scores_of(answers, rewards=rewards)
    for first in range(0, len(answers), lesson.group_size):
        group = answers[first : first + lesson.group_size]
        scores = all_scores[first : first + lesson.group_size]
        worth = [
            sum(rule.weight * own[rule.name] for rule in rewards) - lesson.length_penalty * (not answer.finished)
            for answer, own in zip(group, scores, strict=True)
        ]
        advantages = advantages_of(worth, scale_by_deviation=lesson.scale_by_deviation)
        judged += [
            Judged(
                answer=answer, reward=reward, scores=own, advantage=None if advantages is None else advantages[place]
            )
            for place, (answer, reward, own) in enumerate(zip(group, worth, scores, strict=True))
        ]
    return judged


def scores_of(answers: Sequence[Answer], *, rewards: Sequence[Reward]) -> list[dict[str, float]]:
    """Return what each reward makes of each answer; equal answers to a problem are scored once."""
    distinct = {(id(one.problem), one.text): one for one in answers}
    problems, texts = [one.problem for one in distinct.values()], [one.text for one in distinct.values()]
    columns = {rule.name: dict(zip(distinct, rule.scores(problems, texts), strict=True)) for rule in rewards}
    return [{name: scores[id(one.problem), one.text] for name, scores in columns.items()} for one in answers]


def policy_batch(judged: Sequence[Judged], *, lesson: GrpoConfig, num_answers: int, num_tokens: int) -> PolicyBatch:
    """Return answers behind their prompts as a batch; each sees itself alone.

    `num_answers` and `num_tokens` of answers are those of the whole step, over which the mean is taken.
    """
    answers = [one.answer for one in judged]
    inputs = [[*answer.prompt_ids, *answer.ids[:-1]] for answer in answers]
    unknown = [len(answer.prompt_ids) - 1 for answer in answers]

    def per_token(values: Sequence[Sequence[float | int]], *, dtype: torch.dtype, fill: float | int) -> torch.Tensor:
        padded = ([fill] * before + list(own) for before, own in zip(unknown, values, strict=True))
        return torch.tensor(list(chain.from_iterable(padded)), dtype=dtype)

    def for_each(values: Sequence[float]) -> list[list[float]]:
        return [[value] * len(answer.ids) for value, answer in zip(values, answers, strict=True)]

    by_token = lesson.loss_mean == "token"
    shares = [1 / num_tokens if by_token else 1 / (num_answers * len(answer.ids)) for answer in answers]
    plain = TokenBatch.from_sequences(inputs)
    zeros = torch.zeros(plain.num_tokens)
    known = [answer.logprobs or [0.0] * len(answer.ids) for answer in answers]
    pieces = [answer.experts for answer in answers if answer.experts is not None]
    drawn = torch.cat(pieces).long() if pieces else None
    return PolicyBatch(
        tokens=plain.tokens,
        positions=plain.positions,
        starts=plain.starts,
        first_positions=plain.first_positions,
        targets=per_token([answer.ids for answer in answers], dtype=torch.long, fill=IGNORE),
        advantages=per_token(for_each([one.advantage or 0.0 for one in judged]), dtype=torch.float32, fill=0.0),
        old_logprobs=per_token(known, dtype=torch.float32, fill=0.0),
        reference_logprobs=zeros,
        drawn_experts=drawn,
        experts=drawn if lesson.routing == "replay" else None,
        shares=per_token(for_each(shares), dtype=torch.float32, fill=0.0),
    )


def _seed(seed: int, iteration: int) -> int:
    return seed * 1_000_003 + iteration


def _ignore(record: dict[str, Any]) -> None:
    pass


__all__ = ["GrpoResult", "Problem", "Reward", "Task", "grpo", "grpo_settings"]
