"""Clients that misbehave: each costs itself its answer, and nobody else anything."""

import json
import signal
import socket
import threading
import time

import httpx
import pytest

from .conftest import LiveServer, eventually

LONG = {"prompt": "In the beginning", "max_tokens": 480, "ignore_eos": True, "temperature": 1.0}


@pytest.fixture(scope="module")
def guarded(tiny_folder, tmp_path_factory):
    """A server that asks for keys, and is strict with bodies."""
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text("first-key\nsecond-key\n")
    options = ["--api-key-file", str(keys), "--cors-origin", "https://chat.example"]
    options += ["--body-limit-mb", "0.01", "--body-timeout", "0.5"]
    live = LiveServer(tiny_folder, *options, env={"DSV3_API_KEY": "secret"})
    try:
        yield live.wait()
    finally:
        live.close()


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


def test_clients_that_hang_up_leave_nothing_in_the_log(server):
    lines = len(server.said)
    for stream in (False, True):
        for _ in range(3):
            connection = request(server, body=json.dumps({**LONG, "n": 4, "stream": stream}))
            eventually(lambda: server.metric("dsv3_num_requests_running") > 0)
            connection.close()
            eventually(lambda: idle(server))
    said = " ".join([*server.said][lines:])
    assert "Traceback" not in said
    assert "Error" not in said


def test_a_body_that_never_ends_is_answered_in_time(guarded):
    key = "Authorization: Bearer secret\r\n"
    with request(guarded, body='{"prompt": "', said=1000, headers=key) as connection:
        answer = connection.recv(65536).decode()
        assert answer.startswith("HTTP/1.1 408")
        read_to_the_end(connection)


def test_a_key_is_looked_at_before_the_body(guarded):
    address = f"{guarded.url}/v1/completions"
    for body in (b"{", b" " * 200_000):
        assert httpx.post(address, content=body).status_code == 401
    for given, status in (("bearer secret", 200), ("BEARER  secret", 200), ("secret", 401), ("Basic secret", 401)):
        answer = httpx.post(address, json={"prompt": "x", "max_tokens": 1}, headers={"Authorization": given})
        assert (given, answer.status_code) == (given, status)


def test_a_key_is_asked_for_where_there_is_one_and_told_nowhere(guarded):
    models = f"{guarded.url}/v1/models"
    assert httpx.get(models).status_code == 401
    assert httpx.get(models, headers={"Authorization": "Bearer wrong"}).json()["error"]["code"] == "invalid_api_key"
    for key in ("first-key", "second-key", "secret"):
        assert httpx.get(models, headers={"Authorization": f"Bearer {key}"}).status_code == 200
    assert [httpx.get(f"{guarded.url}{path}").status_code for path in ("/", "/health", "/metrics")] == [200, 200, 200]
    said = guarded.text()
    assert "key" not in said
    assert "secret" not in said


def test_answers_that_the_end_cuts_short_are_told_so(start_server):
    live = start_server("--drain-timeout", "0.3").wait()
    found = {}

    def ask(stream):
        body = {**LONG, "n": 16, "stream": stream}
        found[stream] = httpx.post(f"{live.url}/v1/completions", json=body, timeout=60)

    asking = [threading.Thread(target=ask, args=(stream,)) for stream in (True, False)]
    for thread in asking:
        thread.start()
    eventually(lambda: live.metric("dsv3_num_requests_running") > 16)
    live.signal(signal.SIGTERM)
    assert live.ended(10) == 0
    for thread in asking:
        thread.join()
    lines = [line for line in found[True].text.splitlines() if line]
    assert lines[-1] == "data: [DONE]"
    assert json.loads(lines[-2].removeprefix("data: "))["error"]["type"] == "server_error"
    assert (found[False].status_code, found[False].json()["error"]["type"]) == (503, "server_error")
    assert "Traceback" not in live.text()


def test_two_servers_cannot_have_one_port(server, start_server):
    second = start_server("--port", server.url.rsplit(":", 1)[1])
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


def test_pages_of_other_origins_may_ask_only_where_allowed(guarded):
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    for origin, allowed in (("https://chat.example", "https://chat.example"), ("https://evil.example", None)):
        answer = httpx.options(f"{guarded.url}/v1/completions", headers={"Origin": origin, **asked})
        assert answer.headers.get("access-control-allow-origin") == allowed
        refused = httpx.post(f"{guarded.url}/v1/completions", json={"prompt": "x"}, headers={"Origin": origin})
        assert (refused.status_code, refused.headers.get("access-control-allow-origin")) == (401, allowed)
