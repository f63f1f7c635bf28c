import json
import logging
import os
import random
import signal
from pathlib import Path

import pytest
import torch

from dsv3.checkpoint.published import load_published
from dsv3.cli.main import main
from dsv3.cli.run_settings import run_settings
from dsv3.config import SourceConfig
from dsv3.config.files import read_config, write_config
from dsv3.errors import ConfigError
from dsv3.recipes import tiny
from dsv3.train.event import TrainEvent

SMALL = [
    "total_tokens=1024",
    "model.hidden_size=32",
    "model.num_hidden_layers=2",
    "model.vocab_size=320",
    "model.num_attention_heads=2",
    "model.n_routed_experts=8",
    "model.num_experts_per_tok=2",
    "batch.sequence_length=32",
    "batch.start_sequences=4",
    "batch.final_sequences=4",
    "batch.multiple_of=4",
    "evaluation.every_steps=4",
    "evaluation.sample_tokens=4",
    "evaluation.max_tokens=300",
    'evaluation.sample_prompts=["The sea "]',
    "snapshot.every_steps=3",
    "data.held_out_rate=0.2",
    "runtime.threads=1",
]
SETTINGS = [word for assignment in SMALL for word in ("--set", assignment)]


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    chance = random.Random(0)
    words = ["the sea", "is wide", "and a", "small boat", "sails", "over it", "by night", "and rain", "rise"]
    for number in range(50):
        (folder / f"{number:02}.txt").write_text(f"Story {number}. {' '.join(chance.choices(words, k=60))}.\n")
    (folder / "empty.txt").write_text("")
    (folder / "picture.txt").write_bytes(bytes(range(256)) * 8)
    (folder / "broken.jsonl").write_text('{"text": "a line that is whole"}\n{"text": "one that is\n')
    return folder


@pytest.fixture(autouse=True)
def _quiet_afterwards():
    """Leave log and threads as they were: the command line sets both for the whole process."""
    logger = logging.getLogger("dsv3")
    before, threads = (logger.handlers[:], logger.propagate, logger.level), torch.get_num_threads()
    yield
    logger.handlers[:], logger.propagate = before[0], before[1]
    logger.setLevel(before[2])
    torch.set_num_threads(threads)


def run(*words: str) -> int:
    with pytest.raises(SystemExit) as left:
        main(list(words))
    assert isinstance(left.value.code, int)
    return left.value.code


def kinds(folder: Path) -> list[str]:
    return [json.loads(line)["kind"] for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def test_one_command_trains_a_recipe_on_a_folder_of_text(texts: Path, tmp_path: Path, capfd: pytest.CaptureFixture):
    folder = tmp_path / "run"
    assert run("pretrain", "tiny", "--data", str(texts), "--run", str(folder), *SETTINGS) == 0
    told = capfd.readouterr().out
    assert "finished after 8 steps and 1,024 tokens" in told
    assert f"dsv3 chat {folder}" in told
    model = load_published(folder / "export", dtype=torch.float32, device="cpu")
    assert model.config.hidden_size == 32
    assert kinds(folder).count("sample") == kinds(folder).count("validation") == 2
    assert read_config(folder / "config.json").data.sources == (SourceConfig(path=str(texts)),)

    assert run("pretrain", "tiny", "--data", str(texts), "--run", str(folder), *SETTINGS) == 0
    assert kinds(folder).count("step") == 8


def test_ctrl_c_saves_and_the_folder_alone_is_enough_to_go_on(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
):
    folder = tmp_path / "a run"
    from dsv3.cli.progress import Progress

    original = Progress.train

    def interrupt(self: Progress, event: TrainEvent) -> None:
        original(self, event)
        if event.kind == "step" and event.step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Progress, "train", interrupt)
        assert run("pretrain", "tiny", "--data", str(texts), "--run", str(folder), *SETTINGS) == 130
    told = capfd.readouterr()
    assert (
        f"stopped and saved after step 2; go on with the same command, or with: dsv3 pretrain --run '{folder}'"
        in told.err
    )
    assert "[train] stopped" in told.out
    assert [path.name for path in (folder / "snapshots").iterdir()] == ["step-000002"]

    assert run("pretrain", "--run", str(folder)) == 0
    assert kinds(folder).count("step") == 8
    assert kinds(folder).count("resume") == 1


def test_a_changed_setting_is_refused_in_one_line(texts: Path, tmp_path: Path, capfd: pytest.CaptureFixture):
    write_config(tiny(), path=tmp_path / "config.json")
    (tmp_path / "snapshots" / "step-000001").mkdir(parents=True)
    assert run("pretrain", "--run", str(tmp_path), "--set", "optim.beta2=0.5") == 2
    told = capfd.readouterr().err
    assert told.startswith("error: the run in")
    assert "optim.beta2 was 0.95 and is now 0.5" in told
    assert told.count("\n") == 1


def test_a_run_folder_that_cannot_be_written_is_said_in_one_line(tmp_path: Path, capfd: pytest.CaptureFixture):
    (tmp_path / "file").write_text("")
    assert run("pretrain", "tiny", "--run", str(tmp_path / "file" / "run")) == 2
    assert capfd.readouterr().err.startswith("error: cannot write to the run folder")


def test_prepare_says_what_is_in_the_corpus_and_what_is_not(texts: Path, tmp_path: Path, capfd: pytest.CaptureFixture):
    folder = tmp_path / "run"
    assert run("prepare", "tiny", "--data", str(texts), "--run", str(folder), *SETTINGS) == 0
    told = capfd.readouterr().out
    assert "held out for validation" in told
    assert "skipped 1: binary file (picture.txt)" in told
    assert "empty.txt" in told
    assert "broken.jsonl" in told
    assert (folder / "corpus" / "corpus.json").exists()
    assert not (folder / "snapshots").exists()


def settings_of(*words: str, **options: object):
    recipe, *more = words or (None,)
    defaults = {"run": None, "data": None, "config_file": None, "assignments": None}
    return run_settings(recipe, more_data=list(more), **{**defaults, **options})


def test_a_recipe_runs_in_a_folder_of_its_name():
    assert settings_of("tiny").folder == Path("runs/tiny")
    assert settings_of("tiny").config == tiny()


def test_data_takes_several_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    found = settings_of("tiny", "more", "hf://NAME", data=["texts"])
    paths = [source.path for source in found.config.data.sources]
    assert paths == [str(tmp_path / "texts"), str(tmp_path / "more"), "hf://NAME"]


def test_the_config_of_a_run_repeats_it(tmp_path: Path):
    config = settings_of("small", assignments=["runtime.seed=5"]).config
    write_config(config, path=tmp_path / "config.json")
    assert settings_of(config_file=tmp_path / "config.json").config == config
    assert settings_of(run=tmp_path).config == config
    changed = settings_of(config_file=tmp_path / "config.json", assignments=["runtime.seed=6"])
    assert changed.config.runtime.seed == 6


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "which run"),
        (("tniy",), "did you mean 'tiny'"),
        (("tiny", "texts"), "'texts' after the recipe cannot be obeyed; text to train on is given as --data"),
    ],
)
def test_words_that_mean_no_run_are_refused(words: tuple[str, ...], message: str):
    with pytest.raises(ConfigError, match=message):
        settings_of(*words)


def test_a_recipe_and_a_file_of_settings_are_not_both_obeyed(tmp_path: Path):
    write_config(tiny(), path=tmp_path / "config.json")
    with pytest.raises(ConfigError, match="both 'tiny' and --config cannot be obeyed"):
        settings_of("tiny", config_file=tmp_path / "config.json")
