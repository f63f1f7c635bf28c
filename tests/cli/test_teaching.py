"""dsv3 sft, dsv3 distill, dsv3 reward and dsv3 grpo as they are typed."""

import json
import subprocess
import sys

import pytest

from dsv3.cli.main import main


def run(*arguments):
    with pytest.raises(SystemExit) as left:
        main([str(argument) for argument in arguments])
    return left.value.code


@pytest.fixture(scope="module")
def base(texts, tmp_path_factory):
    from dataclasses import replace

    from dsv3.train.loop import pretrain

    from ..conftest import small_config

    folder = tmp_path_factory.mktemp("base") / "run"
    pretrain(replace(small_config(texts), total_tokens=2 * 4 * 32), folder=folder)
    return folder


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    file = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    lines = [{"prompt": f"{n} + 1", "completion": str(n + 1)} for n in range(20)]
    lines.append({"prompt": "far " * 40, "completion": "too long"})
    file.write_text("\n".join(map(json.dumps, lines)))
    return file


def test_a_base_is_taught_and_then_finds_out_more(base, chats, tmp_path, capsys):
    taught = tmp_path / "taught"
    assert run("sft", base, "--data", chats, "--run", taught, "--rows", 2, "--learning-rate", 1e-2, "--epochs", 3) == 0
    said = capsys.readouterr().out
    assert "20 conversations of" in said
    assert "1 longer than a row and dropped" in said
    assert f"dsv3 chat {taught}" in said
    options = ("--run", tmp_path / "rl", "--iterations", 2, "--problems", 2, "--group", 4, "--max-tokens", 4)
    wanted = ("--reward", "answer=1", "--reward", "format=0.5", "--lesson", "held_out=5", "--lesson", "kl_weight=0.04")
    assert run("grpo", taught, *options, *wanted) == 0
    said = capsys.readouterr().out
    assert "of 5 held-out problems: answer" in said
    assert "finished after 2 iterations" in said
    assert json.loads((tmp_path / "rl" / "grpo.json").read_text())["kl_weight"] == 0.04
    assert run("chat", tmp_path / "rl", "--help") == 0


