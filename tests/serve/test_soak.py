"""Many bad clients for a long time: no page is lost, nothing hangs, memory does not grow, everyone is answered.

DSV3_SOAK_SECONDS says for how long; by default a minute and a half.
"""

import asyncio
import json
import os
import random
import signal
import time
from collections import Counter
from pathlib import Path

import httpx
import pytest

from .conftest import eventually
from .test_edge import idle, request

SECONDS = float(os.environ.get("DSV3_SOAK_SECONDS", "90"))
CLIENTS = 64
PROMPTS = ("In the beginning", "word " * 60, "你好，世界！" * 20, "x", '{"name": [1, 2')
MOST_GROWTH = 1.15
"""Of the memory of both processes, from a quarter of the time to its end."""


class Soak:
    """What the clients of a server have seen."""

    def __init__(self, live):
        self.live = live
        self.url = f"{live.url}/v1/completions"
        self.seen = Counter()
        self.faults = []
        self.until = time.monotonic() + SECONDS

    async def client(self, number):
        """Do one thing after another until the time is up."""
        rng = random.Random(number)
        kinds = [self.whole, self.stream, self.hang_up, self.hang_up_early, self.slow, self.bad, self.large, self.chat]
        async with httpx.AsyncClient(timeout=60) as http:
            while time.monotonic() < self.until:
                kind = rng.choice(kinds)
                try:
                    await asyncio.wait_for(kind(http, rng), 90)
                except TimeoutError:
                    self.faults.append(f"{kind.__name__} hangs")
                except Exception as error:  # Whatever a client meets is for the test to tell.
                    self.faults.append(f"{kind.__name__}: {error!r}")

    def body(self, rng, **options):
        return {
            "prompt": rng.choice(PROMPTS),
            "max_tokens": rng.randint(1, 150),
            "temperature": rng.choice([0.0, 1.0]),
            "n": rng.choice([1, 1, 1, 3]),
            "ignore_eos": rng.random() < 0.5,
            **({"guided_regex": "[a-z]{3,20}"} if rng.random() < 0.1 else {}),
            **options,
        }

    def count(self, kind, answer, *, among):
        self.seen[f"{kind} {answer.status_code}"] += 1
        if answer.status_code not in among:
            self.faults.append(f"{kind}: {answer.status_code} {answer.text[:200]}")

    async def whole(self, http, rng):
        body = self.body(rng)
        answer = await http.post(self.url, json=body)
        self.count("whole", answer, among=(200, 429))
        if answer.status_code == 200 and not all(choice["finish_reason"] for choice in answer.json()["choices"]):
            self.faults.append("an answer without an end")

    async def chat(self, http, rng):
        messages = [{"role": "user", "content": rng.choice(PROMPTS)}]
        url = self.url.replace("completions", "chat/completions")
        answer = await http.post(url, json={"messages": messages, "max_tokens": rng.randint(1, 60)})
        self.count("chat", answer, among=(200, 429))

    async def stream(self, http, rng):
        async with http.stream("POST", self.url, json=self.body(rng, stream=True)) as answer:
            lines = [line async for line in answer.aiter_lines() if line.startswith("data:")]
        self.seen[f"stream {answer.status_code}"] += 1
        if answer.status_code == 200 and (lines[-1] != "data: [DONE]" or '"error"' in lines[-2]):
            self.faults.append(f"a stream ends with {lines[-2:]}")

    async def hang_up(self, http, rng):
        async with http.stream("POST", self.url, json=self.body(rng, stream=True, max_tokens=400)) as answer:
            async for _ in answer.aiter_lines():
                break
        self.seen["hung up"] += 1

    async def hang_up_early(self, http, rng):
        try:
            await http.post(self.url, json=self.body(rng, max_tokens=400), timeout=rng.uniform(0.001, 0.2))
        except httpx.TimeoutException:
            self.seen["hung up early"] += 1

    async def slow(self, http, rng):
        async with http.stream("POST", self.url, json=self.body(rng, stream=True, max_tokens=20)) as answer:
            async for _ in answer.aiter_bytes():
                await asyncio.sleep(rng.uniform(0, 0.1))
        self.seen["slow"] += 1

    async def bad(self, http, rng):
        content = rng.choice([b"", b"{", b"[]", b"\xff", b'{"prompt": 5}', b'{"prompt": "x", "n": 99}'])
        answer = await http.post(self.url, content=content)
        self.count("bad", answer, among=(400,))

    async def large(self, http, rng):
        prompt = "x " * rng.choice([1_000, 400_000])  # beyond the context, or beyond the body's limit
        answer = await http.post(self.url, json={"prompt": prompt})
        self.count("large", answer, among=(400, 413))


@pytest.mark.slow
def test_a_server_outlives_its_clients(start_server):
    live = start_server(
        "--drafts", "2", "--page-tokens", "16", "--cache-tokens", "4096", "--body-limit-mb", "0.5", "--slow-reader", "5"
    ).wait()
    soak = Soak(live)

    async def all_of_it():
        sizes = asyncio.create_task(watch_memory(live, until=soak.until))
        half_open = [request(live, body="{", said=100) for _ in range(8)]  # and clients that never say more
        await asyncio.gather(*(soak.client(number) for number in range(CLIENTS)))
        for connection in half_open:
            connection.close()
        return await sizes

    sizes = asyncio.run(all_of_it())
    print(json.dumps(dict(sorted(soak.seen.items()))), [f"{size / 1e6:.0f} MB" for size in sizes])
    assert not soak.faults
    eventually(lambda: idle(live) and live.metric("dsv3_num_requests_waiting") == 0, seconds=20)
    assert max(sizes[-3:]) < MOST_GROWTH * max(sizes[: len(sizes) // 4])
    time.sleep(1.5)  # The engine looks through its books when it has been idle for a second.
    assert "Traceback" not in live.text()
    assert "do not add up" not in live.text()
    began = time.monotonic()
    live.signal(signal.SIGTERM)
    assert live.ended(10) == 0
    assert time.monotonic() - began < 5


async def watch_memory(live, *, until):
    """Return the resident size of both processes, as it goes on."""
    processes = [live.process.pid, *live.engine_process()]
    sizes = []
    while time.monotonic() < until:
        await asyncio.sleep(SECONDS / 30)
        sizes.append(sum(resident(process) for process in processes))
    return sizes


def resident(process):
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
