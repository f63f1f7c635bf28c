"""dsv3 distill: have a teacher answer problems, and keep what is right for `dsv3 sft`."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from dsv3.cli.pretrain import INTERRUPTED
from dsv3.config.override import apply_overrides
from dsv3.config.teaching import REFLECTION, DistillConfig

TELL_EVERY_PROBLEMS = 100
DEFAULTS = DistillConfig(teacher="any")


def register(app: typer.Typer) -> None:
    """Add the verb to the command line."""
    app.command("distill")(distill)


def distill(
    teacher: Annotated[
        str,
        typer.Option(
            metavar="MODEL",
            help="Who answers: a run, an export, a published folder, or the address of an OpenAI API, http://HOST/v1.",
        ),
    ],
    output: Annotated[Path, typer.Option(metavar="FILE.jsonl", help="The set; its card FILE.json stands beside it.")],
    teacher_model: Annotated[str, typer.Option(metavar="NAME", help="Name of the model at an address.")] = "",
    task: Annotated[
        str, typer.Option(help="arithmetic, thinking, gym:NAME, or a .jsonl file of problems, as for dsv3 grpo.")
    ] = DEFAULTS.task,
    problems: Annotated[int, typer.Option(min=0, help="The first so many. [default: all]")] = DEFAULTS.problems,
    reward: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=WEIGHT",
            help="answer, exact, math, format, code, stdin, gym, model:FOLDER or judge:FOLDER_OR_ADDRESS; again for "
            "more. [default: answer=1]",
        ),
    ] = None,
    min_reward: Annotated[float, typer.Option(help="Answers worth less are rejected.")] = DEFAULTS.min_reward,
    candidates: Annotated[int, typer.Option(min=1, help="Answers drawn for a problem.")] = DEFAULTS.candidates,
    keep: Annotated[int, typer.Option(min=1, help="Most of them kept: the best, then the shortest.")] = DEFAULTS.keep,
    temperature: Annotated[float, typer.Option(help="Of drawing.")] = DEFAULTS.temperature,
    max_tokens: Annotated[
        int, typer.Option(min=1, help="Longer answers are cut off and rejected.")
    ] = DEFAULTS.max_answer_tokens,
    min_tokens: Annotated[int, typer.Option(min=0, help="Shorter ones are rejected.")] = DEFAULTS.min_answer_tokens,
    system: Annotated[
        str | None, typer.Option(metavar="TEXT", help="System prompt; '' for none. [default: asks to reflect]")
    ] = None,
    originals: Annotated[bool, typer.Option(help="Write the responses that came with the problems, too.")] = True,
    exclude: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE", help="Text or .jsonl of an evaluation that is kept out; again for more."),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Another setting, such as write_system=false or seed=1."),
    ] = None,
) -> None:
    """Write a set for dsv3 sft: problems with the answers of a teacher, drawn, judged by rules, the best kept.

    Held-out problems are not asked. The card counts what became of every problem and every answer. Called again, it
    goes on where it was stopped; a model of ours gives the same file as if it had not been.
    """
    config = apply_overrides(
        replace(
            DEFAULTS,
            teacher=teacher,
            teacher_model=teacher_model,
            task=task,
            problems=problems,
            rewards=tuple(reward or DEFAULTS.rewards),
            min_reward=min_reward,
            candidates=candidates,
            keep=keep,
            temperature=temperature,
            max_answer_tokens=max_tokens,
            min_answer_tokens=min_tokens,
            system_prompt=REFLECTION if system is None else system,
            originals=originals,
            exclude=tuple(exclude or ()),
        ),
        assignments=settings or [],
    )
    from dsv3.posttrain.distill import distill as ask

    result = ask(config, output=output, on_record=tell)
    if result.card is None:
        typer.echo(
            f"stopped after {result.answered:,} of {result.total:,} problems; the same command goes on", err=True
        )
        raise typer.Exit(INTERRUPTED)
    for line in told(result.card):
        typer.echo(line)
    typer.echo(f"the set:  {output}\nits card: {output.with_suffix('.json')}\nteach it: dsv3 sft BASE --data {output}")


def tell(record: dict[str, Any]) -> None:
    """Say how it goes, every so many problems."""
    if record["now"] % TELL_EVERY_PROBLEMS == 0:
        typer.echo(
            f"{record['answered']:,} of {record['total']:,} problems answered; of these {record['now']:,} "
            f"{record['rewarded'] / record['now']:.0%} have a rewarded answer"
        )


def told(card: dict[str, Any]) -> list[str]:
    """Return what a card says, in a few lines."""
    problems, answers, lines = card["problems"], card["answers"], card["lines"]
    rejected = ", ".join(f"{count:,} {reason}" for reason, count in answers["rejected"].items() if count)
    said = [
        f"{problems['asked']:,} problems asked, {problems['with an answer kept']:,} with an answer kept",
        f"{answers['drawn']:,} answers of {answers['mean tokens drawn']:.1f} tokens, {answers['kept']:,} of "
        f"{answers['mean tokens kept']:.1f} kept; rejected: {rejected or 'none'}",
        f"{lines['teacher']:,} lines of the teacher, {lines['original']:,} originals",
    ]
    for file, met in card["contaminated"].items():
        said.append(
            f"{file}: {met['whole']:,} problems whole and {met['in a row']:,} by 13 words in a row left out, "
            f"{met['answers']:,} answers"
        )
    return said