def test_a_taught_model_teaches_another(base, chats, tmp_path, capsys):
    taught, output = tmp_path / "taught", tmp_path / "set.jsonl"
    assert run("sft", base, "--data", chats, "--run", taught, "--rows", 2, "--learning-rate", 1e-2, "--epochs", 2) == 0
    exclude = tmp_path / "eval.txt"
    exclude.write_text("0 + 1 + 2\n")
    options = ("--problems", 30, "--candidates", 4, "--max-tokens", 4, "--min-reward", 0, "--system", "Add.")
    command = ("distill", "--teacher", taught, "--output", output, *options, "--exclude", exclude)
    capsys.readouterr()
    assert run(*command, "--set", "ask_with_system=false") == 0
    said = capsys.readouterr().out
    card = json.loads((tmp_path / "set.json").read_text())
    assert f"{card['problems']['asked']} problems asked, " in said
    assert f"{exclude}: 1 problems whole and 0 by 13 words in a row left out, 0 answers" in said
    assert f"dsv3 sft BASE --data {output}" in said
    assert card["settings"]["system_prompt"] == "Add."
    assert run(*command) == 2
    assert "ask_with_system was False and is now True" in capsys.readouterr().err
    assert run("sft", base, "--data", output, "--run", tmp_path / "student", "--epochs", 1, "--length", 64) == 0
    assert f"{sum(card['lines'].values())} conversations" in capsys.readouterr().out


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Of 21 answers the short one is preferred."""
    file = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    file.write_text(
        "".join(json.dumps({"prompt": f"{n} + 1", "chosen": str(n), "rejected": f"{n} {n}"}) + "\n" for n in range(21))
    )
    return file


def test_a_reward_model_is_taught_and_rewards(base, pairs, tmp_path, capsys):
    folder = tmp_path / "reward"
    options = ("--pairs", 8, "--length", 32, "--held-out", 0.2, "--learning-rate", 1e-2)
    assert run("reward", base, "--data", pairs, "--run", folder, *options) == 0
    said = capsys.readouterr().out
    assert "of held-out pairs in the right order" in said
    assert f"--reward model:{folder}=1" in said
    assert run("report", folder) == 0
    drawing = ("--iterations", 1, "--problems", 2, "--group", 2, "--max-tokens", 4, "--lesson", "held_out=2")
    capsys.readouterr()
    assert run("grpo", base, "--run", tmp_path / "rl", *drawing, "--reward", f"model:{folder}=1") == 0
    assert f"held-out problems: model:{folder} " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("sft", "BASE", "--data", "absent.jsonl"), "cannot read absent.jsonl"),
        (("sft", "NOWHERE", "--data", "CHATS"), "neither a run nor a model"),
        (("grpo", "BASE", "--task", "poetry"), "no task 'poetry'"),
        (("grpo", "BASE", "--reward", "truth"), "no reward 'truth'"),
        (("grpo", "BASE", "--reward", "model:nowhere"), "there is no such folder"),
        (("reward", "BASE", "--data", "CHATS"), "needs 'prompt', 'chosen' and 'rejected'"),
        (("grpo", "BASE", "--lesson", "group=3"), "unknown key 'group'"),
    ],
)
def test_mistakes_are_told_in_a_line(base, chats, tmp_path, capsys, arguments, told):
    places = {"BASE": base, "NOWHERE": tmp_path, "CHATS": chats}
    assert run(*(places.get(word, word) for word in arguments), "--run", tmp_path / "new") == 2
    error = capsys.readouterr().err
    assert told in error
    assert "Traceback" not in error


def on_ranks(count, *arguments):
    """Run the command line on some ranks, and return what it said."""
    start = ["-m", "torch.distributed.run", "--nproc-per-node", count, "--no-python", "--", sys.executable]
    command = [
        sys.executable,
        *(start if count > 1 else []),
        "-c",
        "from dsv3.cli.main import main; main()",
        *arguments,
    ]
    return subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True, timeout=120).stdout


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["sft", "reward"])
def test_two_ranks_teach_what_one_does(base, chats, pairs, tmp_path, verb):
    """Seven rows, or 21 pairs, do not divide over two ranks: one of them reads a row that is not trained."""
    data = ["--data", chats, "--rows", 4] if verb == "sft" else ["--data", pairs, "--pairs", 4]
    rate = 1e-2 if verb == "sft" else 1e-3
    options = [*data, "--length", 32, "--epochs", 2, "--learning-rate", rate]
    losses = []
    for count in (1, 2):
        folder = tmp_path / f"on {count}"
        on_ranks(count, verb, base, *options, "--run", folder)
        records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        losses.append([record["loss"] for record in records if record["kind"] == "step"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.slow
def test_two_ranks_draw_and_learn_what_one_does(base, tmp_path):
    """Five problems do not divide over two ranks; what is drawn hangs on their places alone."""
    problems = tmp_path / "problems.jsonl"
    problems.write_text("".join(json.dumps({"prompt": f"say {n}", "answer": str(n)}) + "\n" for n in range(40)))
    options = ["--task", problems, "--reward", "answer", "--iterations", 3, "--problems", 5]
    options += ["--group", 4, "--updates", 2]
    options += ["--max-tokens", 6, "--learning-rate", 1e-2, "--lesson", "kl_weight=0.1", "--lesson", "validate_every=2"]
    records, said = [], []
    for count in (1, 2):
        folder = tmp_path / f"on {count}"
        said.append(on_ranks(count, "grpo", base, *options, "--run", folder))
        lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        kinds = [line for line in lines if line["kind"] in ("grpo", "grpo_validation")]
        records.append([{key: value for key, value in line.items() if key != "seconds"} for line in kinds])
    assert len(records[0]) == len(records[1]) == 3 + 3
    for one, two in zip(*records, strict=True):
        assert one.keys() == two.keys()
        for key in one.keys() - {"kind", "first_ratio_off"}:
            assert one[key] == pytest.approx(two[key], rel=1e-4, abs=1e-6), key
    assert said[1].count("finished after") == 1


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--teacher", "nowhere"), "cannot load a model from nowhere"),
        (("--teacher", "http://host/v1"), "say which with teacher_model"),
        (("--teacher", "BASE", "--task", "poetry"), "no task 'poetry'"),
        (("--teacher", "BASE", "--exclude", "absent.txt"), "cannot read absent.txt"),
        (("--teacher", "BASE", "--set", "temprature=2"), "did you mean 'temperature'"),
        (("--teacher", "BASE", "--max-tokens", 500), "use fewer max_answer_tokens"),
    ],
)
def test_mistakes_of_distillation_are_told_in_a_line(base, tmp_path, capsys, arguments, told):
    given = (base if word == "BASE" else word for word in arguments)
    assert run("distill", *given, "--output", tmp_path / "set.jsonl") == 2
    error = capsys.readouterr().err
    assert told in error
    assert "Traceback" not in error
