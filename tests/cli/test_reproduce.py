import json

import pytest
from typer.testing import CliRunner

from dsv3.cli.main import Options, build_app
from dsv3.errors import ConfigError
from dsv3.reproduce.catalogue import EXPERIMENTS


def run(*arguments):
    return CliRunner().invoke(build_app(Options()), ["reproduce", *map(str, arguments)], catch_exceptions=False)


def test_the_list_has_every_experiment_with_its_place_in_the_report():
    told = run("--list").output
    assert all(one.name in told and one.source in told for one in EXPERIMENTS.values())


def test_one_writes_its_record_and_says_its_verdict(tmp_path):
    told = run("bubbles", "--runs", tmp_path).output
    assert "agrees             bubble of dualpipe" in told
    assert json.loads((tmp_path / "bubbles" / "result.json").read_text())["name"] == "bubbles"
    assert (tmp_path / "bubbles" / "bubbles.png").exists()


def test_several_are_made_and_a_page_of_them(tmp_path):
    page = tmp_path / "page.md"
    found = json.loads(run("bubbles", "schedule", "--runs", tmp_path, "--page", page, "--json").stdout)
    assert list(found) == ["bubbles", "schedule"]
    assert "![" in page.read_text()


def test_full_scale_writes_settings_and_runs_nothing(tmp_path):
    told = run("mtp", "--scale", "full", "--runs", tmp_path).output
    assert "dsv3 pretrain --config" in told
    assert sorted(path.name for path in (tmp_path / "mtp" / "full").iterdir()) == ["base.json", "mtp.json"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["balance"], "unknown experiment 'balance'; did you mean 'balancing'?"),
        (["nothing-like-it"], "there are cost, cache"),
        ([], "which one"),
        (["cost", "--all"], "leave out the names, or --all"),
        (["cost", "--scale", "large"], "use small or full"),
        (["cost", "--seeds", "2"], "nothing is drawn"),
        (["cost", "--tokens", "2"], "no training runs"),
    ],
)
def test_mistakes_are_told(arguments, told, tmp_path):
    with pytest.raises(ConfigError, match=told.replace("?", r"\?")):
        run(*arguments, "--runs", tmp_path)
