"""The page says what was run, and of what was not, how to run it."""

import json

import pytest

from dsv3.errors import ConfigError
from dsv3.reproduce import page
from dsv3.reproduce.catalogue import EXPERIMENTS, find
from dsv3.reproduce.experiment import Ask, Outcome, Picture
from dsv3.reproduce.finding import Number, Order
from dsv3.reproduce.record import write_record


def finish(root, *, name="bubbles", picture=b"\x89PNG small", seconds=12.3):
    ask = Ask(folder=root / name)
    ask.folder.mkdir(parents=True, exist_ok=True)
    (ask.folder / f"{name}.png").write_bytes(picture)
    outcome = Outcome(
        findings=(
            Number(claim="bubble | idle", report="45", expected=45, value=45),
            Order(claim="a below b", report="0.1 and 0.2", lower=(3.0,), higher=(2.0,)),
        ),
        pictures=(Picture(file=f"{name}.png", caption="A picture."),),
        remark="A remark.",
    )
    return write_record(find(name), ask=ask, outcome=outcome, seconds=seconds, code="abc1234")


def test_what_was_run_stands_there_with_picture_machine_time_and_commit(tmp_path):
    record = finish(tmp_path / "runs")
    written = tmp_path / "docs" / "reproduction.md"
    assert page.write_page(written, root=tmp_path / "runs") == ["bubbles"]
    text = written.read_text()
    assert "![A picture.](reproduction/bubbles.png)" in text
    assert (written.parent / "reproduction" / "bubbles.png").read_bytes() == b"\x89PNG small"
    assert f"{record['machine']}; 12.3 s; {record['date']}; commit {record['commit']}" in text
    assert "A remark." in text
    assert "| a below b | 0.1 and 0.2 | 3 and 2 | other sign |" in text  # honest failures stay in
    assert r"bubble \| idle" in text


def test_what_was_not_run_says_so_with_its_command(tmp_path):
    finish(tmp_path / "runs")
    page.write_page(tmp_path / "page.md", root=tmp_path / "runs")
    text = (tmp_path / "page.md").read_text()
    for name in EXPERIMENTS.keys() - {"bubbles"}:
        assert f"`dsv3 reproduce {name}`" in text
    assert text.count("Not run for this page.") == len(EXPERIMENTS) - 1
    assert all(f"](#{page.anchor(one.title)})" in text for one in EXPERIMENTS.values())


def test_experiments_of_an_earlier_page_are_kept_until_they_are_made_again(tmp_path):
    finish(tmp_path / "first")
    page.write_page(tmp_path / "page.md", root=tmp_path / "first")
    finish(tmp_path / "second", name="schedule")
    assert page.write_page(tmp_path / "page.md", root=tmp_path / "second") == ["bubbles", "schedule"]
    finish(tmp_path / "third", seconds=99.0)
    page.write_page(tmp_path / "page.md", root=tmp_path / "third")
    assert json.loads((tmp_path / "page" / "bubbles.json").read_text())["seconds"] == 99.0


def test_a_large_picture_is_refused(tmp_path):
    finish(tmp_path / "runs", picture=b"\x89PNG" + bytes(100_000))
    with pytest.raises(ConfigError, match="100,004 bytes; a page keeps 100,000"):
        page.write_page(tmp_path / "page.md", root=tmp_path / "runs")
    assert not (tmp_path / "page.md").exists()


def test_a_heading_is_linked_as_pages_render_it():
    assert page.anchor("MLA's cache beside MHA, GQA") == "mlas-cache-beside-mha-gqa"
