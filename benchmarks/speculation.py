"""Claim: MTP drafts make more than one token a pass, and weights in fewer bits cost next to nothing in quality.

A model that has been trained is needed, since untrained drafts are never right: 12 layers of hidden 256 with 16
experts, on 3.7 M tokens of recipe `tiny`'s corpus (26 minutes on two quiet cores; `runs/speculation` keeps it, and a
call that was stopped goes on). It then continues beginnings of held-out documents, 128 tokens each, greedily and by
drawing, one request at a time and eight at once, with 0 to 3 drafts and with adaptive lengths, in turns; the median
over the rounds counts. Answers with drafts are compared with those without: they are the same.

Speed is that of the whole engine beside itself without drafts: in C++ over weights in int8, and with the model that
trains, where a pass costs much the same for one token and for several. Bits per byte are of the run's held-out text,
scored through the engine in each format.
"""

import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from claims.record import Claim, arguments, report
from rich.console import Console
from rich.table import Table

from dsv3.config import EngineConfig
from dsv3.config.override import apply_overrides
from dsv3.data.prepared import load_prepared
from dsv3.evals.evaluation import evaluate, held_out_text
from dsv3.infer.loaded import LoadedModel, load
from dsv3.recipes import tiny
from dsv3.reproduce.acceptance import answer
from dsv3.train.loop import pretrain

DEEP = {
    "model.num_hidden_layers": "12",
    "model.hidden_size": "256",
    "model.q_lora_rank": "96",
    "model.kv_lora_rank": "64",
    "model.intermediate_size": "768",
    "model.moe_intermediate_size": "128",
    "model.initializer_range": "0.03",
    "optim.learning_rate.peak": "2e-3",
    "mtp.late_weight": "0.3",
}
FOLDER = Path(__file__).parents[1] / "runs" / "speculation"
QUICK_STEPS = 100
"""Of `tiny` itself."""
FORMATS = ("fp32", "bf16", "fp8", "int8", "int4")
SPEED_TARGET = 1.5
LOSS_LIMIT = 1.005
"""How many times the bits of FP32 a format may need."""
PROMPT_TOKENS, ANSWER_TOKENS = 32, 128


@dataclass(frozen=True)
class Setting:
    """How an engine drafts."""

    drafts: int
    adaptive: bool = False

    def __str__(self) -> str:
        return f"up to {self.drafts}, adaptive" if self.adaptive else f"{self.drafts} drafts"


@dataclass(frozen=True, kw_only=True)
class Result:
    """What one setting gave."""

    runner: str
    setting: str
    at_once: int
    temperature: float
    tokens_per_second: float
    tokens_per_step: float
    speed_up: float
    """Beside no drafts, in the same rounds."""
    acceptance: list[float]
    """Of the first draft, of the second if the first was right, and so on."""


SETTINGS = (Setting(0), Setting(1), Setting(2), Setting(3), Setting(3, adaptive=True))


def main() -> None:
    options = arguments(__doc__)
    folder = FOLDER.with_name("speculation_quick") if options.quick else FOLDER
    settings = {} if options.quick else DEEP
    config = apply_overrides(tiny(), assignments=[f"{name}={value}" for name, value in settings.items()])
    pretrain(config, folder=folder, stop_after_steps=QUICK_STEPS if options.quick else None)
    prompts = beginnings(folder, count=8)
    rounds = 1 if options.quick else 5
    results: list[Result] = []
    for name, model in (
        ("C++, int8", load(folder, weights="int8", device="cpu")),
        ("the model that trains", load(folder, weights="fp32", device="cpu", plain=True)),
    ):
        for at_once, temperature in ((1, 0.0),) if options.quick else ((1, 0.0), (1, 0.8), (8, 0.0)):
            results += compare(
                model, name=name, prompts=prompts, at_once=at_once, temperature=temperature, rounds=rounds
            )
    bits = {name: bits_per_byte(folder, weights=name) for name in FORMATS}
    console = Console(width=140)
    console.print(table(results))
    console.print("bits per byte: " + ", ".join(f"{name} {value:.4f}" for name, value in bits.items()))
    report(
        claims_of(results, bits=bits),
        title="Speculation and formats",
        json_file=options.json,
        details={"results": [asdict(one) for one in results], "bits_per_byte": bits, "settings": settings},
    )


