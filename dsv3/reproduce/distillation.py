"""Distillation in small: an expert's worked answers beside plain ones, from one base (report 5.4.1, Table 9).

The report has 31.1 to 37.4 on LiveCodeBench-CoT and 74.6 to 83.2 on MATH-500, with answers of 718 to 783 and 769 to
1,510 tokens. Problems are chains of five sums and products, read from left to right, whose remainder by 5 is asked:
each step is one of 40 facts, and all of them at once are too much for three layers. The expert was taught on worked
solutions of problems of its own to write every step between <think> and </think>. `posttrain.distill` has it answer
other problems and keeps what is right. As in the report, one base is then fine-tuned on the short answers of these
problems, and on the expert's for as many tokens; both answer the same held-out problems greedily.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from statistics import fmean
from typing import Any

import torch

from dsv3.config import (
    BatchConfig,
    DataConfig,
    EvaluationConfig,
    LearningRateConfig,
    SnapshotConfig,
    SourceConfig,
)
from dsv3.config.files import read_config
from dsv3.config.teaching import DistillConfig, SftConfig
from dsv3.data.chat_data import as_tokens, read_conversations
from dsv3.data.tokenizer import Tokenizer
from dsv3.infer.loaded import load
from dsv3.posttrain.distill import distill
from dsv3.posttrain.problem import Problem
from dsv3.posttrain.rewards import answer_is_right
from dsv3.posttrain.rollout import draw_answers
from dsv3.posttrain.sft import sft, sft_settings
from dsv3.posttrain.tasks import Task
from dsv3.recipes import tiny
from dsv3.report.bars import Group, draw_bars
from dsv3.reproduce.experiment import Ask, Outcome, Picture
from dsv3.reproduce.finding import Order
from dsv3.reproduce.training import train_to_the_end

STEPS, DIVISOR = 5, 5
LENGTH = 128
EXPERT_PROBLEMS, STUDENT_PROBLEMS, HELD_OUT = 6000, 3000, 400
EXPERT_EPOCHS, STUDENT_EPOCHS = 3, 6
RATES = (3e-3, 3e-4)
EXPERT, ON_PLAIN, ON_DISTILLED = "expert", "student on plain answers", "student on distilled answers"


@dataclass(frozen=True, kw_only=True)
class Distilled:
    """What came of it."""

    table: dict[str, dict[str, Any]]
    """Of the expert and both students: the share of held-out problems that is right, and the mean length."""
    card: dict[str, Any]
    """Of the distilled set."""


def run(ask: Ask) -> Outcome:
    """Distil once."""
    found = distil_chains(ask.folder)
    plain, distilled = found.table[ON_PLAIN], found.table[ON_DISTILLED]
    draw_bars(
        [
            Group(name="right, %", values=(100 * plain["right"], 100 * distilled["right"])),
            Group(name="tokens of an answer", values=(plain["length"], distilled["length"])),
        ],
        labels=("on plain answers", "on distilled answers"),
        title="A student on held-out problems",
        y_label="",
        file=ask.folder / "distillation.png",
    )
    return Outcome(
        findings=(
            Order(
                claim="problems wrong: after distillation below on plain answers",
                report="wrong 68.9% to 62.6% (LiveCodeBench), 25.4% to 16.8% (MATH-500)",
                lower=(1 - distilled["right"],),
                higher=(1 - plain["right"],),
            ),
            Order(
                claim="length: plain answers below those after distillation",
                report="718 and 783 tokens, 769 and 1,510",
                lower=(plain["length"],),
                higher=(distilled["length"],),
            ),
        ),
        pictures=(Picture(file="distillation.png", caption="Right more often, and at greater length."),),
        settings={
            "problems": f"chains of {STEPS} sums and products, modulo {DIVISOR}",
            "expert": EXPERT_PROBLEMS,
            "students": STUDENT_PROBLEMS,
            "held_out": HELD_OUT,
        },
        data={"table": found.table, "card": found.card},
        remark="A chain that is answered at once is a guess for a model this small, so the gain is larger than the "
        "report's, where the student could do much already.",
    )


def distil_chains(folder: Path, *, part: int = 1) -> Distilled:
    """Teach the expert, let it answer, teach both students, and measure all three; of all problems one in `part`."""
    torch.set_num_threads(min(2, torch.get_num_threads()))
    chance = Random(0)
    asked: set[str] = set()
    own, problems, held_out = (
        [chain(chance, asked=asked) for _ in range(count)]
        for count in (EXPERT_PROBLEMS // part, STUDENT_PROBLEMS // part, HELD_OUT // part)
    )
    folder.mkdir(parents=True, exist_ok=True)
    exclude = folder / "held_out.txt"
    exclude.write_text("".join(f"{one.name}\n" for one in held_out))
    base = begin(problems, folder=folder)
    worked = write(own, key="worked", path=folder / "worked.jsonl")
    plain = write(problems, key="answer", path=folder / "plain.jsonl")
    expert = teach(base, data=worked, epochs=EXPERT_EPOCHS, folder=folder / "expert")
    config = DistillConfig(
        teacher=str(expert),
        originals=False,
        system_prompt="",
        candidates=4,
        max_answer_tokens=80,
        rewards=("answer=1", "format=1"),
        min_reward=2.0,
        exclude=(str(exclude),),
    )
    task = Task(name="chains", training=tuple(problems), held_out=tuple(held_out))
    made = distill(config, output=folder / "distilled.jsonl", task=task)
    assert made.card is not None
    distilled = str(made.output)
    tokens = STUDENT_EPOCHS * count_tokens(distilled, run=base)
    epochs = round(tokens / count_tokens(plain, run=base))
    on_plain = teach(base, data=plain, epochs=epochs, folder=folder / "on_plain")
    on_distilled = teach(base, data=distilled, epochs=STUDENT_EPOCHS, folder=folder / "on_distilled")
    runs = {EXPERT: expert, ON_PLAIN: on_plain, ON_DISTILLED: on_distilled}
    return Distilled(table={name: measure(one, problems=held_out) for name, one in runs.items()}, card=made.card)


def chain(chance: Random, *, asked: set[str]) -> Problem:
    """Return a chain that was not asked before, with its steps written out."""
    while True:
        value = chance.randrange(DIVISOR)
        said, steps = [str(value)], []
        for _ in range(STEPS):
            sign, operand = chance.choice("+*"), chance.randrange(1, DIVISOR)
            after = (value + operand if sign == "+" else value * operand) % DIVISOR
            steps.append(f"{sign}{operand}={after}")
            said.append(f", {sign}{operand}")
            value = after
        name = "".join(said)
        if name not in asked:
            asked.add(name)
            worked = f"<think>{''.join(steps)}</think>{value}"
            return Problem(
                messages=({"role": "user", "content": name},), answer=str(value), name=name, more={"worked": worked}
            )


def write(problems: Sequence[Problem], *, key: str, path: Path) -> str:
    """Write conversations in which problems are answered at once, or worked."""
    lines = (
        {"prompt": one.name, "completion": one.answer if key == "answer" else one.more["worked"]} for one in problems
    )
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def begin(problems: Sequence[Problem], *, folder: Path) -> Path:
    """Return a run of a moment, which has a tokenizer and hardly more."""
    text = folder / "text" / "chains.txt"
    text.parent.mkdir(parents=True, exist_ok=True)
    text.write_text("\n".join(f"{one.name} {one.more['worked']}" for one in problems))
    start = tiny()
    config = replace(
        start,
        recipe="",
        total_tokens=2 * 64 * 8,
        model=replace(
            start.model,
            vocab_size=280,  # hardly a merge: every digit is a token
            hidden_size=128,
            num_hidden_layers=3,
            kv_lora_rank=64,
            intermediate_size=256,
            n_routed_experts=8,
            num_experts_per_tok=2,
            n_group=2,
            topk_group=1,
            num_nextn_predict_layers=0,
            max_position_embeddings=256,
        ),
        data=DataConfig(sources=(SourceConfig(path=str(text)),), held_out_rate=0.0, fim_rate=0.0),
        batch=BatchConfig(sequence_length=64, micro_batch_sequences=8).steady(8),
        optim=replace(start.optim, ema_decay=0.0, learning_rate=LearningRateConfig(peak=2e-3, warmup_steps=20)),
        evaluation=EvaluationConfig(every_steps=1000),
        snapshot=SnapshotConfig(every_steps=200),
    )
    train_to_the_end(config, folder=folder / "base")
    return folder / "base"


def teach(base: Path, *, data: str, epochs: int, folder: Path) -> Path:
    """Fine-tune on conversations; return the run."""
    lesson = SftConfig(data=(data,), epochs=epochs, rows_per_step=8)
    start = read_config(base / "config.json")
    start = replace(start, batch=replace(start.batch, sequence_length=LENGTH, micro_batch_sequences=8))
    peak, floor = RATES
    config = sft_settings(start, lesson=lesson, start_from=base, peak=peak, floor=floor)
    result = sft(config, lesson=lesson, folder=folder)
    if result.interrupted:
        raise KeyboardInterrupt
    return result.folder


def count_tokens(data: str, *, run: Path) -> int:
    """Return the tokens of conversations as a run's tokenizer has them."""
    tokenizer = Tokenizer.from_file(run / "corpus" / "tokenizer")
    return sum(len(as_tokens(one, tokenizer=tokenizer).inputs) for one in read_conversations([data]))


def measure(run: Path, *, problems: Sequence[Problem]) -> dict[str, Any]:
    """Answer problems with the likeliest tokens; return the share that is right, and the mean length."""
    model = load(run)
    answers = draw_answers(
        model.runner,
        tokenizer=model.tokenizer,
        problems=problems,
        group_size=1,
        temperature=0.0,
        max_tokens=80,
        seed=0,
        with_logprobs=False,
    )
    return {
        "right": fmean(answer_is_right(one.problem, one.text) for one in answers),
        "length": fmean(len(one.ids) - one.finished for one in answers),
        "example": f"{answers[0].problem.name} -> {answers[0].text}",
    }
