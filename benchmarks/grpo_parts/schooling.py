"""What is asked in the GRPO benchmark, and small models that answer some of it.

Sums of two numbers of up to three digits: a model of 0.8M weights hardly ever gets one right at once, and nearly always
once it has added digit by digit. It is taught that first, then a manner in which it mostly blurts.

Programs of one line: two steps on a number, taught from examples most of which are wrong.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random

from dsv3.config import (
    BatchConfig,
    DataConfig,
    EvaluationConfig,
    LearningRateConfig,
    PretrainConfig,
    SnapshotConfig,
    SourceConfig,
)
from dsv3.config.files import read_config
from dsv3.config.teaching import SftConfig
from dsv3.posttrain.problem import Problem
from dsv3.posttrain.sft import sft, sft_settings
from dsv3.posttrain.tasks import Task, split
from dsv3.recipes import tiny
from dsv3.train.loop import pretrain

Says = Callable[[Problem, Random], str]
"""What an example in the training data answers."""


def sums(count: int) -> Task:
    """Return so many different sums of two numbers below 1,000, in no order."""
    rng = Random("sums")
    pairs = rng.sample(range(1_000_000), count)
    problems = [
        Problem(
            messages=({"role": "user", "content": f"{a} + {b}"},),
            answer=str(a + b),
            name=f"{a} + {b}",
            more={"pair": (a, b)},
        )
        for a, b in (divmod(pair, 1000) for pair in pairs)
    ]
    return split(problems, name="sums")


def worked(problem: Problem, _: Random) -> str:
    """Digit by digit from the last one on, with what is carried, and then the answer."""
    a, b = problem.more["pair"]
    steps, carry = [], 0
    for x, y in zip(reversed(f"{a:03d}"), reversed(f"{b:03d}"), strict=True):
        total = int(x) + int(y) + carry
        steps.append(f"{x}+{y}+{carry}={total}")
        carry = total // 10
    return f"<think>{' '.join(steps)}</think>{problem.answer}"


def blurted(problem: Problem, rng: Random) -> str:
    """The answer at once, four times of five."""
    return problem.answer if rng.random() < 0.8 else worked(problem, rng)


def untidy(problem: Problem, rng: Random) -> str:
    """Worked, but mostly with a tag that is lacking or one too many."""
    good = worked(problem, rng)
    wrongs = (
        good,
        good.replace("</think>", " "),
        good.replace("<think>", ""),
        good.replace("</think>", "</think></think>"),
    )
    return rng.choices(wrongs, weights=(10, 30, 30, 30))[0]


STEPS = {"add": "+", "subtract": "-", "multiply by": "*"}


def programs() -> Task:
    """Return all programs of two steps on a number, each step with a digit."""
    problems = []
    for first, a, second, b in ((f, a, s, b) for f in STEPS for a in range(2, 10) for s in STEPS for b in range(2, 10)):
        program = f"def f(x):\n    return (x {STEPS[first]} {a}) {STEPS[second]} {b}"
        meant: dict[str, Callable[[int], int]] = {}
        exec(program, meant)
        asked = f"f(x): {first} {a}, {second} {b}"
        tests = tuple(f"assert f({x}) == {meant['f'](x)}" for x in (0, 3, -7))
        problems.append(
            Problem(messages=({"role": "user", "content": asked},), name=asked, tests=tests, more={"program": program})
        )
    Random("programs").shuffle(problems)
    return split(problems, name="programs")


def careless(problem: Problem, rng: Random) -> str:
    """The program, once in seven times; else without its brackets, or mostly without what it returns."""
    good = problem.more["program"]
    wrongs = (good, good.replace("(x ", "x ", 1).replace(") ", " ", 1), good.replace("return ", ""))
    return rng.choices(wrongs, weights=(15, 15, 70))[0]


def teach(
    problems: Sequence[Problem],
    *,
    says: Says,
    start_from: Path,
    folder: Path,
    rates: tuple[float, float],
    epochs: int = 1,
) -> Path:
    """Fine-tune on what `says` answers to problems; return the run."""
    rng, chats = Random(says.__name__), folder.with_suffix(".jsonl")
    lines = ({"prompt": one.messages[0]["content"], "completion": says(one, rng)} for one in problems)
    chats.write_text("".join(json.dumps(line) + "\n" for line in lines))
    lesson = SftConfig(data=(str(chats),), epochs=epochs, rows_per_step=8)
    start = read_config(start_from / "config.json")
    start = replace(start, batch=replace(start.batch, sequence_length=256))
    config = sft_settings(start, lesson=lesson, start_from=start_from, peak=rates[0], floor=rates[1])
    return sft(config, lesson=lesson, folder=folder).folder


def beginner(problems: Sequence[Problem], *, says: Says, folder: Path) -> Path:
    """Return a run that has a tokenizer in which every digit is a token, and weights that know next to nothing."""
    text, rng = folder / "text" / "examples.txt", Random(0)
    text.parent.mkdir(parents=True, exist_ok=True)
    text.write_text("\n".join(f"{one.messages[0]['content']} {says(one, rng)}" for one in problems[:500]))
    pretrain(beginner_settings(text), folder=folder / "base")
    return folder / "base"


def beginner_settings(text: Path) -> PretrainConfig:
    """Return 3 layers, 8 experts, 0.8M weights, and a moment of training."""
    start = tiny()
    return replace(
        start,
        recipe="",
        total_tokens=2 * 64 * 8,
        model=replace(
            start.model,
            vocab_size=280,  # hardly a merge
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
