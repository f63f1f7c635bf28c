"""dsv3 plan experts."""

import json

import pytest

from dsv3.cli.main import main


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as ended:
        main(["plan", "experts", *map(str, arguments)])
    captured = capsys.readouterr()
    return ended.value.code, captured.out, captured.err


@pytest.fixture
def recorded(tmp_path):
    """Return a file as `dsv3 eval domains --json` prints it, of two domains and two layers."""
    file = tmp_path / "domains.json"
    domains = [
        {"name": "code", "tokens": 10, "relative": [[6.0, 3.0, 2.0, 1.0], [1.0, 1.0, 1.0, 1.0]]},
        {"name": "prose", "tokens": 10, "relative": [[1.0, 2.0, 3.0, 6.0], [1.0, 1.0, 1.0, 1.0]]},
    ]
    file.write_text(json.dumps({"window": 8, "layers": [1, 2], "domains": domains, "drafts": []}))
    return file


def test_recorded_loads_become_a_table_and_a_picture(capsys, recorded, tmp_path):
    code, out, _ = run(capsys, recorded, "--devices", 2, "--picture", tmp_path / "balance.png")
    assert code == 0
    assert "placed for this traffic" in out
    assert "placed for all traffic together" in out
    assert "1.25 (1.50)" in out  # code in order: 9 of 6 in one layer, even in the other
    assert (tmp_path / "balance.png").read_bytes()[:4] == b"\x89PNG"


def test_json_has_every_layer(capsys, recorded):
    _, out, _ = run(capsys, recorded, "--devices", 2, "--redundant", "0.5", "--json")
    found = json.loads(out)
    assert len(found["balances"]) == 2 * 3
    assert found["balances"][1]["copies"] == 2
    assert all(len(one["layers"]) == 2 for one in found["balances"])


def test_loads_known_before_are_what_experts_are_placed_for(capsys, recorded, tmp_path):
    code, out, _ = run(capsys, recorded, "--known", recorded, "--devices", 2, "--picture", tmp_path / "balance.png")
    assert code == 0
    assert out == run(capsys, recorded, "--devices", 2)[1]
    code, _, error = run(capsys, "--known", recorded)
    assert (code, error.count("\n")) == (2, 1)


def test_drawn_loads_are_named_an_assumption(capsys):
    code, out, _ = run(capsys, "--layers", 2)
    assert code == 0
    assert "assumption" in out
    assert "32 copies (12.5%)" in out


@pytest.mark.parametrize("text", ["no json", "[]", '{"domains": [{"name": "a"}]}', '{"domains": []}'])
def test_files_without_loads_are_refused_in_one_line(capsys, tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    code, _, error = run(capsys, tmp_path / "x.json")
    assert code == 2
    assert error.count("\n") == 1
    assert "x.json" in error


def test_a_file_that_is_not_there_is_refused(capsys, tmp_path):
    code, _, error = run(capsys, tmp_path / "none.json")
    assert (code, error.count("\n")) == (2, 1)