def beginnings(folder: Path, *, count: int) -> list[list[int]]:
    """Return the first tokens of held-out documents, begin token first."""
    text = held_out_text(load_prepared(folder / "corpus"), max_tokens=30_000)
    documents = [document for of_source in text.documents.values() for document in of_source]
    long = [document[:PROMPT_TOKENS] for document in documents if len(document) >= 2 * PROMPT_TOKENS]
    step = max(1, len(long) // count)
    return long[::step][:count]


def compare(
    model: LoadedModel, *, name: str, prompts: list[list[int]], at_once: int, temperature: float, rounds: int
) -> list[Result]:
    """Let all settings answer all prompts, in turns."""
    engines = {
        setting: model.new_engine(
            EngineConfig(max_drafts=setting.drafts, adaptive_drafts=setting.adaptive, prefix_caching=False),
            cache_tokens=at_once * 4 * (PROMPT_TOKENS + ANSWER_TOKENS),
        )
        for setting in SETTINGS
    }
    seconds: dict[Setting, list[float]] = defaultdict(list)
    steps: dict[Setting, int] = {}
    expected: dict[str, list[int]] = {}
    for number in range(rounds + 1):
        for setting, engine in engines.items():
            before = engine.stats().num_steps
            # Engines of one model share its runner, and so its pages.
            model.runner.make_pages(num_pages=engine.config.num_pages, page_tokens=engine.config.page_tokens)
            began = time.perf_counter()
            answers = answer(
                engine,
                prompts=prompts,
                at_once=at_once,
                temperature=temperature,
                seed=number,
                tokens=ANSWER_TOKENS,
            )
            if number:
                seconds[setting].append(time.perf_counter() - began)
            steps[setting] = engine.stats().num_steps - before
            if setting == SETTINGS[0]:
                expected = answers
            assert name != "C++, int8" or answers == expected, f"{setting} changed an answer"
    plain = median(seconds[SETTINGS[0]])
    tokens = len(prompts) * ANSWER_TOKENS
    return [
        Result(
            runner=name,
            setting=str(setting),
            at_once=at_once,
            temperature=temperature,
            tokens_per_second=tokens / median(seconds[setting]),
            tokens_per_step=tokens / steps[setting] / at_once,
            speed_up=plain / median(seconds[setting]),
            acceptance=[
                accepted / max(1, drafted)
                for accepted, drafted in zip(engine.stats().accepted_at, engine.stats().drafted_at, strict=True)
            ],
        )
        for setting, engine in engines.items()
    ]


def bits_per_byte(folder: Path, *, weights: str) -> float:
    loaded = load(folder, weights=weights, device="cpu")
    text = held_out_text(load_prepared(folder / "corpus"), max_tokens=30_000)
    found = evaluate(loaded.runner, text=text, tokenizer=loaded.tokenizer, window=loaded.trained_length, rows=None)
    return found.model.bits_per_byte


def claims_of(results: list[Result], *, bits: Mapping[str, float]) -> list[Claim]:
    claims = []
    for runner in dict.fromkeys(one.runner for one in results):
        here = [one for one in results if one.runner == runner and one.at_once == 1 and one.temperature == 0]
        best = max(here[1:], key=lambda one: one.speed_up)
        claims.append(
            Claim(
                name=f"MTP, batch 1, {runner}: {best.setting}, {best.tokens_per_step:.2f} tokens a step",
                ours=best.tokens_per_second,
                peer=here[0].tokens_per_second,
                peer_name="our own plain decoding, tokens a second",
                ratio=best.speed_up,
                target=SPEED_TARGET,
            )
        )
    for name in ("int8", "int4"):
        claims.append(
            Claim(
                name=f"bits per byte with weights in {name}",
                ours=bits[name],
                peer=bits["fp32"] * LOSS_LIMIT,
                peer_name=f"fp32, x {LOSS_LIMIT}",
                ratio=bits["fp32"] * LOSS_LIMIT / bits[name],
                target=1.0,
            )
        )
    return claims


def table(results: list[Result]) -> Table:
    shown = Table(title="MTP drafts")
    for column in ("runner", "at once", "temperature", "setting", "tokens/s", "speed-up", "tokens a step", "accepted"):
        shown.add_column(column, justify="left" if column in ("runner", "setting", "accepted") else "right")
    for one in results:
        accepted = " ".join(f"{share:.2f}" for share in one.acceptance)
        shown.add_row(
            one.runner,
            str(one.at_once),
            f"{one.temperature:g}",
            one.setting,
            f"{one.tokens_per_second:,.0f}",
            f"{one.speed_up:.2f}",
            f"{one.tokens_per_step:.2f}",
            accepted,
        )
    return shown


if __name__ == "__main__":
    main()
