"""Needles in a haystack in small: short rows, an extension with YaRN, and questions far beyond (report 4.3, Figure 8).

A model of 4 layers learns to look back from lists of words that go round and round and is pre-trained on rows of 128
tokens of facts stated again and again, of documents of recall and of real text (`dsv3/data/recall.py`). It is extended
as by `dsv3 extend` to 1,024 and 8,192 tokens. Its vocabulary is real text's, so that most words are one token, and
numbers are written digit by digit.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from dsv3.config import (
    BalanceConfig,
    BatchConfig,
    DataConfig,
    EvaluationConfig,
    LearningRateConfig,
    OptimConfig,
    PretrainConfig,
    SourceConfig,
)
from dsv3.data.prepare import prepare_corpus
from dsv3.data.prepared import load_prepared
from dsv3.evals.evaluation import held_out_text
from dsv3.evals.needle import GRID, NeedleResult, find_needles
from dsv3.infer.loaded import load
from dsv3.recipes import tiny
from dsv3.recipes.extension import extension
from dsv3.recipes.milestones import learning_rate, milestones
from dsv3.report.needle import draw_needles
from dsv3.reproduce.experiment import Ask, Outcome, Picture
from dsv3.reproduce.finding import Limit, Order
from dsv3.reproduce.training import train_to_the_end
from dsv3.train.run_folder import lend_corpus

GENERATED, REAL = ("cycles", "facts", "recall"), ("bible", "shakespeare", "stdlib")
"""Sources that are made up, and those that are not, from which the tokenizer comes."""
CYCLES_WEIGHTS = (0.86, 0.10, 0.01, 0.01, 0.01, 0.01)
BASE_WEIGHTS = (0.05, 0.65, 0.08, 0.07, 0.07, 0.08)
EXTENSION_WEIGHTS = (0.02, 0.13, 0.55, 0.10, 0.10, 0.10)
CYCLES_TOKENS, BASE_TOKENS = 5_000_000, 10_000_000
CYCLES_RATE, BASE_RATE = 3e-3, 2e-3
TRAINED, LENGTHS = 128, (1024, 8192)
EXTENSION_ROWS, EXTENSION_STEPS, EXTENSION_RATES = (6, 2), (400, 110), (1e-3, 5e-4)
"""By phase; the rate rises, stays and falls to a tenth, since weights that were only just learned would not settle at
one that stays, as the report's do."""
RANKS = 2
"""That share a step, where there are cores for them."""
BEFORE_GRID = 5
"""Of lengths and depths, where hardly a needle is found: all else would take as long as after it."""
FOUND = 0.95
"""Share of needles, of what the report shows as all green."""


def run(ask: Ask) -> Outcome:
    """Train, extend, and look for needles before and after."""
    base, phases = train(ask.folder, quick=False)
    hay = haystack(real_text(base, tokens=8 * LENGTHS[-1]))
    grids: dict[str, NeedleResult] = {}
    for name, folder, size in (("before", base, BEFORE_GRID), ("after", phases[-1], GRID)):
        model = load(folder, weights="fp32", device="cpu")
        grids[name] = find_needles(model, haystack=hay, longest=LENGTHS[-1], size=size)
        draw_needles(grids[name], file=ask.folder / f"niah-{name}.png", title=f"{name} the extension")
        ask.tell(f"{name} the extension: {grids[name].score:.1%} of needles found")
    return Outcome(
        findings=(
            Limit(
                claim=f"needles found over the whole grid up to {LENGTHS[-1]:,} tokens, pre-trained on {TRAINED}",
                report="all, at 15 depths of 15 lengths up to 128K (Figure 8)",
                bound=FOUND,
                at_least=True,
                values=(grids["after"].score,),
            ),
            Order(
                claim="needles found: before the extension below after it",
                report="what the extension is for (4.3)",
                lower=(grids["before"].score,),
                higher=(grids["after"].score,),
            ),
        ),
        pictures=tuple(
            Picture(file=f"niah-{name}.png", caption=f"Needles found {name} the extension.") for name in grids
        ),
        settings={"pre-trained": TRAINED, "extended": list(LENGTHS), "steps": list(EXTENSION_STEPS)},
        data={name: grid.as_dict() for name, grid in grids.items()},
        remark="The needles are ours, since the report's are not published, and the model has been taught their forms "
        "with other words, names and numbers (docs/long-context.md).",
    )


def real_text(run: Path, *, tokens: int) -> dict[str, list[list[int]]]:
    """Return held-out documents of real text by source: in documents of recall other needles lie about."""
    documents = held_out_text(load_prepared(run / "corpus"), max_tokens=tokens).documents
    return {name: texts for name, texts in documents.items() if name in REAL}


def haystack(documents: Mapping[str, Sequence[Sequence[int]]]) -> list[int]:
    """Return the tokens of documents in a row, without those that begin each."""
    return [token for texts in documents.values() for text in texts for token in text[1:]]


