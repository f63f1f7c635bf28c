"""The engine's process spoke to directly: requests, cancelling, and its books."""

import asyncio
import subprocess
import sys

import msgspec
import pytest

from dsv3.config import EngineConfig, ServerConfig
from dsv3.errors import ConfigError
from dsv3.infer.events import FinishReason
from dsv3.infer.params import SamplingParams
from dsv3.serve.engine_client import OneEngine
from dsv3.serve.messages import Ask, ProcessSettings, Refused


def config_of(folder, **changes):
    return ServerConfig(**{"model": str(folder), "threads": 1, "engine": EngineConfig(page_tokens=4)} | changes)


async def with_client(config, use):
    client = OneEngine(config)
    try:
        await client.start()
        return await use(client)
    finally:
        await client.stop()


def ask(name, *, prompt=(5, 6, 7), **params):
    return Ask(name, list(prompt), SamplingParams(**{"temperature": 0.0, "max_tokens": 8, "ignore_end": True} | params))


def test_events_reach_whoever_asked_and_the_books_are_in_order_afterwards(tiny_folder):
    async def use(client):
        first, second = client.ask(ask("a")), client.ask(ask("b", max_tokens=500))
        refused = client.ask(ask("c", prompt=[5, 100_000]))
        assert isinstance(await refused.get(), Refused)
        await second.get()
        client.forget(["b", "never asked"])
        tokens = []
        while True:
            event = await first.get()
            tokens += event.tokens
            if event.finish_reason is not None:
                break
        assert (len(tokens), event.finish_reason) == (8, FinishReason.MAX_TOKENS)
        while client.stats.num_pages_in_use or client.stats.num_running:
            await asyncio.sleep(0.01)
        assert client.num_open == 0
        assert await client.check() == ""

    asyncio.run(asyncio.wait_for(with_client(config_of(tiny_folder), use), 60))


def test_a_model_that_cannot_be_loaded_is_the_engines_own_words(tiny_folder):
    config = config_of(tiny_folder, weights="int8", device="cuda")
    with pytest.raises(ConfigError, match="there is no CUDA device here"):
        asyncio.run(with_client(config, None))


def test_an_engine_whose_parent_ended_while_it_began_ends_too(tiny_folder, tmp_path):
    command = [sys.executable, "-m", "dsv3.serve.engine_process", f"ipc://{tmp_path}/nobody", "1"]
    settings = msgspec.json.encode(ProcessSettings(config_of(tiny_folder)))
    subprocess.run(command, input=settings, timeout=60, check=True)
