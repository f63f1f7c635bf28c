"""Claim: prefill and decoding apart answer as one engine does, lose nothing to killed workers, and steady the tokens.

Three things, each over HTTP, on a random model of V3's shape with 55 M weights (with a tokenizer made from Python's
own documentation, which the prompts are cut from):

- The same prompts, greedy and seeded, through one process and through two that prefill and two that decode, each with
  all experts and each two with half of them: the same text, to the last character.
- The same again while a worker picked at random is killed every few seconds: the same text, no answer lost or failed,
  and no page held by anybody at the end.
- Mixed load on the same cores (arrivals by a Poisson process, long prompts, short answers): one engine on all cores
  beside one worker of each kind on half of them each. What decoding gains in its tail (99th percentile of the time
  between pieces) is the claim; what it costs in time to the first token is told beside it.
"""

import asyncio
import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from pydoc_data.topics import topics
from statistics import median

import httpx
import matplotlib
import torch
from claims.record import Claim, arguments, report
from rich.console import Console
from rich.table import Table

from dsv3.checkpoint.published import save_published
from dsv3.checkpoint.published_folder import is_published_folder
from dsv3.config import ModelConfig
from dsv3.data.tokenizer import Tokenizer
from dsv3.model.transformer import Transformer
from dsv3.runtime.cores import available_cores
from dsv3.serve.load.drive import run_load
from dsv3.serve.load.lengths import Lengths
from dsv3.serve.load.measure import LoadSummary, Outcome, summarise
from dsv3.serve.load.started import started_server
from dsv3.serve.load.workload import LoadConfig

WORK = Path(__file__).parents[1] / "runs" / "deployment"
PICTURE = Path(__file__).parent / "results" / "deployment.png"
TEXT = "\n\n".join(topics.values())
CACHE = ("--cache-tokens", "32768", "--queue-limit", "10000", "--queue-timeout", "600")


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much is done."""

    num_prompts: int
    soak_seconds: float
    kill_every_seconds: float
    """One that shares experts takes its group with it when it is killed, so that those are killed half as often, for
    twice as long."""
    load_seconds: float
    repeats: int
    rate: float
    """Requests a second of the mixed load."""


WHOLE = Sizes(num_prompts=64, soak_seconds=150.0, kill_every_seconds=15.0, load_seconds=60.0, repeats=3, rate=1.2)
QUICK = Sizes(num_prompts=12, soak_seconds=20.0, kill_every_seconds=6.0, load_seconds=12.0, repeats=1, rate=1.2)


def main() -> None:
    options = arguments(__doc__)
    sizes = QUICK if options.quick else WHOLE
    model = str(folder())
    prompts = [prompt(number) for number in range(sizes.num_prompts)]
    one = ["--threads", "1", *CACHE]
    several = ["--threads", "1", "--prefill", "2", "--decode", "2", *CACHE]
    with started_server(model, options=one) as url:
        expected = asyncio.run(answers(url, prompts))
    claims, soaks = [], {}
    for name, more, group in (("", [], 1), (", experts shared", ["--expert-parallel"], 2)):
        slower = replace(
            sizes,
            soak_seconds=sizes.soak_seconds * group,
            kill_every_seconds=sizes.kill_every_seconds * group,
        )
        with started_server(model, options=[*several, *more]) as url:
            apart = asyncio.run(answers(url, prompts))
            soak = soaks[f"2 + 2{name}"] = soak_with_kills(url, prompts, expected=expected, sizes=slower)
        same = sum(ours == theirs for ours, theirs in zip(apart, expected, strict=True))
        claims += [
            Claim(
                name=f"answers of 2 prefill, 2 decode workers{name} that are those of one process, of {len(prompts)}",
                ours=same,
                peer=len(prompts),
                peer_name="one process",
                ratio=same / len(prompts),
                target=1.0,
            ),
            Claim(
                name=f"answers whole and the same while {soak.num_kills} workers{name} are killed, of {soak.num_asked}",
                ours=soak.num_same,
                peer=soak.num_asked,
                peer_name="one process, no kills",
                ratio=soak.num_same / soak.num_asked if soak.pages_held == 0 else 0.0,
                target=1.0,
            ),
        ]
    arms = mixed_load(model, sizes=sizes)
    show(arms)
    draw(arms)
    tail = {name: median(run.gap.p99 for run in runs) for name, runs in arms.items()}
    whole, split = tail.values()
    claims.append(
        Claim(
            name="99th percentile of the time between pieces of text under mixed load, ms",
            ours=1e3 * split,
            peer=1e3 * whole,
            peer_name="one engine, same cores",
            ratio=whole / split,
            target=1.0,
        )
    )
    details = {
        "soak": {name: vars(soak) for name, soak in soaks.items()},
        "mixed_load": {name: [run.as_dict() for run in runs] for name, runs in arms.items()},
        "cores": available_cores(),
    }
    report(claims, title="Prefill and decoding apart", json_file=options.json, details=details)


def folder() -> Path:
    """Return the model's folder; make it if it is not there."""
    place = WORK / "model"
    if not is_published_folder(place):
        tokenizer = Tokenizer.train([TEXT], vocab_size=4000)
        tokenizer.save(WORK / "tokenizer")
        config = ModelConfig(
            vocab_size=tokenizer.vocab_size + 64 - tokenizer.vocab_size % 64,
            hidden_size=512,
            num_hidden_layers=10,
            initializer_range=0.05,
            max_position_embeddings=4096,
            num_attention_heads=8,
            q_lora_rank=192,
            kv_lora_rank=128,
            qk_nope_head_dim=32,
            qk_rope_head_dim=16,
            v_head_dim=32,
            intermediate_size=1408,
            moe_intermediate_size=256,
            first_k_dense_replace=1,
            n_routed_experts=16,
            num_experts_per_tok=4,
            n_group=4,
            topk_group=2,
        )
        made = Transformer(config)
        made.init_weights(generator=torch.Generator().manual_seed(0))
        save_published(made, folder=place, tokenizer_folder=WORK / "tokenizer", dtype=torch.bfloat16, overwrite=True)
    return place


