"""dsv3 grpo: let a taught model find out by itself what answers are worth."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from dsv3.cli.pretrain import INTERRUPTED
from dsv3.cli.run_settings import SetOption
from dsv3.cli.sft import BaseArgument, settings_of
from dsv3.config.override import apply_overrides
from dsv3.config.teaching import GrpoConfig
from dsv3.runtime.rank import is_main_rank

TELL_EVERY_ITERATIONS = 5
DEFAULTS = GrpoConfig()


def register(app: typer.Typer) -> None:
    """Add the verb to the command line."""
    app.command("grpo")(grpo)


def grpo(
    base: BaseArgument,
    task: Annotated[
        str,
        typer.Option(
            help="arithmetic (sums), thinking (sums after a thought), gym:NAME (of reasoning-gym), or a .jsonl file "
            "of problems, each with prompt or messages, and answer, tests or cases."
        ),
    ] = DEFAULTS.task,
    reward: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=WEIGHT",
            help="answer, exact, math, format, code, stdin, gym, model:FOLDER or judge:FOLDER_OR_ADDRESS; again for "
            "more. [default: answer=1]",
        ),
    ] = None,
    run: Annotated[Path | None, typer.Option("--run", metavar="FOLDER", help="[default: BASE/grpo]")] = None,
    iterations: Annotated[int, typer.Option(min=1, help="Rollouts, each learned from.")] = DEFAULTS.iterations,
    problems: Annotated[int, typer.Option(min=1, help="Of one rollout.")] = DEFAULTS.problems_per_iteration,
    group: Annotated[int, typer.Option(min=2, help="Answers to each.")] = DEFAULTS.group_size,
    updates: Annotated[int, typer.Option(min=1, help="Optimizer steps of a rollout.")] = DEFAULTS.updates_per_rollout,
    learning_rate: Annotated[float, typer.Option(min=0.0, help="Constant.")] = 3e-6,
    max_tokens: Annotated[int, typer.Option(min=1, help="Of an answer.")] = DEFAULTS.max_answer_tokens,
    answers_at_once: Annotated[
        int, typer.Option(min=0, help="Rows of tokens that go through the model at once. [default: the base's]")
    ] = 0,
    lessons: Annotated[
        list[str] | None,
        typer.Option("--lesson", metavar="NAME=VALUE", help="Another setting of grpo.json, such as kl_weight=0.04."),
    ] = None,
    assignments: SetOption = None,
) -> None:
    """Train by GRPO: groups of answers are drawn, scored by rules, and made likelier where they beat their group.

    Problems are split by what they ask: a tenth is never trained on and answered every few iterations. V3 publishes no
    numbers for any of this; defaults are R1's where there are some. Called again, it goes on where it was stopped.
    """
    lesson = apply_overrides(
        replace(
            DEFAULTS,
            task=task,
            rewards=tuple(reward or DEFAULTS.rewards),
            iterations=iterations,
            problems_per_iteration=problems,
            group_size=group,
            updates_per_rollout=updates,
            max_answer_tokens=max_tokens,
        ),
        assignments=lessons or [],
    )
    from dsv3.posttrain.grpo import grpo as teach
    from dsv3.posttrain.grpo import grpo_settings

    config = grpo_settings(settings_of(base), start_from=base, peak=learning_rate)
    if answers_at_once:
        config = replace(config, batch=replace(config.batch, micro_batch_sequences=answers_at_once))
    config = apply_overrides(config, assignments=assignments or [])
    result = teach(config, lesson=lesson, folder=run or base / "grpo", on_record=tell)
    if not is_main_rank():
        return
    if result.interrupted:
        typer.echo(f"stopped and saved after iteration {result.iteration:,}; the same command goes on", err=True)
        raise typer.Exit(INTERRUPTED)
    scores = ", ".join(f"{name} {score:.3f}" for name, score in result.scores.items())
    typer.echo(f"finished after {result.iteration:,} iterations; held-out problems: {scores}")
    typer.echo(f"the model:  {result.export}\ntalk to it: dsv3 chat {result.folder}")


def tell(record: dict[str, Any]) -> None:
    """Say how it goes."""
    if not is_main_rank():
        return
    if record["kind"] == "grpo_validation":
        scores = ", ".join(f"{name} {score:.3f}" for name, score in record["scores"].items())
        typer.echo(f"iteration {record['iteration']:,}: of {record['problems']:,} held-out problems: {scores}")
    elif record["iteration"] == 1 or record["iteration"] % TELL_EVERY_ITERATIONS == 0:
        seconds = record["seconds"]
        typer.echo(
            f"iteration {record['iteration']:,}: reward {record['reward']:.3f}, "
            f"{record['length']:.1f} tokens an answer, "
            f"{record['alike_groups']:.0%} of groups alike, KL {record.get('kl', 0.0):.3f}; "
            f"{seconds['rollout']:.1f} s drawn, {seconds['learn']:.1f} s learned"
        )
