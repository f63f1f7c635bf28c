import json
import signal
import subprocess
import sys
import time
from importlib import util
from pathlib import Path

import pytest

from dsv3.cli.main import main

PIECES = [{"content": "word "}] * 4
USAGE = {"prompt_tokens": 30, "completion_tokens": 8, "prompt_tokens_details": {"cached_tokens": 15}}


@pytest.fixture(scope="module")
def scripted():
    pytest.importorskip("fastapi", reason="needs dsv3[serve]")
    pytest.importorskip("uvicorn", reason="needs dsv3[serve]")
    name = "dsv3_bench_tests_scripted_server"
    path = Path(__file__).parents[1] / "serve" / "browser" / "scripted_server.py"
    spec = util.spec_from_file_location(name, path)
    sys.modules[name] = util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


@pytest.fixture
def server(scripted):
    with scripted.ScriptedServer() as server:
        server.scripts = [scripted.Script(deltas=PIECES, usage=USAGE, seconds_to_first=0.02)]
        yield server


def bench(*arguments: str) -> int:
    with pytest.raises(SystemExit) as left:
        main(["bench", "serve", *arguments])
    return left.value.code


def test_a_server_is_measured_into_a_table_a_file_and_a_picture(server, tmp_path, capsys):
    numbers, picture = tmp_path / "load.json", tmp_path / "load.png"
    options = ["--clients", "2", "--requests", "5", "--prompt-tokens", "10-20", "--output-tokens", "8", "--ignore-end"]
    assert bench(f"{server.url}/v1", *options, "--json", str(numbers), "--picture", str(picture)) == 0
    printed = capsys.readouterr().out
    assert "5 of 5 requests answered" in printed
    assert "50 % of them cached" in printed
    content = json.loads(numbers.read_text())
    assert content["summary"]["num_whole"] == len(content["requests"]) == 5
    assert content["settings"]["prompt_tokens"]["high"] == 20
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert all(body["ignore_eos"] for body in server.received)


def test_a_key_comes_from_the_environment_and_is_written_nowhere(server, tmp_path, monkeypatch, capsys):
    server.key = "secret-17"
    monkeypatch.setenv("DSV3_API_KEY", "secret-17")
    numbers = tmp_path / "load.json"
    assert bench(server.url, "--requests", "2", "--rate", "50", "--json", str(numbers)) == 0
    assert "secret-17" not in numbers.read_text()
    monkeypatch.delenv("DSV3_API_KEY")
    assert bench(server.url, "--requests", "2") == 2
    assert "it answers 401" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["http://127.0.0.1:1"], "no server answers at http://127.0.0.1:1"),
        (["http://127.0.0.1:1", "--clients", "2", "--rate", "3"], "give one of the two"),
        (["http://127.0.0.1:1", "--prompt-tokens", "many"], "--prompt-tokens many: use a number"),
        (["http://127.0.0.1:1", "--serve-options", "--x"], "runs already"),
        (["http://127.0.0.1:1", "--text", "/no/such/file"], "cannot be read as text"),
        (["no/such/folder"], "neither a folder nor an address"),
    ],
)
def test_what_cannot_be_loaded_is_refused_in_one_line(arguments, message, capsys):
    assert bench(*arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.strip().splitlines()[-1].startswith("error: ")


def test_an_interrupt_still_shows_what_was_measured(server):
    code = "from dsv3.cli.main import main; main()"
    load = subprocess.Popen(
        [sys.executable, "-c", code, "bench", "serve", server.url, "--duration", "60"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 30
        while len(server.received) < 30 and time.monotonic() < deadline:
            time.sleep(0.01)
        load.send_signal(signal.SIGINT)
        out, err = load.communicate(timeout=30)
    finally:
        load.kill()
    assert load.returncode == 130, err
    assert "requests answered" in out
    assert "Traceback" not in err


def test_without_the_client_the_extra_is_named():
    code = "import sys; sys.modules['httpx'] = None\nfrom dsv3.cli.main import main\nmain(['bench', 'serve', 'http://x:1'])"
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert finished.returncode == 2
    assert "pip install 'dsv3[serve]'" in finished.stderr
