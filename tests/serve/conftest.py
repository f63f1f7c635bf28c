"""A tiny model with a tokenizer, and a real server of it."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque

import httpx
import pytest
import torch

TEXTS = ['In the beginning there was a word, and the word was with us. 你好，世界！ {"name": [1, 2.5, true]}\n'] * 3


class LiveServer:
    """A `dsv3 serve` that runs, and what it has said."""

    def __init__(self, folder, *options, env=None):
        command = [
            sys.executable,
            "-m",
            "dsv3.cli.main",
            "serve",
            str(folder),
            "--port",
            "0",
            "--threads",
            "1",
            *options,
        ]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={**os.environ, **(env or {})}, text=True
        )
        self.said = deque(maxlen=200)
        self.url = ""
        self._heard = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def wait(self, seconds=60.0):
        assert self._heard.wait(seconds), f"it did not start: {list(self.said)}"
        assert self.url, f"it ended: {list(self.said)}"
        return self

    def _read(self):
        for line in self.process.stdout:
            self.said.append(line.strip())
            if "http://" in line and " serves " in line:
                self.url = line[line.index("http://") :].split()[0]
                self._heard.set()
        self._heard.set()

    def text(self):
        return "\n".join(self.said)

    def signal(self, number):
        self.process.send_signal(number)

    def ended(self, seconds=30.0):
        status = self.process.wait(seconds)
        self._reader.join(5)
        return status

    def engine_process(self):
        """The id of the engine's process: the server's one child."""
        listed = subprocess.run(["pgrep", "-P", str(self.process.pid)], capture_output=True, text=True, check=False)
        return [int(line) for line in listed.stdout.split()]

    def metric(self, name):
        for line in httpx.get(f"{self.url}/metrics").text.splitlines():
            if line.startswith(f"{name} ") or line.startswith(f"{name}{{"):
                return float(line.rsplit(" ", 1)[1])
        raise AssertionError(f"no metric {name}")

    def close(self):
        if self.process.poll() is None:
            self.signal(signal.SIGTERM)
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                self.process.kill()
        self.process.wait()
        self._reader.join(5)
        self.process.stdout.close()


def eventually(what, *, seconds=10.0):
    """Return what `what` gives once it is true."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := what():
            return found
        time.sleep(0.02)
    raise AssertionError(f"still not true after {seconds} s")


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A published-format folder of a random model with one MTP module and a context of 512."""
    from dsv3.checkpoint.published import save_published
    from dsv3.config import ModelConfig
    from dsv3.data.tokenizer import Tokenizer
    from dsv3.model.transformer import Transformer

    folder = tmp_path_factory.mktemp("serve")
    tokenizer = Tokenizer.train(TEXTS, vocab_size=330)
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size + 6,
        hidden_size=32,
        num_hidden_layers=2,
        initializer_range=0.2,
        max_position_embeddings=512,
        num_attention_heads=2,
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=8,
        intermediate_size=32,
        moe_intermediate_size=8,
        first_k_dense_replace=1,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
    )
    model = Transformer(config)
    model.init_weights(generator=torch.Generator().manual_seed(3))
    tokenizer.save(folder / "tokenizer")
    save_published(model, folder=folder / "tiny", tokenizer_folder=folder / "tokenizer", dtype=torch.float32)
    return folder / "tiny"


@pytest.fixture(scope="session")
def server(tiny_folder):
    """One server for all tests that leave it as they found it."""
    live = LiveServer(
        tiny_folder,
        "--drafts",
        "2",
        "--no-adaptive-drafts",
        "--page-tokens",
        "16",
        "--queue-limit",
        "40",
        "--body-limit-mb",
        "0.2",
    )
    try:
        yield live.wait()
    finally:
        live.close()


@pytest.fixture
def start_server(tiny_folder):
    """Start servers that end with the test."""
    started = []

    def start(*options, env=None, folder=None):
        started.append(LiveServer(folder or tiny_folder, *options, env=env))
        return started[-1]

    yield start
    for live in started:
        live.close()
