"""Clients that misbehave: each costs itself its answer, and nobody else anything."""

import json
import signal
import socket
import threading
import time

import httpx
import pytest

from .conftest import eventually

LONG = {"prompt": "In the beginning", "max_tokens": 480, "ignore_eos": True, "temperature": 1.0}


def request(live, *, body, said=None, headers=""):
    """Open a connection and send a request by hand."""
    host, port = live.url.removeprefix("http://").split(":")
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.settimeout(30)
    connection.connect((host, int(port)))
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\n{headers}Content-Type: application/json\r\n"
    connection.sendall(f"{head}Content-Length: {len(body) if said is None else said}\r\n\r\n{body}".encode())
    return connection


def read_to_the_end(connection):
    while connection.recv(65536):
        pass


def idle(live):
    return live.metric("dsv3_cache_pages_in_use") == 0 and live.metric("dsv3_num_requests_running") == 0


def test_a_reader_that_does_not_read_is_cut_off(start_server):
    live = start_server("--slow-reader", "0.5", "--request-timeout", "600").wait()
    options = {"n": 16, "logprobs": 20, "stream": True}  # megabytes, beyond every buffer on the way
    with request(live, body=json.dumps({**LONG, **options})) as connection:
        eventually(lambda: live.metric("dsv3_num_requests_running") > 0)
        eventually(lambda: idle(live), seconds=30)
        # All tokens may have been made before the reader was found to be slow: give it no chance to be in time.
        time.sleep(2)
        began = time.monotonic()
        with pytest.raises(ConnectionResetError):
            read_to_the_end(connection)
        assert time.monotonic() - began < 5
    live.signal(signal.SIGTERM)
    assert live.ended(10) == 0
    assert "Traceback" not in live.text()


def test_clients_that_hang_up_leave_nothing_in_the_log(start_server):
    live = start_server().wait()
    for stream in (False, True):
        for _ in range(3):
            connection = request(live, body=json.dumps({**LONG, "n": 4, "stream": stream}))
            eventually(lambda: live.metric("dsv3_num_requests_running") > 0)
            connection.close()
            eventually(lambda: idle(live))
    assert "Traceback" not in live.text()
    assert "Error" not in live.text()


def test_a_body_that_never_ends_is_answered_in_time(start_server):
    live = start_server("--body-timeout", "0.5").wait()
    with request(live, body='{"prompt": "', said=1000) as connection:
        answer = connection.recv(65536).decode()
        assert answer.startswith("HTTP/1.1 408")
        read_to_the_end(connection)


def test_a_key_is_looked_at_before_the_body(start_server):
    live = start_server("--body-limit-mb", "0.01", env={"DSV3_API_KEY": "secret"}).wait()
    address = f"{live.url}/v1/completions"
    for body in (b"{", b" " * 200_000):
        assert httpx.post(address, content=body).status_code == 401
    for given, status in (("bearer secret", 200), ("BEARER  secret", 200), ("secret", 401), ("Basic secret", 401)):
        answer = httpx.post(address, json={"prompt": "x", "max_tokens": 1}, headers={"Authorization": given})
        assert (given, answer.status_code) == (given, status)


@pytest.mark.parametrize("stream", [True, False])
def test_an_answer_that_the_end_cuts_short_is_told_so(start_server, stream):
    live = start_server("--drain-timeout", "0.3").wait()
    found = []

    def ask():
        body = {**LONG, "n": 16, "stream": stream}
        found.append(httpx.post(f"{live.url}/v1/completions", json=body, timeout=60))

    asking = threading.Thread(target=ask)
    asking.start()
    eventually(lambda: live.metric("dsv3_num_requests_running") > 0)
    live.signal(signal.SIGTERM)
    assert live.ended(10) == 0
    asking.join()
    (answer,) = found
    if stream:
        lines = [line for line in answer.text.splitlines() if line]
        assert lines[-1] == "data: [DONE]"
        assert json.loads(lines[-2].removeprefix("data: "))["error"]["type"] == "server_error"
    else:
        assert (answer.status_code, answer.json()["error"]["type"]) == (503, "server_error")
    assert "Traceback" not in live.text()


def test_nothing_is_left_behind_by_a_kill(start_server, tmp_path):
    live = start_server(env={"TMPDIR": str(tmp_path)}).wait()
    assert not list(tmp_path.iterdir())
    live.signal(signal.SIGKILL)
    live.ended()
    assert not list(tmp_path.iterdir())


def test_two_servers_cannot_have_one_port(start_server):
    live = start_server().wait()
    second = start_server("--port", live.url.rsplit(":", 1)[1])
    assert second.ended() == 2
    assert "cannot listen on" in second.text()


def test_no_token_in_time_is_a_timeout(start_server):
    live = start_server("--queue-timeout", "1", "--max-sequences", "1").wait()
    connections = [request(live, body=json.dumps({**LONG, "n": 16, "stream": True})) for _ in range(3)]
    eventually(lambda: live.metric("dsv3_num_requests_waiting") > 40)
    answer = httpx.post(f"{live.url}/v1/completions", json={"prompt": "x"}, timeout=10)
    assert (answer.status_code, answer.json()["error"]["type"]) == (504, "server_error")
    for connection in connections:
        connection.close()
    eventually(lambda: idle(live))


def test_pages_of_other_origins_may_ask_only_where_allowed(start_server):
    live = start_server("--cors-origin", "https://chat.example", env={"DSV3_API_KEY": "secret"}).wait()
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    for origin, allowed in (("https://chat.example", "https://chat.example"), ("https://evil.example", None)):
        answer = httpx.options(f"{live.url}/v1/completions", headers={"Origin": origin, **asked})
        assert answer.headers.get("access-control-allow-origin") == allowed
        refused = httpx.post(f"{live.url}/v1/completions", json={"prompt": "x"}, headers={"Origin": origin})
        assert (refused.status_code, refused.headers.get("access-control-allow-origin")) == (401, allowed)