def config_for(name: str, *, quick: bool) -> PretrainConfig:
    """Return the settings of the run on cycles or of pre-training: V3's shape and recipe in very small."""
    is_base = name == "base"
    tokens = 400_000 if quick else BASE_TOKENS if is_base else CYCLES_TOKENS
    length, rows = (TRAINED, 48) if is_base else (TRAINED // 2, 64)
    start, scaled = tiny(), milestones(tokens)
    rate = learning_rate(BASE_RATE if is_base else CYCLES_RATE, total_tokens=tokens, warmup_steps=50)
    weights = BASE_WEIGHTS if is_base else CYCLES_WEIGHTS
    return replace(
        start,
        recipe="",
        total_tokens=tokens,
        model=replace(
            start.model,
            num_hidden_layers=4,
            q_lora_rank=128,
            kv_lora_rank=128,
            qk_nope_head_dim=48,
            v_head_dim=64,  # A word that is copied must come through one head whole.
            intermediate_size=256,
            n_routed_experts=8,
            num_experts_per_tok=2,
            num_nextn_predict_layers=0,
            max_position_embeddings=LENGTHS[-1],  # It may be asked there, though it has not been trained there.
        ),
        data=data(GENERATED + REAL, weights=weights),
        batch=BatchConfig(sequence_length=length, micro_batch_sequences=rows // RANKS).steady(rows),
        optim=OptimConfig(learning_rate=rate, ema_decay=0.995),
        balance=BalanceConfig(bias_update_speed=2e-3, bias_freeze_tokens=scaled.bias_freeze_tokens),
        evaluation=EvaluationConfig(every_steps=500, max_tokens=20_000),
    )


def data(names: Sequence[str], *, weights: Sequence[float]) -> DataConfig:
    """Return sources, mixed so."""
    sources = (
        SourceConfig(path=f"builtin://{name}", name=name, weight=weight)
        for name, weight in zip(names, weights, strict=True)
    )
    return DataConfig(sources=tuple(sources), held_out_rate=0.02, fim_rate=0.0)


def train(folder: Path, *, quick: bool) -> tuple[Path, list[Path]]:
    """Train what has not been trained yet; return the pre-trained run and the phases of its extension."""
    folder = folder.resolve()  # The settings say where the tokenizer is, and must say it alike from anywhere.
    cycles, base = (config_for(name, quick=quick) for name in ("cycles", "base"))
    prepare_corpus(replace(base, data=data(REAL, weights=(0.4, 0.3, 0.3))), folder=folder / "text")
    cycles, base = (with_tokenizer(config, folder=folder / "text" / "tokenizer") for config in (cycles, base))
    prepare_corpus(base, folder=folder / "corpus")
    for name in ("cycles", "base"):
        lend_corpus(Path("..") / "corpus", folder=folder / name)
    train_to_the_end(cycles, folder=folder / "cycles", ranks=RANKS)
    base = replace(base, start_from=str(folder / "cycles"))
    train_to_the_end(base, folder=folder / "base", ranks=RANKS)
    phases = [folder / "base"]
    for phase in phases_after(base, quick=quick):
        place = folder / "base" / f"extended-{phase.batch.sequence_length}"
        lend_corpus(Path("..") / "corpus", folder=place)
        train_to_the_end(replace(phase, start_from=str(phases[-1].absolute())), folder=place, ranks=RANKS)
        phases.append(place)
    return phases[0], phases[1:]


def phases_after(base: PretrainConfig, *, quick: bool) -> list[PretrainConfig]:
    """Return the settings of the phases of the extension, each but for where it starts from."""
    longer = replace(base, data=replace(base.data, sources=data(GENERATED + REAL, weights=EXTENSION_WEIGHTS).sources))
    phases = []
    for number, (rows, all_steps, rate) in enumerate(
        zip(EXTENSION_ROWS, EXTENSION_STEPS, EXTENSION_RATES, strict=True)
    ):
        steps = 4 if quick else all_steps
        phase = extension(longer, lengths=LENGTHS, steps=steps, learning_rate=rate)[number]
        tokens = rows * LENGTHS[number] * steps
        phases.append(
            replace(
                phase,
                total_tokens=tokens,
                batch=phase.batch.steady(rows),
                optim=replace(
                    phase.optim,
                    learning_rate=LearningRateConfig(
                        peak=rate,
                        warmup_steps=steps // 20,
                        constant_until_tokens=tokens // 3,
                        cosine_until_tokens=tokens,
                        cosine_floor=rate / 10,
                        hold_until_tokens=tokens,
                        final=rate / 10,
                    ),
                ),
            )
        )
    return phases


def with_tokenizer(config: PretrainConfig, *, folder: Path) -> PretrainConfig:
    """Return the settings with the tokenizer of a folder."""
    return replace(config, data=replace(config.data, tokenizer=str(folder)))
