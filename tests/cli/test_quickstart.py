import json
import os
import random
import shutil
import signal

import pytest

from dsv3.cli import quickstart as quickstart_file
from dsv3.cli.evaluate import evaluate
from dsv3.cli.progress import Progress
from dsv3.cli.quickstart import quickstart
from dsv3.config.files import read_config
from dsv3.data.prepared import load_prepared
from dsv3.errors import ConfigError
from dsv3.evals.comparison import ScoredText, rows_read
from dsv3.evals.evaluation import held_out_text, last_step, tokens_read, training_rows
from dsv3.evals.extension import compare_phases
from dsv3.infer.loaded import load
from dsv3.report.page import write_report
from dsv3.train.validation import read_held_out, validate

SMALL = [
    "total_tokens=2048",
    "model.hidden_size=32",
    "model.num_hidden_layers=2",
    "model.vocab_size=400",
    "model.num_attention_heads=2",
    "model.n_routed_experts=8",
    "model.num_experts_per_tok=2",
    "batch.sequence_length=32",
    "evaluation.every_steps=4",
    "evaluation.sample_tokens=4",
    "evaluation.max_tokens=600",
    'evaluation.sample_prompts=["The sea "]',
    "snapshot.every_steps=3",
    "data.held_out_rate=0.2",
    "runtime.threads=1",
]


@pytest.fixture(scope="module", autouse=True)
def short_lessons(tmp_path_factory):
    problems = tmp_path_factory.mktemp("problems") / "sums.jsonl"
    problems.write_text("".join(json.dumps({"prompt": f"{n} + 1", "answer": str(n + 1)}) + "\n" for n in range(40)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quickstart_file, "TASK", str(problems))
        patch.setattr(quickstart_file, "GRPO_ITERATIONS", 2)
        patch.setattr(quickstart_file, "GRPO_PROBLEMS", 2)
        yield


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    rng = random.Random(0)
    words = (
        "the sea",
        "is wide",
        "and a",
        "small boat",
        "sails",
        "over it",
        "by night",
        "while wind",
        "and rain",
        "rise",
    )
    for number in range(60):
        text = " ".join(rng.choices(words, k=80))
        (folder / f"{number:02}.txt").write_text(f"Story {number}. {text}.\n")
    (folder / "empty.txt").write_text("")
    (folder / "latin.txt").write_bytes("Die See ist weit, das Boot fährt über sie. ".encode("latin-1") * 9)
    (folder / "binary.txt").write_bytes(bytes(range(256)) * 4)
    return folder


@pytest.fixture(scope="module")
def finished(texts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "small"
    quickstart(run=folder, data=[str(texts)], assignments=SMALL)
    return folder


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def without_times(entries):
    timed = ("seconds", "tokens_per_second")
    return [{key: value for key, value in entry.items() if key not in timed} for entry in entries]


def test_a_quickstart_leaves_a_model_an_evaluation_samples_and_a_report(finished):
    stages = json.loads((finished / "stages.json").read_text())
    assert list(stages["done"]) == ["corpus", "pretrain", "evaluate", "extend", "sft", "grpo", "sample", "report"]
    assert load(finished).generate("The sea ", max_tokens=3, temperature=0.0)
    closing = read_lines(finished / "samples.jsonl")[-1]
    assert closing["prompt"] == "The sea "
    assert closing["temperature"] == 0.8
    page = (finished / "report.html").read_text()
    assert "Kneser-Ney" in page
    assert "not finished" not in page
    assert "Perplexity by position in a long text" in page
    assert "Held-out problems, and what the model answers as it learns" in page
    assert not load(finished / "sft" / "grpo").is_base


def test_a_quickstart_lengthens_the_context_in_two_phases(finished):
    found = json.loads((finished / "extension.json").read_text())
    assert (found["trained"], found["lengths"]) == (32, [256, 1024])
    assert [curve["name"] for curve in found["curves"]] == [
        "before: rows of 32 tokens",
        "after rows of 256 tokens",
        "after rows of 1,024 tokens",
    ]
    assert {curve["edges"][-1] for curve in found["curves"]} == {1024}
    last = load(finished / "extended-1024")
    assert last.trained_length == 1024
    assert last.config.rope_scaling.original_max_position_embeddings == 32


def test_text_too_short_to_compare_on_is_no_reason_to_stop(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "dsv3.evals.extension.held_out_text",
        lambda *_, **__: ScoredText(documents={"notes": [[0, 5, 6], [0, 7]]}, content={"notes": b"..."}),
    )
    run = tmp_path / "run"
    shutil.copytree(finished, run, symlinks=True)
    phases = [run / "extended-256", run / "extended-1024"]
    assert compare_phases(run, phases=phases, rows=4, device="cpu") == []
    assert json.loads((run / "extension.json").read_text())["curves"] == []
    assert "Perplexity by position" not in write_report(run).read_text()


def test_the_evaluation_agrees_with_the_validation_of_training(finished):
    evaluation = json.loads((finished / "evaluation.json").read_text())
    last = [entry for entry in read_lines(finished / "metrics.jsonl") if entry["kind"] == "validation"][-1]
    assert evaluation["model"]["bits_per_byte"] == pytest.approx(last["bits_per_byte"], rel=1e-5)
    assert evaluation["model"]["by_source"] == pytest.approx(last["by_source"], rel=1e-5)


def test_the_evaluated_text_has_the_bytes_of_the_validation_text(finished):
    config = read_config(finished / "config.json")
    corpus = load_prepared(finished / "corpus")
    text = held_out_text(corpus, max_tokens=config.evaluation.max_tokens)
    held_out = read_held_out(corpus, max_tokens=config.evaluation.max_tokens, window=config.batch.sequence_length)
    assert tuple(len(content) for content in text.content.values()) == held_out.bytes
    result = validate(load(finished, plain=True).model, held_out=held_out, mtp=False)
    load_of_each_layer = json.loads((finished / "evaluation.json").read_text())["model"]["max_violation"]
    assert load_of_each_layer == pytest.approx(result.max_violation)


def test_baselines_have_read_exactly_the_rows_the_model_has_read(finished):
    config = read_config(finished / "config.json")
    corpus = load_prepared(finished / "corpus")
    assert tokens_read(finished) == last_step(finished)["tokens"] >= config.total_tokens
    rows = training_rows(corpus, config=config, tokens=tokens_read(finished))
    assert len(rows) == len({row.tobytes() for row in rows})
    evaluation = json.loads((finished / "evaluation.json").read_text())
    trained = {row["name"]: row["training_tokens"] for row in evaluation["baselines"]}
    assert trained["3-gram"] == trained["unigram"] == sum(len(row) for row in rows)


def test_rows_that_come_again_are_read_once(finished):
    from dsv3.data.loader import RowLoader

    config = read_config(finished / "config.json")
    corpus = load_prepared(finished / "corpus")
    loader = RowLoader(corpus, config=config, sequence_length=32, seed=0)
    epoch = sum(loader.rows_per_epoch.values())
    assert len(rows_read(loader, tokens=3 * epoch * 32)) == len(rows_read(loader, tokens=epoch * 32)) <= epoch


def test_the_same_command_again_does_nothing_and_says_so(finished, texts, capsys):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}
    quickstart(run=finished, data=[str(texts)], assignments=SMALL)
    out = capsys.readouterr().out
    assert out.count("was done before") == 8
    assert f"dsv3 chat {finished}" in out
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("change", ["optim.beta1=0.8", "total_tokens=4096", "evaluation.max_tokens=700"])
def test_changed_settings_on_a_finished_run_are_refused_by_name(finished, texts, change):
    name = change.partition("=")[0]
    with pytest.raises(ConfigError, match=rf"{name} was .* and is now .*--run FOLDER"):
        quickstart(run=finished, data=[str(texts)], assignments=[*SMALL, change])


@pytest.mark.slow
def test_a_quickstart_stopped_by_ctrl_c_in_training_goes_on_to_the_same_model(finished, texts, tmp_path, monkeypatch):
    folder = tmp_path / "stopped"
    taken = Progress.train

    def stop_at_step_five(self, event):
        taken(self, event)
        if event.kind == "step" and event.metrics["step"] == 5:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Progress, "train", stop_at_step_five)
        with pytest.raises(KeyboardInterrupt):
            quickstart(run=folder, data=[str(texts)], assignments=SMALL)
    assert list(json.loads((folder / "stages.json").read_text())["done"]) == ["corpus"]
    quickstart(run=folder, data=[str(texts)], assignments=[*SMALL, "snapshot.every_steps=2"])
    steps = [
        [entry for entry in without_times(read_lines(run / "metrics.jsonl")) if entry["kind"] == "step"]
        for run in (finished, folder)
    ]
    assert steps[0] == steps[1]
    assert (folder / "evaluation.json").read_text() == (finished / "evaluation.json").read_text()


