import os
import sys
import time
import urllib.request

import pytest

from dsv3.errors import ConfigError
from dsv3.serve.load.started import started_server

SERVER = """
import http.server, subprocess, sys
assert sys.argv[1:5] == ["serve", "runs/x", "--port", "0"], sys.argv
class Healthy(http.server.BaseHTTPRequestHandler):
    asked = 0
    def do_GET(self):
        Healthy.asked += 1
        self.send_response(503 if Healthy.asked < 3 else 200)
        self.end_headers()
        self.wfile.write(str(Healthy.asked).encode())
    def log_message(self, *_): pass
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
server = http.server.HTTPServer(("127.0.0.1", 0), Healthy)
print("options", sys.argv[5:], "child", child.pid)
print(f"listening on http://127.0.0.1:{server.server_port} now", flush=True)
print("x" * 300_000, flush=True)  # More than a pipe holds.
server.serve_forever()
"""


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that nobody has waited for yet does not."""
    try:
        with open(f"/proc/{pid}/stat") as file:  # noqa: PTH123
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_the_server_is_given_when_it_is_ready_and_ends_with_all_it_started(tmp_path):
    program = [
        sys.executable,
        "-c",
        SERVER.replace(
            'print("options"', f"print(open({str(tmp_path / 'log')!r}, 'w').write(str(child.pid)), \"options\""
        ),
    ]
    with started_server("runs/x", options=["--weights", "int8"], program=program) as url:
        with urllib.request.urlopen(url) as answer:
            assert int(answer.read()) > 3
        child = int((tmp_path / "log").read_text())
        assert is_alive(child)
    deadline = time.monotonic() + 5
    while is_alive(child) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not is_alive(child)


def test_a_server_that_ends_at_once_is_refused_with_its_last_words():
    program = [sys.executable, "-c", "print('error: no such model'); raise SystemExit(2)"]
    began = time.monotonic()
    with pytest.raises(ConfigError, match="no such model"), started_server("x", options=[], program=program):
        pass
    assert time.monotonic() - began < 10


def test_a_server_that_never_says_where_it_is_gets_killed():
    program = [sys.executable, "-c", "import os, time; print('pid', os.getpid(), flush=True); time.sleep(600)"]
    with (
        pytest.raises(ConfigError, match=r"pid \d+") as refused,
        started_server("x", options=[], program=program, timeout_seconds=1.0),
    ):
        pass
    pid = int(str(refused.value).split("pid ")[1].split()[0].rstrip("'"))
    assert not is_alive(pid)
    assert pid != os.getpid()
