"""dsv3 plan serve."""

import json

import pytest

from dsv3.cli import plan_serve
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


def test_fit_lists_units_by_the_nodes_they_need_with_the_imbalance_of_their_copies(capsys, tmp_path, monkeypatch):
    loads = tmp_path / "loads.json"
    relative = [[8.0 if expert == 9 else 1.0 for expert in range(256)]]
    loads.write_text(json.dumps({"domains": [{"name": "text", "relative": relative}]}))
    monkeypatch.setattr(plan_serve, "UNITS", (4, 40))
    monkeypatch.setattr(plan_serve, "REDUNDANCY", (0, 32))
    code, out, err = run(capsys, "--fit", "--cached-tokens", "20000", "--loads", str(loads))
    assert code == 0, err
    assert "decode units of 40 nodes" in out
    assert "computed: the imbalance" in out
    rows = {line.split("  ")[0]: line.split()[7] for line in out.splitlines() if line.startswith("decode units of 4 ")}
    # 32 GPUs of 8 experts: one has 15 to do, and all 263 / 32. With 32 copies the busy expert is no more than others.
    assert float(rows["decode units of 4 nodes, 0 copies"]) == pytest.approx(15 / (263 / 32) - 1, abs=1e-3)
    assert float(rows["decode units of 4 nodes, 32 copies"]) < 0.1


def test_what_is_assumed_of_the_imbalance_is_said_and_loads_of_another_model_are_refused(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(plan_serve, "UNITS", ())
    assert "assumption: an imbalance of 0.1 whatever the copies" in run(capsys, "--fit", "--imbalance", "0.1")[1]
    loads = tmp_path / "loads.json"
    loads.write_text(json.dumps({"domains": [{"name": "text", "relative": [[1.0] * 64]}]}))
    code, _, err = run(capsys, "--loads", str(loads))
    assert (code, "loads of 64 experts a layer, and the model that is planned has 256" in err) == (2, True)
    code, _, err = run(capsys, "--loads", str(loads), "--imbalance", "0.1")
    assert (code, "both say how even experts are" in err) == (2, True)
