"""Claim: experts that move to where they are needed let two processes that share them read prompts faster.

A model of V3's shape with 32 experts a layer is trained on English, Chinese and Python, balanced as in the report. Two
processes that share its experts then read prompts of one kind alone, which it was not trained on: experts in order,
beside experts placed by load with 0, 12.5% and 25% copies; servers of all four by turns, and of each the median. The
ratio is of prompt tokens read a second. The largest load of a process beside the mean is told too: what experts
compute should take that much less time once they are placed, and all else as long as before.
Chinese comes from the folder of real data, without which nothing is measured.
"""

import asyncio
import re
import subprocess
import sys
import time
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import matplotlib
from capacity import DATA, texts
from claims.record import Claim, arguments, report
from rich.console import Console
from rich.table import Table

from dsv3.serve.load.started import started_server

RUN = Path(__file__).parents[1] / "runs" / "moved_experts"
TRAINED_CHARACTERS = 400_000
"""Of each kind of text; prompts come from what is behind them."""
PROMPT_CHARACTERS = 1500
NUM_EXPERTS = 32
AT_ONCE = 8
LOOK_SECONDS = 2.0
SETTLE_SECONDS = 6.0
MODEL = {
    "hidden_size": 256,
    "moe_intermediate_size": 256,
    "n_routed_experts": NUM_EXPERTS,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
}
ARMS = {
    "in order": (),
    "placed": ("--rebalance-seconds", LOOK_SECONDS),
    "placed, 12.5% copies": ("--rebalance-seconds", LOOK_SECONDS, "--redundant-experts", NUM_EXPERTS // 8),
    "placed, 25% copies": ("--rebalance-seconds", LOOK_SECONDS, "--redundant-experts", NUM_EXPERTS // 4),
}


def main() -> None:
    options = arguments(__doc__, picture="draw what was read here")
    if not (DATA / "wikitext2").is_dir():
        sys.exit(f"nothing was measured: {DATA} has the texts, and is not here")
    kinds = ("chinese",) if options.quick else ("chinese", "python")
    repeats, seconds = (1, 8.0) if options.quick else (3, 10.0)
    train(tokens=100_000 if options.quick else 300_000)
    found: dict[str, dict[str, list[dict[str, float]]]] = {kind: {arm: [] for arm in ARMS} for kind in kinds}
    for _ in range(repeats):
        for kind in kinds:
            for arm, settings in ARMS.items():
                found[kind][arm].append(read_prompts(texts()[kind][TRAINED_CHARACTERS:], settings, seconds=seconds))
    rows = {kind: {arm: medians(runs) for arm, runs in arms.items()} for kind, arms in found.items()}
    show(rows)
    if options.picture is not None:
        draw(rows, file=options.picture)
    claims = [
        Claim(
            name=f"prompt tokens a second of two processes, {kind} alone, experts {arm}",
            ours=ours["tokens_per_second"],
            peer=arms["in order"]["tokens_per_second"],
            peer_name="in order",
            ratio=ours["tokens_per_second"] / arms["in order"]["tokens_per_second"],
            target=1.0,
        )
        for kind, arms in rows.items()
        for arm, ours in arms.items()
        if arm != "in order"
    ]
    report(claims, title="Experts that move", json_file=options.json, details={"medians": rows, "all": found})


def train(*, tokens: int) -> None:
    """Train the model; a run that is there goes on to so many tokens, or is left as it is."""
    RUN.mkdir(parents=True, exist_ok=True)
    files = []
    for name, text in texts().items():
        files.append(RUN / f"{name}.txt")
        files[-1].write_text(text[:TRAINED_CHARACTERS])
    settings = [f"model.{name}={value}" for name, value in MODEL.items()]
    settings += [f"total_tokens={tokens}", "runtime.dtype=float32"]
    command = ["pretrain", "tiny", "--run", RUN / f"run-{tokens}", "--data", *files]
    command += [word for setting in settings for word in ("--set", setting)]
    done = subprocess.run([sys.executable, "-m", "dsv3.cli.main", *map(str, command)], check=False)
    if done.returncode:
        sys.exit("the model could not be trained")
    (RUN / "trained").unlink(missing_ok=True)
    (RUN / "trained").symlink_to(f"run-{tokens}")


def read_prompts(text: str, settings: tuple[object, ...], *, seconds: float) -> dict[str, float]:
    """Let a fresh server see such prompts for a while, then time it; return tokens a second and its load's balance."""
    options = ["--threads", 1, "--prefill", 2, "--decode", 1, "--expert-parallel", *settings]
    prompts = cycle(
        text[start : start + PROMPT_CHARACTERS] for start in range(0, len(text) - PROMPT_CHARACTERS, PROMPT_CHARACTERS)
    )
    words = [*map(str, options), "--weights", "fp32", "--no-prefix-caching", "--cache-tokens", "32768"]
    with started_server(str(RUN / "trained"), options=words) as url:
        asyncio.run(ask(url, prompts, seconds=SETTLE_SECONDS))
        before = loads(url)
        began = time.perf_counter()
        tokens = asyncio.run(ask(url, prompts, seconds=seconds))
        passed = time.perf_counter() - began
        after = loads(url)
    rows = [now - then for now, then in zip(after, before, strict=True)]
    return {"tokens_per_second": tokens / passed, "largest_over_mean": max(rows) * len(rows) / sum(rows)}


async def ask(url: str, prompts: Any, *, seconds: float) -> int:
    """Ask for one token after each prompt, a few at once; return how many tokens of prompts were read."""
    end = time.perf_counter() + seconds

    async def one(client: httpx.AsyncClient) -> int:
        read = 0
        while time.perf_counter() < end:
            body = {"prompt": next(prompts), "max_tokens": 1, "temperature": 0.0}
            answer = await client.post(f"{url}/v1/completions", json=body)
            read += answer.raise_for_status().json()["usage"]["prompt_tokens"]
        return read

    async with httpx.AsyncClient(timeout=120) as client:
        return sum(await asyncio.gather(*(one(client) for _ in range(AT_ONCE))))


def loads(url: str) -> list[float]:
    """Return the rows that each process's experts have computed so far, of those that read prompts."""
    text = httpx.get(f"{url}/metrics").text
    return [
        float(rows) for rows in re.findall(r'^dsv3_expert_rows_total\{[^}]*"prefill-\d+"[^}]*\} (\S+)$', text, re.M)
    ]


def medians(runs: list[dict[str, float]]) -> dict[str, float]:
    return {name: median(run[name] for run in runs) for name in runs[0]}


def show(rows: dict[str, dict[str, dict[str, float]]]) -> None:
    table = Table(title="Two processes that share experts, prompts of one kind", box=None)
    for name in ("text", "experts", "largest load / mean", "tokens/s", "to in order"):
        table.add_column(name, justify="left" if name in ("text", "experts") else "right")
    for kind, arms in rows.items():
        first = arms["in order"]["tokens_per_second"]
        for arm, row in arms.items():
            speed = row["tokens_per_second"]
            table.add_row(kind, arm, f"{row['largest_over_mean']:.3f}", f"{speed:,.0f}", f"{speed / first:.3f}")
    Console(width=100).print(table)


def draw(rows: dict[str, dict[str, dict[str, float]]], *, file: Path) -> None:
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for axes, name, title in (
        (left, "largest_over_mean", "largest load of a process / mean"),
        (right, "tokens_per_second", "prompt tokens a second"),
    ):
        for offset, arm in enumerate(ARMS):
            places = [place + 0.2 * offset for place in range(len(rows))]
            axes.bar(places, [arms[arm][name] for arms in rows.values()], width=0.18, label=arm)
        axes.set_xticks([place + 0.3 for place in range(len(rows))], list(rows))
        axes.set_title(title, fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    left.set_ylim(bottom=0.9)
    left.legend(frameon=False, fontsize=8)
    figure.savefig(file, dpi=130)


if __name__ == "__main__":
    main()
