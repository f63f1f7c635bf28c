"""Beginning, keys, ending: two processes that come and go together."""

import os
import signal
import socket
import threading
import time
from pathlib import Path

import httpx
import pytest

from .conftest import eventually

LONG = {
    "prompt": "In the beginning",
    "n": 16,
    "max_tokens": 480,
    "ignore_eos": True,
    "stream": True,
    "temperature": 1.0,
}


def is_running(process):
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"


def test_a_folder_that_is_no_model_is_an_error_of_one_line(start_server, tmp_path):
    live = start_server(folder=tmp_path / "nothing")
    assert live.ended() == 2
    assert "error: cannot load a model from" in live.text()
    assert "Traceback" not in live.text()


def test_what_the_engine_cannot_do_reaches_the_command_line(start_server):
    live = start_server("--weights", "int8", "--device", "cuda")
    assert live.ended() == 2
    assert "there is no CUDA device here" in live.text()
    assert "Traceback" not in live.text()


def test_a_port_in_use_is_said_before_the_model_is_loaded(start_server):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        live = start_server("--port", str(taken.getsockname()[1]))
        assert live.ended() == 2
    assert "cannot listen on 127.0.0.1 port" in live.text()
    assert "laid out" not in live.text()


def test_sigterm_lets_answers_end_and_takes_no_new_ones(start_server):
    live = start_server("--drain-timeout", "20").wait()
    lines = []

    def read():
        with httpx.stream("POST", f"{live.url}/v1/completions", json=LONG, timeout=60) as answer:
            for line in answer.iter_lines():
                lines.append(line)

    reader = threading.Thread(target=read)
    reader.start()
    eventually(lambda: lines)
    engine = live.engine_process()
    live.signal(signal.SIGTERM)
    assert live.ended() == 0
    reader.join(10)
    assert [line for line in lines if line][-1] == "data: [DONE]"
    assert sum('"finish_reason":"length"' in line for line in lines) == 16
    eventually(lambda: not any(is_running(process) for process in engine))
    assert "Traceback" not in live.text()


@pytest.mark.parametrize(("seconds", "signals"), [("0", 1), ("60", 2)], ids=["no time to drain", "told twice"])
def test_answers_that_do_not_end_in_time_are_broken_off(start_server, seconds, signals):
    live = start_server("--drain-timeout", seconds).wait()
    with httpx.stream("POST", f"{live.url}/v1/completions", json=LONG, timeout=60) as answer:
        next(answer.iter_lines())
        began = time.monotonic()
        for _ in range(signals):
            live.signal(signal.SIGTERM)
        assert live.ended(15) == 0
    assert time.monotonic() - began < 10


def test_an_engine_that_dies_ends_the_server_with_an_error(start_server):
    live = start_server("--host", "0.0.0.0").wait()
    assert "whoever reaches this address can use the model" in " ".join(live.text().split())
    with httpx.stream("POST", f"{live.url}/v1/completions", json=LONG, timeout=60) as answer:
        lines = answer.iter_lines()
        next(lines)
        (engine,) = live.engine_process()
        os.kill(engine, signal.SIGKILL)
        rest = [line for line in lines if line]
    assert any("the engine has ended" in line for line in rest)
    assert rest[-1] == "data: [DONE]"
    assert live.ended() == 2
    assert "error: the engine has ended" in live.text()


def test_a_server_that_is_killed_leaves_nothing_behind_and_starts_again_at_once(start_server, tmp_path):
    live = start_server(env={"TMPDIR": str(tmp_path)}).wait()
    assert not list(tmp_path.iterdir())
    (engine,) = live.engine_process()
    live.signal(signal.SIGKILL)
    live.ended()
    eventually(lambda: not is_running(engine), seconds=15)
    assert not list(tmp_path.iterdir())
    again = start_server().wait()
    answer = httpx.post(f"{again.url}/v1/completions", json={"prompt": "In", "max_tokens": 3}, timeout=30)
    assert answer.status_code == 200


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_a_long_text_being_encoded_keeps_no_other_answer_waiting(server, path):
    """Two processes, and encoding beside the event loop: pieces of an answer keep coming."""
    body = {"messages": [{"role": "user", "content": "x y " * 40_000}], "prompt": "x y " * 40_000}
    del body["prompt" if path.startswith("chat") else "messages"]
    gaps, refused = [], []

    def crowd():
        refused.append(httpx.post(f"{server.url}/v1/{path}", json=body, timeout=60).status_code)

    with httpx.stream("POST", f"{server.url}/v1/completions", json=LONG, timeout=60) as answer:
        lines = (line for line in answer.iter_lines() if line.startswith("data: {"))
        next(lines)
        sender = threading.Thread(target=crowd)
        sender.start()
        before = time.monotonic()
        for _ in lines:
            gaps.append(time.monotonic() - before)
            before = time.monotonic()
        sender.join()
    assert refused == [400]  # longer than the context
    assert sorted(gaps)[-3] < 0.5
