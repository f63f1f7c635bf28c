import pytest

from dsv3.cli.main import main


def test_a_folder_without_a_run_is_one_line_on_the_error_stream(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["report", str(tmp_path)])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path} holds neither config.json nor metrics.jsonl")


def test_the_path_of_the_report_is_printed(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text('{"kind": "step", "step": 1, "tokens": 10, "loss": 2.0}\n')
    with pytest.raises(SystemExit) as stopped:
        main(["report", str(tmp_path)])
    assert stopped.value.code == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "report.html")
