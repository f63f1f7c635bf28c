"""dsv3 data: from the command line to a corpus, a card, a run that trains on it, and the documents of a step."""

import json
import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("datatrove", reason="needs the extra 'data'")

from dsv3.cli.main import main
from dsv3.config import DataConfig, MixtureConfig, ShareConfig, SourceConfig
from dsv3.data.loader import RowLoader
from dsv3.data.prepare import prepare_corpus
from dsv3.errors import ConfigError
from dsv3.train.run_folder import open_run_folder
from dsv3.train.schedule import total_steps
from dsv3.train.traced import rows_of_step, step_rows

WORDS = [
    "sea",
    "moon",
    "river",
    "stone",
    "light",
    "walks",
    "sleeps",
    "sings",
    "under",
    "far",
    "bridge",
    "winter",
    "letter",
    "market",
    "garden",
    "engine",
]
SETTINGS = ["duplicates.bands=2", "tokens.vocab_size=320", "tokens.fim_rate=0.1", "tasks=2", "quality.enabled=false"]


def text_of(seed: int) -> str:
    chance = random.Random(seed)
    return "\n".join(f"The {' '.join(chance.sample(WORDS, 6))} is to be of that." for _ in range(8))


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as left:
        main([*arguments])
    return left.value.code


def arguments(folder: Path, output: Path) -> list[str]:
    sets = [part for setting in SETTINGS for part in ("--set", setting)]
    given = ["--input", f"prose={folder / 'prose'}", "--input", f"code={folder / 'code'}"]
    return ["data", "prepare", *given, "--output", str(output), "--workers", "1", *sets]


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    folder = tmp_path_factory.mktemp("raw")
    for name in ("prose", "code"):
        (folder / name).mkdir()
    for number in range(40):
        (folder / "prose" / f"{number:02d}.txt").write_text(text_of(number))
        lines = "\n".join(f"    {word}_{number} = {word}({number})" for word in WORDS[number % 5 :])
        (folder / "code" / f"{number:02d}.py").write_text(f"def function_{number}():\n{lines}\n")
    return folder


@pytest.fixture(scope="module")
def corpus(raw, tmp_path_factory):
    output = tmp_path_factory.mktemp("out") / "corpus"
    assert run(*arguments(raw, output)) == 0
    return output


@pytest.fixture
def curated_run(small_run, corpus):
    data = DataConfig(sources=(SourceConfig(path=str(corpus)),))
    return replace(small_run, data=data)


def test_prepare_says_what_is_there_and_writes_a_card(corpus, capsys):
    assert run("data", "card", str(corpus)) == 0
    assert capsys.readouterr().out.strip().endswith("data_card.html")
    page = (corpus / "data_card.html").read_text()
    assert "prose/english" in page
    assert "code/code" in page
    assert 'src="data:image/png;base64,' in page
    assert "http" not in page.split("<main>")[1].split("Settings")[0]


def test_the_same_command_again_does_nothing(corpus, raw, capsys):
    before = (corpus / "corpus.json").stat().st_mtime_ns
    assert run(*arguments(raw, corpus)) == 0
    assert "prose/english: " in capsys.readouterr().out
    assert (corpus / "corpus.json").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--executor", "spark"], "choose one of local, slurm, ray"),
        (["--executor", "slurm"], "needs Slurm's sbatch"),
        (["--executor", "ray"], "needs the package 'ray'"),
        (["--partition", "cpu"], "are for --executor slurm"),
        (["--set", "quality.min_wrds=3"], "did you mean 'quality.min_words'"),
        (["--eval-data", "/nowhere"], "is no folder"),
    ],
)
def test_what_cannot_be_obeyed_is_refused_in_one_line(raw, tmp_path, capsys, more, message):
    assert run(*arguments(raw, tmp_path / "out"), *more) == 2
    assert message in capsys.readouterr().err


def test_a_run_trains_on_the_corpus_as_it_is(curated_run, corpus, tmp_path):
    prepared = prepare_corpus(curated_run, folder=tmp_path / "corpus")
    assert [source.name for source in prepared.sources] == ["prose/english", "code/code"]
    assert not list((tmp_path / "corpus").rglob("*.bin"))  # The shards stay where they are.
    loader = RowLoader(prepared, config=curated_run, sequence_length=32, seed=0)
    assert loader.batch(0, count=4).num_tokens == 128
    assert prepare_corpus(curated_run, folder=tmp_path / "corpus").sources == prepared.sources


def test_a_corpus_made_otherwise_is_refused_with_what_to_set(curated_run, tmp_path):
    other = replace(curated_run, data=replace(curated_run.data, fim_rate=0.5))
    with pytest.raises(ConfigError, match=r"made with 0.1; set data.fim_rate=0.1"):
        prepare_corpus(other, folder=tmp_path / "corpus")
    two = replace(curated_run, data=replace(curated_run.data, sources=curated_run.data.sources * 2))
    with pytest.raises(ConfigError, match="the one source"):
        prepare_corpus(two, folder=tmp_path / "corpus")


def test_a_mixture_weighs_domains_and_anneals(curated_run, tmp_path):
    mixture = MixtureConfig(
        shares=(ShareConfig(of="english", weight=0.75), ShareConfig(of="code", weight=0.25)),
        annealing=(ShareConfig(of="english"), ShareConfig(of="code", weight=1.0)),
        annealing_tokens=512,
    )
    config = replace(curated_run, data=replace(curated_run.data, mixture=mixture))
    loader = RowLoader(prepare_corpus(config, folder=tmp_path / "corpus"), config=config, sequence_length=32, seed=0)
    rows = config.total_tokens // 32
    sources = [loader.locate(row)[0].source for row in range(rows)]
    early = sources[: rows - 16]
    assert set(sources[rows - 16 :]) == {"code/code"}
    assert 0.5 < early.count("prose/english") / len(early) < 0.95


