import json

import pytest

from dsv3.cli.main import main


def run(*arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["schedule", *map(str, arguments)])
    said = capsys.readouterr()
    return caught.value.code, said.out, said.err


def test_the_published_run_under_every_schedule(capsys):
    status, out, _ = run("--json", capsys=capsys)
    found = json.loads(out)
    assert status == 0
    assert "multiple of 16; 128 would do" in found["refused"]["interleaved"]
    rows = found["schedules"]
    # Table 2 at 16 ranks with F = 1, B = 2, W = 1 and F&B = 3.
    assert {name: rows[name]["bubble"] for name in ("1f1b", "zb1p", "dualpipe")} == {
        "1f1b": 45,
        "zb1p": 15,
        "dualpipe": 14,
    }
    assert (rows["1f1b"]["activations"], rows["dualpipe"]["activations"]) == (16, 17)
    assert (rows["1f1b"]["stages_a_rank"], rows["dualpipe"]["stages_a_rank"]) == (1, 2)


def test_a_picture_is_drawn_of_one_schedule(tmp_path, capsys):
    picture = tmp_path / "dualpipe.png"
    status, out, _ = run("dualpipe", "--ranks", 8, "--micro-batches", 20, "--picture", picture, capsys=capsys)
    assert status == 0
    assert "dualpipe" in out
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["dulpipe"], "there is no schedule 'dulpipe'"),
        (["dualpipe", "--ranks", "5"], "an even number of ranks"),
        (["--picture", "x.png"], "--picture draws one schedule"),
        (["1f1b", "--backward", "1", "--weight", "2"], "backward holds weight"),
        (["1f1b", "--picture", "/nowhere/x.png"], "cannot be written"),
    ],
)
def test_what_cannot_be_is_told_in_one_line(arguments, message, capsys):
    status, _, err = run(*arguments, capsys=capsys)
    assert status == 2
    assert message in err
    assert "Traceback" not in err
