"""dsv3 plan serve."""

import json

import pytest

from dsv3.cli.main import main


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as ended:
        main(["plan", "serve", "--seconds", "5", *arguments])
    captured = capsys.readouterr()
    return ended.value.code, captured.out, captured.err


def test_the_published_day_stands_beside_the_plan(capsys, tmp_path):
    code, out, _ = run(capsys, "--picture", str(tmp_path / "day.png"))
    assert code == 0
    assert "226.8 (" in out
    assert "$87,072 (" in out
    assert (tmp_path / "day.png").read_bytes()[:4] == b"\x89PNG"


def test_json_has_the_numbers_and_their_reasons(capsys):
    code, out, _ = run(capsys, "--json", "--input-tokens", "1e9", "--output-tokens", "3e8", "--gpu", "h200")
    found = json.loads(out)
    assert code == 0
    assert found["nodes_mean"] == 22  # one unit of each kind
    assert {line["source"] for line in found["lines"]} <= {"computed", "published", "assumption", "fitted"}
    assert len(found["hours"]) == 24


def test_what_cannot_be_is_one_line(capsys):
    code, _, err = run(capsys, "--speed", "400")
    assert (code, err.count("\n") <= 3) == (2, True)
    assert "one alone gets" in err
    assert run(capsys, "--hardware", "network_gb_s=fast")[0] == 2


def test_fit_lists_units_by_the_nodes_they_need_and_says_what_cannot_be(capsys):
    code, out, _ = run(capsys, "--fit", "--gpu", "h800", "--cached-tokens", "20000")
    assert code == 0
    assert "decode units of 40 nodes" in out
