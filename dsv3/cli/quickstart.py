"""dsv3 quickstart: from text to a small DeepSeek-V3 model that talks, and a report of how it went.

The stages stand in `quickstart_stages`, one after the other; a further one is a function and an entry there.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dsv3.cli.pretrain import greedy_sampler
from dsv3.cli.run_settings import DataOption, MoreData, RunSettings, SetOption, run_settings

if TYPE_CHECKING:
    from dsv3.cli.progress import Progress
    from dsv3.cli.stages import Stage
    from dsv3.config import PretrainConfig
    from dsv3.data.prepared import PreparedCorpus

RECIPE = "tiny"
LENGTHENING_STEPS = 5
"""Of each phase: seconds, and enough to see."""
ROWS_COMPARED = 4
"""Long rows that are read before and after."""
TASK = "arithmetic"
SFT_EPOCHS, SFT_ROWS, SFT_LENGTH, SFT_RATES = 6, 8, 128, (2e-3, 2e-4)
GRPO_ITERATIONS, GRPO_PROBLEMS, GRPO_RATE = 30, 32, 1.2e-4
CLOSING_TOKENS = 120
CLOSING_TEMPERATURE = 0.8
CLOSING_PROMPTS = ("In the beginning", "def")
"""Continued at the end of a run whose settings name no prompts."""


def register(app: typer.Typer) -> None:
    """Add the verb to the command line."""
    app.command("quickstart")(quickstart)


def quickstart(
    more_data: MoreData = None,
    run: Annotated[Path, typer.Option("--run", metavar="FOLDER", help="Folder for everything the run makes.")] = Path(
        "runs/quickstart"
    ),
    data: DataOption = None,
    assignments: SetOption = None,
) -> None:
    """Train a small DeepSeek-V3 from text in minutes, and report on it.

    Builds a corpus, trains a tokenizer, pre-trains recipe `tiny`, scores it beside baselines, lengthens its context,
    teaches it to answer sums (fine-tuning, then GRPO), samples from it and writes report.html. Stopped by Ctrl-C or a
    crash, the same command goes on where it was.
    """
    from rich.console import Console

    from dsv3.cli.progress import Progress, StageState, shown
    from dsv3.cli.stages import run_stages

    wanted = run_settings(RECIPE, more_data=more_data, run=run, data=data, config_file=None, assignments=assignments)
    config = wanted.config
    progress = Progress(
        title=f"dsv3 quickstart: recipe {RECIPE}, in {run}", stages=[], total_tokens=config.total_tokens
    )
    stages = quickstart_stages(config, folder=run, progress=progress)
    progress.stages += [StageState(name=stage.name, title=stage.title) for stage in stages]
    try:
        with shown(progress, console=Console()):
            run_stages(stages, folder=run, settings=flat_settings(config), may_change=may_change, progress=progress)
    except KeyboardInterrupt:
        typer.echo("Stopped; nothing is lost. The same command goes on from here.", err=True)
        raise
    typer.echo(closing_words(run))


def quickstart_stages(config: "PretrainConfig", *, folder: Path, progress: "Progress") -> list["Stage"]:
    """Return the stages in order."""
    from dsv3.cli.stages import Stage

    return [
        Stage(
            name="corpus",
            title="Corpus and tokenizer",
            run=lambda: build_corpus(config, folder=folder, progress=progress),
            is_done=(folder / "corpus" / "corpus.json").exists,
        ),
        Stage(
            name="pretrain",
            title="Pre-training",
            run=lambda: train(config, folder=folder, progress=progress),
            is_done=(folder / "export" / "config.json").exists,
        ),
        Stage(
            name="evaluate",
            title="Evaluation beside the baselines",
            run=lambda: score(config, folder=folder, progress=progress),
            is_done=(folder / "evaluation.json").exists,
        ),
        Stage(
            name="extend",
            title="Longer context, with YaRN",
            run=lambda: lengthen(config, folder=folder, progress=progress),
            is_done=(folder / "extension.json").exists,
        ),
        Stage(
            name="sft",
            title="Answers: fine-tuning on sums",
            run=lambda: teach_answers(config, folder=folder, progress=progress),
            is_done=(folder / "sft" / "export" / "config.json").exists,
        ),
        Stage(
            name="grpo",
            title="Better answers: GRPO",
            run=lambda: reward_answers(folder, progress=progress),
            is_done=(folder / "sft" / "grpo" / "export" / "config.json").exists,
        ),
        Stage(
            name="sample",
            title="Samples",
            run=lambda: draw_samples(config, folder=folder, progress=progress),
            is_done=(folder / "samples.jsonl").exists,
        ),
        Stage(
            name="report",
            title="Report",
            run=lambda: make_report(folder),
            is_done=(folder / "report.html").exists,
        ),
    ]


def build_corpus(config: "PretrainConfig", *, folder: Path, progress: "Progress") -> str:
    """Prepare text and tokenizer."""
    from dsv3.data.prepare import prepare_corpus
    from dsv3.report.data_card import CARD, write_card
    from dsv3.train.run_folder import open_run_folder

    with open_run_folder(folder, config=config):
        corpus = prepare_corpus(config, folder=folder / "corpus", progress=progress.count)
        if (corpus.folder / CARD).is_file():  # A corpus of `dsv3 data prepare` has its own, beside its shards.
            write_card(corpus.folder)
    size = sum(source.bytes for source in corpus.sources) / 1e6
    tokens = sum(source.tokens for source in corpus.sources) / 1e6
    return f"{size:.1f} MB of text, {tokens:.1f}M tokens, vocabulary of {corpus.vocab_size:,}{left_out(corpus)}"


def left_out(corpus: "PreparedCorpus") -> str:
    """Return what is not in the corpus and why, in a few words; the report lists it with names."""
    remarks = [remark for source in corpus.sources for remark in source.skipped]
    words = [f"{sum(remark.count for remark in remarks):,} left out ({', '.join(r.reason for r in remarks)})"]
    words = words if remarks else []
    words += [f"no {absent.name} ({absent.reason})" for absent in corpus.absent]
    return "".join(f"; {word}" for word in words)


def train(config: "PretrainConfig", *, folder: Path, progress: "Progress") -> str:
    """Pre-train, from the newest snapshot if there is one."""
    from dsv3.train.loop import pretrain

    sampler = greedy_sampler(RunSettings(config=config, folder=folder))
    result = pretrain(config, folder=folder, on_event=progress.train, sampler=sampler)
    if result.interrupted:
        raise KeyboardInterrupt
    assert result.finished
    return f"{result.step:,} steps, {result.tokens:,} tokens"


def score(config: "PretrainConfig", *, folder: Path, progress: "Progress") -> str:
    """Score the model and its baselines on the held-out text, and write evaluation.json."""
    from dsv3.data.prepare import load_prepared
    from dsv3.evals.evaluation import evaluate, held_out_text, tokens_read, training_rows
    from dsv3.infer.loaded import FORMAT_OF_TYPE, load
    from dsv3.runtime.atomic import write_json
    from dsv3.runtime.device import set_threads

    set_threads(config.runtime.threads)
    corpus = load_prepared(folder / "corpus")
    loaded = load(folder, weights=FORMAT_OF_TYPE[config.runtime.dtype], device=config.runtime.device, plain=True)
    evaluation = evaluate(
        loaded.model,
        text=held_out_text(corpus, max_tokens=config.evaluation.max_tokens),
        tokenizer=loaded.tokenizer,
        window=config.batch.sequence_length,
        rows=training_rows(corpus, config=config, tokens=tokens_read(folder)),
        progress=progress.count,
    )
    write_json(evaluation.as_dict(), path=folder / "evaluation.json")
    marks = [f"{score.name} {score.bits_per_byte:.2f}" for score in evaluation.baselines if score.name != "xz-alone"]
    return f"{evaluation.model.bits_per_byte:.2f} bits per byte ({', '.join(marks)})"


def lengthen(config: "PretrainConfig", *, folder: Path, progress: "Progress") -> str:
    """Train on over rows eight and 32 times as long, a few steps each, and see how far the model reads then."""
    from dataclasses import replace

    from dsv3.cli.extend import phase_settings
    from dsv3.evals.extension import compare_phases
    from dsv3.recipes.extension import extension
    from dsv3.train.loop import pretrain

    phases = [
        # They are too short to be watched; what came of them is measured after the last one.
        replace(phase, evaluation=replace(phase.evaluation, max_tokens=1, sample_prompts=()))
        for phase in extension(config, steps=LENGTHENING_STEPS)
    ]
    settings = phase_settings(folder, phases=phases, assignments=[])
    for place, phase in enumerate(settings):
        progress.count(f"rows of {phase.config.batch.sequence_length:,} tokens", place, len(settings))
        if pretrain(phase.config, folder=phase.folder).interrupted:
            raise KeyboardInterrupt
    curves = compare_phases(
        folder,
        phases=[phase.folder for phase in settings],
        rows=ROWS_COMPARED,
        device=config.runtime.device,
        progress=progress.count,
    )
    lengths = " and ".join(f"{phase.config.batch.sequence_length:,}" for phase in settings)
    if not curves:
        return f"rows of {lengths} tokens; too little held-out text to compare on"
    before, after = (curves[place].perplexity[-1] for place in (0, -1))
    return f"rows of {lengths} tokens; perplexity at their end {after:,.0f}, and {before:,.0f} before"


def teach_answers(config: "PretrainConfig", *, folder: Path, progress: "Progress") -> str:
    """Fine-tune on sums of three digits, asked and answered in the chat template."""
    from dataclasses import replace

    from dsv3.config.teaching import SftConfig
    from dsv3.posttrain.sft import sft, sft_settings
    from dsv3.posttrain.tasks import task_named
    from dsv3.runtime.atomic import whole_file

    chats = folder / "sums.jsonl"
    with whole_file(chats) as file:
        for problem in task_named(TASK).training:
            answer = {"role": "assistant", "content": problem.answer}
            file.write(json.dumps({"messages": [*problem.messages, answer]}).encode() + b"\n")
    lesson = SftConfig(data=(str(chats),), epochs=SFT_EPOCHS, rows_per_step=SFT_ROWS)
    start = replace(config, batch=replace(config.batch, sequence_length=min(SFT_LENGTH, config.batch.sequence_length)))
    peak, floor = SFT_RATES
    settings = sft_settings(start, lesson=lesson, start_from=folder, peak=peak, floor=floor)
    steps = 0

    def count(record: dict[str, Any]) -> None:
        nonlocal steps
        steps += record["kind"] == "step"
        progress.count("fine-tuning", steps, 0)

    result = sft(settings, lesson=lesson, folder=folder / "sft", on_record=count)
    if result.interrupted:
        raise KeyboardInterrupt
    return f"{sum(map(len, result.rows.rows)):,} sums, {SFT_EPOCHS} times each"


def reward_answers(folder: Path, *, progress: "Progress") -> str:
    """Let the model answer sums of its own accord, and tell it which answers are right."""
    from dataclasses import replace

    from dsv3.config.files import read_config
    from dsv3.config.teaching import GrpoConfig
    from dsv3.posttrain.grpo import grpo, grpo_settings

    lesson = GrpoConfig(
        task=TASK,
        iterations=GRPO_ITERATIONS,
        problems_per_iteration=GRPO_PROBLEMS,
        updates_per_rollout=4,
        max_answer_tokens=8,
        validate_every=max(1, GRPO_ITERATIONS // 3),
    )
    settings = grpo_settings(read_config(folder / "sft" / "config.json"), start_from=folder / "sft", peak=GRPO_RATE)
    settings = replace(settings, batch=replace(settings.batch, micro_batch_sequences=32))
    scores: list[float] = []

    def count(record: dict[str, Any]) -> None:
        if record["kind"] == "grpo_validation":
            scores.append(record["scores"]["answer"])
        else:
            progress.count("answering and learning", record["iteration"], GRPO_ITERATIONS)

    result = grpo(settings, lesson=lesson, folder=folder / "sft" / "grpo", on_record=count)
    if result.interrupted:
        raise KeyboardInterrupt
    begun = f", {scores[0]:.0%} before" if len(scores) > 1 else ""
    return f"{result.scores.get('answer', scores[-1] if scores else 0.0):.0%} of held-out sums right{begun}"


def draw_samples(config: "PretrainConfig", *, folder: Path, progress: "Progress") -> str:
    """Let the finished model continue the prompts at a temperature, and add the texts to samples.jsonl."""
    from dsv3.evals.evaluation import last_step
    from dsv3.infer.loaded import FORMAT_OF_TYPE, load
    from dsv3.runtime.atomic import whole_file

    loaded = load(folder, weights=FORMAT_OF_TYPE[config.runtime.dtype], device=config.runtime.device)
    prompts = config.evaluation.sample_prompts or CLOSING_PROMPTS
    step = last_step(folder)["step"]
    drawn = []
    for place, prompt in enumerate(prompts):
        progress.count("drawing samples", place, len(prompts))
        text = loaded.generate(
            prompt, max_tokens=CLOSING_TOKENS, temperature=CLOSING_TEMPERATURE, seed=config.runtime.seed
        )
        drawn.append({"step": step, "prompt": prompt, "text": text, "temperature": CLOSING_TEMPERATURE})
    path = folder / "samples.jsonl"
    earlier = path.read_text(encoding="utf-8").split("\n") if path.exists() else []
    kept = [line for line in earlier if line and '"temperature"' not in line]
    with whole_file(path) as file:
        for line in [*kept, *(json.dumps(sample, ensure_ascii=False) for sample in drawn)]:
            file.write(line.encode() + b"\n")
    return f"{len(drawn)} continuations, in samples.jsonl"


def make_report(folder: Path) -> str:
    """Write report.html."""
    from dsv3.report.page import write_report

    return str(write_report(folder))


def flat_settings(config: "PretrainConfig") -> dict[str, Any]:
    """Return every setting by its dotted name, as JSON would give it back."""
    from dsv3.config.files import to_dict

    flat: dict[str, Any] = {}

    def walk(values: dict[str, Any], path: str) -> None:
        for key, value in values.items():
            if isinstance(value, dict):
                walk(value, f"{path}{key}.")
            else:
                flat[f"{path}{key}"] = value

    walk(json.loads(json.dumps(to_dict(config))), "")
    return flat


def may_change(name: str, done: set[str]) -> bool:
    """Whether a setting may differ from the earlier sitting: what a resumed training may change, until it is done."""
    from dsv3.train.run_folder import FREE_GROUPS, FREE_TO_CHANGE

    return "pretrain" not in done and (name in FREE_TO_CHANGE or name.startswith(FREE_GROUPS))


def closing_words(folder: Path) -> str:
    """Say what there is now, and how to go on."""
    return (
        f"\nThe report, with pictures:  {folder / 'report.html'}\n"
        f"Talk to the model:          dsv3 chat {folder}\n"
        f"Ask it for sums (3 + 4 + 5): dsv3 chat {folder / 'sft' / 'grpo'}\n"
        f'Let it continue a text:     dsv3 generate {folder} --prompt "In the beginning"\n'
        f"Train on your own text:     dsv3 quickstart --run runs/mine --data PATH"
    )