def prompt(number: int) -> dict[str, object]:
    """Return a request: every third one greedy, every fourth one beginning as others do."""
    chance = random.Random(number)
    start = chance.randrange(len(TEXT) - 4000)
    shared = TEXT[:600] if number % 4 == 0 else ""
    return {
        "prompt": shared + TEXT[start : start + chance.randint(40, 2500)],
        "max_tokens": chance.randint(16, 96),
        "temperature": 0.0 if number % 3 == 0 else 1.0,
        "seed": number,
        "ignore_eos": True,
    }


async def answers(url: str, prompts: Sequence[dict[str, object]], *, at_once: int = 8) -> list[str]:
    """Return the texts, or what was said instead."""
    room = asyncio.Semaphore(at_once)

    async def one(client: httpx.AsyncClient, body: dict[str, object]) -> str:
        async with room:
            reply = await client.post(f"{url}/v1/completions", json=body)
            return reply.json()["choices"][0]["text"] if reply.status_code == 200 else f"({reply.text})"

    async with httpx.AsyncClient(timeout=600) as client:
        return await asyncio.gather(*(one(client, body) for body in prompts))


# ---- killed workers ----


@dataclass(kw_only=True)
class Soak:
    """What came of it."""

    num_asked: int = 0
    num_same: int = 0
    num_kills: int = 0
    num_placed_again: float = 0.0
    pages_held: float = 0.0
    seconds: float = 0.0
    others: list[tuple[str, str]] = field(default_factory=list)
    """What was said, and what one process says there, where these are not the same."""


def soak_with_kills(url: str, prompts: Sequence[dict[str, object]], *, expected: Sequence[str], sizes: Sizes) -> Soak:
    """Ask again and again while workers are killed; compare every answer."""
    soak, began = Soak(), time.monotonic()
    with killing(every_seconds=sizes.kill_every_seconds) as killed:
        while time.monotonic() - began < sizes.soak_seconds:
            said = asyncio.run(answers(url, prompts))
            soak.num_asked += len(said)
            soak.others += [(mine, theirs) for mine, theirs in zip(said, expected, strict=True) if mine != theirs]
    soak.seconds = time.monotonic() - began
    soak.num_same = soak.num_asked - len(soak.others)
    soak.num_kills = len(killed)
    deadline = time.monotonic() + 60
    while True:
        numbers = metrics(url)
        soak.pages_held = numbers["dsv3_cache_pages_in_use"]
        is_up = all(value == 1 for name, value in numbers.items() if name.startswith("dsv3_worker_up"))
        if (soak.pages_held == 0 and is_up) or time.monotonic() > deadline:
            break
        time.sleep(0.2)
    soak.num_placed_again = numbers["dsv3_retries_total"]
    return soak