def test_the_documents_of_a_step_are_those_that_lie_in_its_rows(curated_run, corpus, tmp_path, capsys):
    folder = tmp_path / "run"
    with open_run_folder(folder, config=curated_run):
        prepared = prepare_corpus(curated_run, folder=folder / "corpus")
    loader = RowLoader(prepared, config=curated_run, sequence_length=32, seed=curated_run.runtime.seed)
    traced = dict(rows_of_step(folder, step=3))
    assert list(traced) == [8, 9, 10, 11]
    for row, places in traced.items():
        ids = loader.rows(row, count=1)[0]
        assert sum(place.length for place in places) == int((ids >= 0).sum())
        assert all(place.document.split("/")[0] == place.source.split("/")[0] for place in places)
    assert run("data", "trace", str(folder), "--step", "3") == 0
    out = capsys.readouterr().out
    assert all(place.document in out for places in traced.values() for place in places)
    assert run("data", "trace", str(folder), "--step", "99") == 2
    assert "has 12" in capsys.readouterr().err


def test_the_rows_of_all_steps_are_all_rows_in_order(small_run):
    config = replace(
        small_run,
        total_tokens=6000,
        batch=replace(small_run.batch, start_sequences=2, final_sequences=8, multiple_of=2, ramp_tokens=3000),
    )
    rows = [row for step in range(1, total_steps(config) + 1) for row in step_rows(config, step=step)]
    assert rows == list(range(len(rows)))
    assert (len(rows) - 8) * 32 < 6000 <= len(rows) * 32


SBATCH = """#!/bin/sh
# Stands in for Slurm: runs every task of the array at once, and says a number as sbatch does.
for last; do :; done
count=$(sed -n 's/^#SBATCH --array=0-\\([0-9]*\\).*/\\1/p' "$last")
echo "$*" >> "$SLURM_LOG"
for task in $(seq 0 "${count:-0}"); do
  SLURM_ARRAY_TASK_ID=$task SLURM_NODELIST=here RUN_OFFSET=0 sh "$last" >> "$SLURM_LOG.out" 2>&1 || exit 1
done
echo "Submitted batch job 17"
"""


@pytest.mark.slow
def test_slurm_is_given_stage_after_stage_and_ends_with_the_same_bytes(raw, corpus, tmp_path, monkeypatch, capsys):
    """Slurm's commands are stood in for by shell scripts that run what they are given."""
    tools = tmp_path / "bin"
    tools.mkdir()
    srun = f'#!/bin/sh\nshift 3\ncommand=$1\nshift\nexec "{Path(sys.executable).parent}/$command" "$@"\n'
    for name, script in (("sbatch", SBATCH), ("srun", srun), ("scontrol", "#!/bin/sh\necho here\n")):
        (tools / name).write_text(script)
        (tools / name).chmod(0o755)
    (tools / "merge_stats").write_text("#!/bin/sh\n")
    (tools / "merge_stats").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_LOG", str(tmp_path / "log"))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    output = tmp_path / "out"
    assert run(*arguments(raw, output), "--executor", "slurm", "--partition", "cpu") == 0, (
        tmp_path / "log"
    ).read_text()
    assert "documents: 17, pairs: 17" in capsys.readouterr().out
    calls = [line for line in (tmp_path / "log").read_text().splitlines() if "RUN_OFFSET" in line]
    assert ["afterok:17" in line for line in calls] == [False, True, True, True, True, True]
    script = (output / "work/logs/documents/launch_script.slurm").read_text()
    assert "#SBATCH --partition=cpu" in script
    assert "#SBATCH --array=0-1" in script
    for file in corpus.glob("sources/*/*.bin"):
        assert (output / file.relative_to(corpus)).read_bytes() == file.read_bytes()
    assert json.loads((output / "data_card.json").read_text())["groups"]


@pytest.mark.slow
def test_ray_runs_all_stages_and_ends_with_the_same_bytes(raw, corpus, tmp_path):
    pytest.importorskip("ray")
    output = tmp_path / "out"
    command = [sys.executable, "-m", "dsv3.cli.main", *arguments(raw, output), "--executor", "ray", "--workers", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "prose/english: " in done.stdout
    for file in corpus.glob("sources/*/*.bin"):
        assert (output / file.relative_to(corpus)).read_bytes() == file.read_bytes()
    assert sorted(path.name for path in (output / "work").iterdir()) == sorted(
        path.name for path in (corpus / "work").iterdir()
    )


def test_a_stage_whose_tasks_fail_on_ray_is_the_last_one(raw, tmp_path, monkeypatch, capsys):
    """datatrove's executor returns as if nothing had happened; Ray is stood in for."""
    begun = []

    class Executor:
        def __init__(self, steps, *, tasks, logging_dir, **_):
            self.name, self.tasks = Path(logging_dir).name, tasks

        def run(self):
            begun.append(self.name)

        def get_incomplete_ranks(self):
            return [1] if self.name == "pairs" else []

    monkeypatch.setitem(sys.modules, "ray", type(sys)("ray"))
    monkeypatch.setattr("datatrove.executor.ray.RayPipelineExecutor", Executor)
    assert run(*arguments(raw, tmp_path / "out"), "--executor", "ray") == 2
    assert begun == ["documents", "pairs"]
    error = capsys.readouterr().err
    assert "1 of the 3 tasks of stage 'pairs' failed on Ray, task 1 among them" in error
    assert "logs/pairs/logs says why" in error
