"""From raw text to a corpus that is trained on: nothing is lost, nothing is written twice, and no kill is seen."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("datatrove", reason="needs the extra 'data'")

from dsv3.config.curation import CurationConfig, DuplicateConfig, InputConfig, QualityConfig, TokensConfig
from dsv3.data.curation.evaluation_items import EvaluationItem
from dsv3.data.curation.kinds import READABLE
from dsv3.data.curation.local import Workers
from dsv3.data.curation.pipeline import check_output, curate
from dsv3.data.prepared import load_prepared
from dsv3.data.shards import Shard, shard_files
from dsv3.data.tokenizer import Tokenizer
from dsv3.errors import ConfigError, DataError

WORDS = [
    "river",
    "stone",
    "light",
    "paper",
    "window",
    "garden",
    "winter",
    "music",
    "letter",
    "market",
    "bridge",
    "silver",
    "forest",
    "engine",
    "planet",
    "number",
    "question",
    "answer",
    "animal",
    "island",
    "weather",
    "history",
    "kitchen",
    "language",
    "mountain",
    "problem",
    "reason",
    "teacher",
    "village",
    "machine",
]


def prose(seed: int, *, sentences: int = 12) -> str:
    chance = random.Random(seed)
    made = []
    for _ in range(sentences):
        words = chance.sample(WORDS, 9)
        first, last = " and ".join(words[2:5]), " ".join(words[5:])
        made.append(f"The {words[0]} of the {words[1]} is to {first} with that {last}.")
    return "\n".join(made)


def write_corpus(folder: Path, *, documents: int = 16) -> Path:
    folder.mkdir(parents=True)
    for number in range(documents):
        (folder / f"{number:03d}.txt").write_text(prose(number))
    (folder / "program.py").write_text("import os\n\n\ndef main() -> None:\n    print(os.getcwd())\n\n\nmain()\n" * 3)
    (folder / "zzz-copy.txt").write_text(prose(3) + "\n\n")
    (folder / "zzz-near.txt").write_text(prose(5).replace("river", "stream", 1) + "\nOne line more of the text.")
    (folder / "zzz-junk.bin").write_bytes(bytes(range(256)) * 40)
    (folder / "zzz-latin.txt").write_bytes((prose(900) + "\nCafé and crème of the house.").encode("latin-1"))
    return folder


def config_of(*folders: Path, **more: object) -> CurationConfig:
    more.setdefault("duplicates", DuplicateConfig(bands=3, rows=3))
    return CurationConfig(
        inputs=tuple(InputConfig(path=str(folder), name=folder.name) for folder in folders),
        tasks=2,
        tokens=TokensConfig(vocab_size=400, fim_rate=0.0, boundary_split_rate=0.0, held_out_rate=0.1),
        **more,  # type: ignore[arg-type]
    )


def files_of(output: Path) -> dict[str, bytes]:
    """Everything that a resumed preparation must leave alike: not its logs, its times, nor the page with its name."""
    found = {}
    for path in sorted(output.rglob("*")):
        name = path.relative_to(output).as_posix()
        if path.is_file() and not name.startswith(("work/logs", ".lock", "data_card.html")):
            content = path.read_bytes()
            if name.startswith("work/accounts") and name.endswith(".json"):
                values = json.loads(content)
                for step in values.get("steps", []):
                    step["seconds"] = 0
                content = json.dumps(values).encode()
            found[name] = content
    return found


def names_of(output: Path) -> list[str]:
    corpus = load_prepared(output)
    names = []
    for source in corpus.sources:
        for file in shard_files(corpus.source_folder(source)):
            shard = Shard(file, vocab_size=corpus.vocab_size)
            names += [shard.document_name(number) for number in range(shard.num_documents)]
    return names


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("texts") / "raw")


@pytest.fixture(scope="module")
def prepared(raw, tmp_path_factory):
    """The corpus of `raw`, which no test changes."""
    return curate(config_of(raw), output=tmp_path_factory.mktemp("corpora") / "prepared")


def test_copies_near_copies_and_junk_are_dropped_and_the_first_of_each_stays(raw, tmp_path):
    config = config_of(raw, duplicates=DuplicateConfig(bands=4, rows=2))
    output = curate(config, output=tmp_path / "out")
    card = json.loads((output / "data_card.json").read_text())
    steps = {step["name"]: step for step in card["steps"]}
    samples = {name for some in steps["copies"]["samples"].values() for _, name, _ in some}
    assert samples >= {"raw/zzz-copy.txt", "raw/zzz-near.txt"}
    assert steps["copies"]["dropped"]["the same text"][0] == 1
    assert steps["read"]["dropped"]["kind of file is none of " + READABLE][0] == 1
    kept = [*names_of(output), *held_out_of(output)]
    assert {"raw/003.txt", "raw/005.txt", "raw/program.py", "raw/zzz-latin.txt"} <= set(kept)
    assert len(kept) == len(set(kept)) == steps["copies"]["kept_documents"]


def held_out_of(output: Path) -> list[str]:
    files = [file.read_text().splitlines() for file in output.glob("sources/*/held_out.jsonl")]
    return [json.loads(line)["name"] for lines in files for line in lines]


def test_the_token_stream_is_the_kept_documents_tokenised_in_order(raw, prepared):
    corpus = load_prepared(prepared)
    tokenizer = Tokenizer.from_file(prepared / "tokenizer")
    for source in corpus.sources:
        for file in shard_files(corpus.source_folder(source)):
            shard = Shard(file, vocab_size=corpus.vocab_size)
            expected = []
            for number in range(shard.num_documents):
                text = (raw / shard.document_name(number).removeprefix("raw/")).read_bytes()
                decoded = text.decode("latin-1" if b"\xe9" in text else "utf-8").strip("\n")
                expected += [tokenizer.bos_id, *tokenizer.encode(decoded), tokenizer.eos_id]
            assert shard.tokens.tolist() == expected
        assert names_in_order(corpus.source_folder(source), vocab_size=corpus.vocab_size)


def names_in_order(folder: Path, *, vocab_size: int) -> bool:
    names = []
    for file in shard_files(folder):
        shard = Shard(file, vocab_size=vocab_size)
        names += [shard.document_name(number) for number in range(shard.num_documents)]
    return names == sorted(names)


def test_what_comes_out_does_not_hang_on_the_number_of_tasks(raw, prepared, tmp_path):
    many = curate(replace(config_of(raw), tasks=5), output=tmp_path / "many")
    assert names_of(prepared) == names_of(many)
    cards = [json.loads((output / "data_card.json").read_text()) for output in (prepared, many)]
    for card in cards:
        card["settings"]["tasks"] = 0
    assert cards[0] == cards[1]
    assert (prepared / "tokenizer/tokenizer.json").read_bytes() == (many / "tokenizer/tokenizer.json").read_bytes()


@pytest.mark.parametrize(("tasks", "ends"), [(3, 2), (1, 1)], ids=["many tasks", "one task"])
def test_shards_are_written_by_new_workers_where_there_are_many_tasks(raw, tmp_path, monkeypatch, tasks, ends):
    """What the first stage leaves in their memory would stay there on top."""
    ended = []

    def end(workers):
        ended.append(sorted(path.name for path in (tmp_path / "out/work/logs").iterdir()))
        real(workers)

    real = Workers.end
    monkeypatch.setattr(Workers, "end", end)
    curate(replace(config_of(raw), tasks=tasks), output=tmp_path / "out", workers=2)
    assert [("shards" in logs) for logs in ended] == [False, True][-ends:]
    assert names_of(tmp_path / "out")


def test_earlier_inputs_win_and_copies_across_sources_are_found(raw, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "again.txt").write_text(prose(7))
    (other / "new.txt").write_text(prose(7777))
    output = curate(config_of(raw, other), output=tmp_path / "out")
    assert "other/again.txt" not in names_of(output)
    swapped = curate(config_of(other, raw), output=tmp_path / "swapped")
    assert "raw/007.txt" not in names_of(swapped)


def test_documents_with_an_evaluation_item_are_dropped(raw, tmp_path):
    item = " ".join(prose(11).split("\n")[4].split()[:14])
    output = curate(config_of(raw), output=tmp_path / "out", items=[EvaluationItem(set="exam", text=item)])
    card = json.loads((output / "data_card.json").read_text())
    [step] = [step for step in card["steps"] if step["name"] == "decontaminate"]
    assert step["dropped"] == {"exam": [1, len(prose(11))]}
    assert step["samples"]["exam"][0][1] == "raw/011.txt"


def test_made_up_text_comes_in_with_its_provenance(tmp_path):
    file = tmp_path / "distilled.jsonl"
    lines = [{"messages": [{"role": "user", "content": prose(n)}], "provenance": {"teacher": "r1"}} for n in range(30)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    output = curate(config_of(file), output=tmp_path / "out")
    assert [source.domain for source in load_prepared(output).sources] == ["synthetic"]


def test_a_finished_corpus_stays_and_other_settings_are_refused(raw, prepared):
    before = files_of(prepared)
    curate(config_of(raw), output=prepared)
    assert files_of(prepared) == before
    with pytest.raises(ConfigError, match=r"other settings \(quality.min_words\)"):
        curate(config_of(raw, quality=QualityConfig(min_words=3)), output=prepared)


def test_nothing_left_says_where_it_went(tmp_path):
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw/short.txt").write_text("Too short.")
    with pytest.raises(DataError, match=r"no document is left .*too few words"):
        curate(config_of(tmp_path / "raw"), output=tmp_path / "out")


def test_an_input_that_is_not_there_is_named(tmp_path):
    with pytest.raises(DataError, match="there is no file at"):
        curate(config_of(tmp_path / "nowhere"), output=tmp_path / "out")


def test_shards_are_not_written_behind_a_url():
    with pytest.raises(ConfigError, match="mapped into memory"):
        check_output(Path("s3://bucket/corpus"))


# ---- kills ----


def run_until_killed(config: CurationConfig, *, output: Path, writes: int, after: bool) -> bool:
    """Prepare in a process that dies at its nth finished file, and tell whether it came to its end before."""
    child = os.fork()
    if child == 0:
        count = 0
        real = Path.replace

        def replaced(self: Path, target: Path) -> Path:
            nonlocal count
            count += 1
            if count == writes and not after:
                os._exit(9)
            result = real(self, target)
            if count == writes:
                os._exit(9)
            return result

        Path.replace = replaced  # type: ignore[method-assign,assignment]
        try:
            curate(config, output=output)
        except BaseException:
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    assert code in (0, 9)
    return code == 0


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_preparation_killed_again_and_again_ends_with_the_same_bytes(tmp_path):
    """Every few files, before or after one takes its name: all stages are hit, tasks half done."""
    raw = write_corpus(tmp_path / "raw", documents=8)
    config = config_of(raw)
    expected = files_of(curate(config, output=tmp_path / "whole"))
    chance, attempts = random.Random(0), 1
    output = tmp_path / "killed"
    while not run_until_killed(config, output=output, writes=chance.randint(4, 14), after=chance.random() < 0.5):
        attempts += 1
        assert attempts < 40
    assert attempts > 5
    assert files_of(output) == expected


def workers_of(process: subprocess.Popen[bytes]) -> list[int]:
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [pid for pid in map(int, children) if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def kill(process: subprocess.Popen[bytes]) -> None:
    """Kill the process that leads, and wait until its workers have seen it."""
    orphans = workers_of(process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}/cmdline").exists() for pid in orphans) and time.monotonic() < deadline:
        time.sleep(0.05)


def kill_in_stage(command: list[str], *, logs: Path, stage: str, tasks: int, seconds: float, worker: bool) -> bool:
    """Run until a stage has gone on for so long, kill a worker or all, and tell whether it was still going on."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (logs / stage).is_dir() and process.poll() is None:
        time.sleep(0.001)
    time.sleep(seconds)
    workers = workers_of(process) if worker and process.poll() is None else []
    if workers:
        os.kill(workers[0], signal.SIGKILL)
    was_going_on = process.poll() is None and len(list((logs / stage / "completions").glob("*"))) < tasks
    if workers:
        assert process.wait() == 0  # It goes on with a new worker.
    else:
        kill(process)
    return was_going_on


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds workers by Linux's /proc")
@pytest.mark.parametrize("worker", [False, True], ids=["all", "a worker"])
def test_sigkill_at_random_in_every_stage_leaves_no_trace(tmp_path, worker):
    """All that runs is killed in each stage in turn, and the same command goes on; or one of the workers alone is."""
    raw = write_corpus(tmp_path / "raw", documents=300)
    command = [sys.executable, "-m", "dsv3.cli.main", "data", "prepare", "--input", f"raw={raw}", "--workers", "2"]
    command += ["--set", "tasks=12", "--set", "tokens.vocab_size=400", "--output"]
    subprocess.run([*command, str(tmp_path / "whole")], check=True, capture_output=True)
    expected = files_of(tmp_path / "whole")
    found = sorted((tmp_path / "whole" / "work" / "logs").iterdir(), key=lambda folder: folder.stat().st_ctime)
    tasks = {folder.name: len(list((folder / "completions").iterdir())) for folder in found}
    assert set(tasks) == {"documents", "pairs", "groups", "tokenizer", "shards", "finish"}
    chance, output = random.Random(0), tmp_path / "killed"
    for stage in ("documents", "pairs", "shards") if worker else tasks:
        for _attempt in range(20):  # A stage of milliseconds may be over before the kill comes.
            before = tmp_path / "before"
            if output.exists():
                shutil.copytree(output, before)
            hit = kill_in_stage(
                [*command, str(output)],
                logs=output / "work" / "logs",
                stage=stage,
                tasks=tasks[stage],
                seconds=chance.uniform(0, 0.01 if tasks[stage] == 1 else 0.5) * (_attempt < 10),
                worker=worker,
            )
            if worker:
                assert files_of(output) == expected
            if worker or not hit:
                shutil.rmtree(output)
                if before.exists():
                    before.rename(output)
            shutil.rmtree(before, ignore_errors=True)
            if hit:
                break
        assert hit, f"no kill fell into stage {stage}"
    subprocess.run([*command, str(output)], check=True, capture_output=True)
    assert files_of(output) == expected
