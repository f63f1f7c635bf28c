"""A server that is started to be loaded, and stopped afterwards."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from dsv3.errors import ConfigError

ADDRESS = re.compile(rb"https?://[\w.\-\[\]:]+:\d+")
STOP_SECONDS = 30.0
"""Given to a server to end what it does, before it is killed."""


@contextmanager
def started_server(
    model: str, *, options: Sequence[str], timeout_seconds: float = 600.0, program: Sequence[str] = ()
) -> Iterator[str]:
    """Run `dsv3 serve MODEL` on a free port, and give its address once it answers. It ends when it is left.

    `program` stands for `dsv3` in tests.

    Raises:
        ConfigError: it ended, or did not say where it listens in time; its last lines are in the message.
    """
    command = [*(program or (sys.executable, "-m", "dsv3.cli.main")), "serve", model, "--port", "0", *options]
    # In a session of its own, so that Ctrl-C ends the load first, and the server with all its processes then.
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
    said: deque[bytes] = deque(maxlen=20)
    address = _Address()
    reader = threading.Thread(target=_read_log, args=(process,), kwargs={"said": said, "address": address}, daemon=True)
    reader.start()
    try:
        if not address.found.wait(timeout_seconds) or not address.url:
            log = b" | ".join(said).decode(errors="replace")
            raise ConfigError(f"'dsv3 serve {model}' did not say where it listens; it said: {log or '(nothing)'}")
        _wait_until_healthy(address.url, process=process, timeout_seconds=timeout_seconds)
        yield address.url
    finally:
        _stop(process)
        reader.join(timeout=5)
        assert process.stdout is not None
        process.stdout.close()


class _Address:
    """Where a server listens, once it has said so; empty if it ended without."""

    def __init__(self) -> None:
        self.url = ""
        self.found = threading.Event()


def _read_log(process: subprocess.Popen[bytes], *, said: deque[bytes], address: _Address) -> None:
    """Read what a server says until it ends: a full pipe would stop it."""
    assert process.stdout is not None
    for line in process.stdout:
        said.append(line.strip())
        match = ADDRESS.search(line)
        if match and not address.url:
            address.url = match.group().decode("ascii")
            address.found.set()
    address.found.set()


def _wait_until_healthy(url: str, *, process: subprocess.Popen[bytes], timeout_seconds: float) -> None:
    """Return when a server answers that it is ready; its address may be known long before."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # It is on this machine.
    deadline = time.monotonic() + timeout_seconds
    while process.poll() is None and time.monotonic() < deadline:
        try:
            with opener.open(f"{url}/health", timeout=5):
                return
        except OSError:  # Not listening yet, or not ready (503).
            time.sleep(0.05)
    raise ConfigError(f"the server at {url} was started, but did not become ready")


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End a server and all processes it started, whether or not it still runs itself."""
    deadline = time.monotonic() + STOP_SECONDS
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    while process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    with suppress(ProcessLookupError):  # All gone.
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