def test_a_quickstart_that_fails_in_its_evaluation_goes_on_with_it(texts, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "failed"
    assignments = [*SMALL, "total_tokens=256"]
    with monkeypatch.context() as patch:
        patch.setattr(quickstart_file, "score", lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(KeyboardInterrupt):
            quickstart(run=folder, data=[str(texts)], assignments=assignments)
    assert "The same command goes on from here" in capsys.readouterr().err
    quickstart(run=folder, data=[str(texts)], assignments=assignments)
    assert "[pretrain] was done before" in capsys.readouterr().out


def test_text_that_is_given_without_data_is_refused():
    with pytest.raises(ConfigError, match="--data PATH"):
        quickstart(more_data=["stray"])


def test_evaluate_prints_the_model_among_its_baselines(finished, capsys):
    evaluate(finished, baselines=True)
    out = capsys.readouterr().out
    assert [word in out for word in ("the model", "unigram", "Kneser-Ney", "xz, after", "MaxVio")] == [True] * 5


def test_evaluate_scores_given_text_source_by_source_and_leaves_the_run_alone(finished, texts, capsys):
    before = (finished / "evaluation.json").read_text()
    evaluate(finished, data=[str(texts / "00.txt"), str(texts / "01.txt")], as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert list(found["model"]["by_source"]) == ["00.txt", "01.txt"]
    assert found["baselines"] == []
    assert (finished / "evaluation.json").read_text() == before


def test_evaluate_of_an_export_elsewhere_needs_text_and_has_xz_as_baseline(finished, texts, tmp_path, capsys):
    export = tmp_path / "model"
    export.mkdir()
    for file in (finished / "export").iterdir():
        (export / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ConfigError, match="--data PATH"):
        evaluate(export)
    evaluate(export, data=[str(texts / "00.txt")], baselines=True, as_json=True)
    assert [row["name"] for row in json.loads(capsys.readouterr().out)["baselines"]] == ["xz-alone"]