@contextmanager
def killing(*, every_seconds: float) -> Iterator[list[int]]:
    """Kill a worker picked at random every so often."""
    killed: list[int] = []
    is_over = threading.Event()
    chance = random.Random(0)

    def kill() -> None:
        while not is_over.wait(every_seconds):
            listed = subprocess.run(
                ["pgrep", "-f", "dsv3.serve.engine_process"], capture_output=True, text=True, check=False
            )
            if pids := sorted(map(int, listed.stdout.split())):
                victim = chance.choice(pids)
                os.kill(victim, signal.SIGKILL)
                killed.append(victim)

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        yield killed
    finally:
        is_over.set()
        thread.join()


def metrics(url: str) -> dict[str, float]:
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines if not line.startswith("#")}


# ---- the same cores, whole and split ----


def mixed_load(model: str, *, sizes: Sizes) -> dict[str, list[LoadSummary]]:
    """Load one engine and two workers in turns, with the same arrivals; return what was measured each time."""
    cores = available_cores()
    arms = {
        f"one engine, {cores} threads": ["--threads", f"{cores}"],
        f"1 prefill + 1 decode, {max(1, cores // 2)} each": [
            *("--threads", f"{max(1, cores // 2)}", "--prefill", "1", "--decode", "1")
        ],
    }
    load = LoadConfig(
        rate=sizes.rate,
        num_requests=10_000,
        duration_seconds=sizes.load_seconds,
        prompt_tokens=Lengths(low=200, high=1200),
        output_tokens=Lengths(low=32, high=64),
        ignore_end=True,
    )
    measured: dict[str, list[LoadSummary]] = {name: [] for name in arms}
    for turn in range(sizes.repeats):
        for name, options in arms.items():
            with started_server(model, options=[*options, *CACHE]) as url:
                outcomes: list[Outcome] = []
                wanted = replace(load, seed=turn * 1000)
                asyncio.run(run_load(wanted, url=url, text=TEXT, outcomes=outcomes, on_end=lambda: None))
                measured[name].append(summarise(outcomes))
    return measured


ROWS = (
    ("time to first token, median", lambda run: run.time_to_first_token.p50),
    ("time to first token, 99%", lambda run: run.time_to_first_token.p99),
    ("time per token, median", lambda run: run.time_per_token.p50),
    ("time per token, 99%", lambda run: run.time_per_token.p99),
    ("between pieces, 99%", lambda run: run.gap.p99),
    ("whole answer, median", lambda run: run.latency.p50),
)


def show(arms: dict[str, list[LoadSummary]]) -> None:
    """Print milliseconds, medians of the repeats."""
    table = Table(title="Mixed load, milliseconds")
    table.add_column("")
    for name in arms:
        table.add_column(name, justify="right")
    for name, value in ROWS:
        table.add_row(name, *(f"{1e3 * median(value(run) for run in runs):.1f}" for runs in arms.values()))
    whole = [
        f"{sum(run.num_whole for run in runs)} of {sum(run.num_requests for run in runs)}" for runs in arms.values()
    ]
    table.add_row("whole answers", *whole)
    Console(width=120).print(table)


def draw(arms: dict[str, list[LoadSummary]]) -> None:
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 3.6), layout="constrained")
    places = range(len(ROWS))
    for offset, (name, runs) in enumerate(arms.items()):
        values = [1e3 * median(value(run) for run in runs) for _, value in ROWS]
        bars = axes.barh([place + 0.4 * offset for place in places], values, height=0.38, label=name)
        axes.bar_label(bars, fmt="%.0f", padding=3, fontsize=8)
    axes.set_yticks([place + 0.2 for place in places], [name for name, _ in ROWS])
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("milliseconds (median of the repeats)")
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(PICTURE, dpi=130)


if __name__ == "__main__":
    main()
