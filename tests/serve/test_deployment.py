"""Prefill and decoding apart: answers are those of one engine, whatever ends while they are made."""

import asyncio
import json
import os
import random
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from dsv3.config import EngineConfig, JoinConfig, ServerConfig
from dsv3.config.address import Address
from dsv3.errors import ConfigError, EngineError
from dsv3.infer.events import FinishReason
from dsv3.infer.loaded import load
from dsv3.infer.params import SamplingParams
from dsv3.infer.request import Request
from dsv3.serve import deployment as deployment_module
from dsv3.serve.deployment import Deployment
from dsv3.serve.fleet import Kind
from dsv3.serve.joining import Machine
from dsv3.serve.machines import RemoteWorker
from dsv3.serve.messages import Ask, HandTo, Refused

from .conftest import eventually

SECRET = "known to all machines"
ENGINE = EngineConfig(page_tokens=4, max_step_tokens=16, max_drafts=1, adaptive_drafts=False)


def config_of(folder, **changes):
    settings = {"model": str(folder), "threads": 1, "engine": ENGINE, "prefill_workers": 1, "decode_workers": 1}
    return ServerConfig(**(settings | changes))


def asks(count, *, max_tokens=24):
    """Greedy and seeded, short and long, some beginning alike."""
    chance = random.Random(1)
    for place in range(count):
        prompt = [chance.randint(5, 200)] if place % 3 else [9, 8, 7, 6] * 6
        prompt += [chance.randint(5, 200) for _ in range(chance.randint(1, 60))]
        params = SamplingParams(
            temperature=float(place % 2),
            seed=place,
            max_tokens=max_tokens,
            ignore_end=True,
            repetition_penalty=1.1 if place % 4 == 0 else 1.0,
        )
        yield Ask(f"{place}", prompt, params, num_logprobs=1 if place % 5 == 0 else None)


@pytest.fixture(scope="module")
def expected(tiny_folder):
    """What one engine of this process answers."""
    known = {}
    engine = load(tiny_folder, device="cpu", drafts=1).new_engine(ENGINE, cache_tokens=2000)

    def answer(ask):
        key = (tuple(ask.prompt_ids), ask.params)
        if key not in known:
            engine.add(Request(id="a", prompt_ids=ask.prompt_ids, params=ask.params))
            known[key] = [
                token for _ in iter(lambda: engine.has_work, False) for e in engine.step() for token in e.tokens
            ]
        return known[key]

    return answer


async def collect(inbox, *, seconds=60.0):
    tokens, events = [], []
    while True:
        event = await asyncio.wait_for(inbox.get(), seconds)
        events.append(event)
        if isinstance(event, Refused):
            return tokens, events
        tokens += event.tokens
        if event.finish_reason is not None:
            return tokens, events


async def in_order(deployment, *, seconds=20.0):
    """See that no worker holds anything for nobody."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        fault = await deployment.check()
        held = [member.stats.num_pages_in_use for member in deployment.members]
        if not fault and not any(held) and all(member.is_up for member in deployment.members):
            return
        await asyncio.sleep(0.05)
    raise AssertionError(f"held: {held}; {fault}; {deployment.members}")


class Live:
    """A deployment in an event loop of its own, which tests share."""

    def __init__(self, config, *, machines=()):
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.deployment = Deployment(config)
        self.deployment.brought_by = self.machines = []
        self.run(self._start(machines))

    async def _start(self, machines):
        """Start it, and the machines that bring its workers: (prefill, decode) of each."""
        starting = asyncio.ensure_future(self.deployment.start())
        if machines:
            await until(lambda: starting.done() or self.deployment._machines._server is not None)
        for prefill, decode in machines:
            self.join(prefill_workers=prefill, decode_workers=decode)
        await starting

    def join(self, **workers):
        """Let a machine join, which is a task of this process; its workers are processes."""
        server = Address(host="127.0.0.1", port=self.deployment._machines.port)
        config = JoinConfig(model=self.deployment._config.model, server=server, secret=SECRET, threads=1, **workers)
        machine = Machine(config)
        machine.task = asyncio.ensure_future(machine.run())
        self.machines.append(machine)

    def run(self, work, *, seconds=180):
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(seconds)

    def use(self, test):
        return self.run(test(self.deployment))

    def close(self):
        self.run(self.deployment.stop())
        for machine in self.machines:
            self.run(asyncio.wait([machine.task]))
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


@pytest.fixture(scope="module")
def live(tiny_folder):
    """One worker that reads, and two that go on, brought by two machines."""
    at = {"workers_at": "127.0.0.1:0", "secret": SECRET}
    live = Live(config_of(tiny_folder, decode_workers=2, worker_timeout_seconds=4.0, **at), machines=[(1, 1), (0, 1)])
    yield live
    live.close()


def pid_of(deployment, name):
    (slot,) = [slot for slot in deployment._fleet.slots if slot.name == name]
    worker = slot.worker
    if isinstance(worker, RemoteWorker):
        (worker,) = [one for machine in deployment.brought_by for one in machine.workers.values() if one.name == name]
    return worker._process.pid


async def all_right(deployment, todo, inboxes, *, expected):
    """See that all is answered as one engine answers it, and then that nothing is left anywhere."""
    for ask, inbox in zip(todo, inboxes, strict=True):
        tokens, events = await collect(inbox)
        assert events[-1].finish_reason is FinishReason.MAX_TOKENS, events[-1]
        assert tokens == expected(ask), ask
        if ask.num_logprobs is not None:
            assert [entry.token for event in events for entry in event.logprobs] == tokens
    await in_order(deployment)
    assert deployment.num_open == 0


async def until(what, *, seconds=30.0):
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "it has not happened"
        await asyncio.sleep(0.002)


def test_answers_are_those_of_one_engine_and_each_prompt_is_read_once(live, expected):
    async def use(deployment):
        todo = list(asks(12))
        await all_right(deployment, todo, [deployment.ask(ask) for ask in todo], expected=expected)
        assert (deployment.transfers.num_handed_over, deployment.transfers.num_retries) == (12, 0)
        assert deployment.stats.finished == {"max_tokens": 12}
        reader, *decoders = deployment.members
        assert reader.stats.num_prompt_tokens == sum(len(ask.prompt_ids) for ask in todo)
        assert all(one.stats.num_generated_tokens > 0 for one in decoders), "one has all of them"
        # A token a step; what was read besides, such as a prompt, would show.
        read, drawn = (
            sum(getattr(one.stats, name) for one in decoders) for name in ("num_read_tokens", "num_generated_tokens")
        )
        assert read <= 2 * drawn

    live.use(use)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["decode-0", "prefill-0"])
def test_what_a_worker_had_goes_on_elsewhere_when_it_is_killed(live, expected, name):
    async def use(deployment):
        todo = list(asks(16, max_tokens=100))
        slot = next(slot for slot in deployment._fleet.slots if slot.name == name)
        if slot.kind is Kind.PREFILL:
            os.kill(pid_of(deployment, name), signal.SIGSTOP)  # or it would be done before it is killed
        inboxes = [deployment.ask(ask) for ask in todo]
        await until(lambda: len(deployment._at[slot]) > 2)
        if slot.kind is Kind.DECODE:
            await until(lambda: all(task.tokens for task in deployment._at[slot]))
        before = deployment.transfers.num_retries
        os.kill(pid_of(deployment, name), signal.SIGKILL)
        await all_right(deployment, todo, inboxes, expected=expected)
        assert deployment.transfers.num_retries > before
        assert slot.num_restarts == 1
        # Whoever is new works as the others do.
        todo = list(asks(8))
        await all_right(deployment, todo, [deployment.ask(ask) for ask in todo], expected=expected)

    live.use(use)


@pytest.mark.slow
def test_a_worker_that_hangs_is_ended_and_its_requests_go_on(live, expected):
    async def use(deployment):
        todo = list(asks(12, max_tokens=100))
        inboxes = [deployment.ask(ask) for ask in todo]
        slot = next(slot for slot in deployment._fleet.slots if slot.name == "decode-1")
        await until(lambda: any(task.tokens for task in deployment._at[slot]))
        os.kill(pid_of(deployment, "decode-1"), signal.SIGSTOP)
        await all_right(deployment, todo, inboxes, expected=expected)
        assert slot.num_restarts == 1

    live.use(use)


def test_a_machine_that_is_lost_has_what_it_had_go_on_elsewhere_and_may_join_again(live, expected):
    async def use(deployment):
        todo = list(asks(16, max_tokens=100))
        inboxes = [deployment.ask(ask) for ask in todo]
        machine = live.machines[1]
        (name,) = [worker.name for worker in machine.workers.values()]
        lost = next(slot for slot in deployment._fleet.slots if slot.name == name)
        await until(lambda: len(deployment._at[lost]) > 2 and all(task.tokens for task in deployment._at[lost]))
        pids = [worker._process.pid for worker in machine.workers.values()]
        machine._line.abort()
        with pytest.raises(EngineError, match="may join again: the same command"):
            await machine.task
        assert not any(Path(f"/proc/{pid}").exists() for pid in pids), "what it had started has ended"
        tokens, _ = await collect(inboxes[-1])
        assert tokens == expected(todo[-1])
        assert not lost.is_up, "there is no other room for it"
        live.join(decode_workers=2)
        inboxes[-1] = deployment.ask(todo[-1])
        await all_right(deployment, todo, inboxes, expected=expected)
        assert lost.is_up
        assert [machine.free.total() for machine in deployment._machines._joined] == [0, 1], "one is spare"

    live.use(use)


def test_whoever_hangs_up_frees_the_pages_on_both_sides(live):
    async def use(deployment):
        todo = list(asks(16, max_tokens=200))
        inboxes = [deployment.ask(ask) for ask in todo]
        await inboxes[3].get()
        deployment.forget([ask.id for ask in todo])
        assert deployment.num_open == 0
        await in_order(deployment)

    live.use(use)


def test_what_cannot_be_run_is_refused_in_the_engines_words(live):
    async def use(deployment):
        _, events = await collect(deployment.ask(Ask("x", [5, 100_000], SamplingParams())))
        assert isinstance(events[0], Refused)
        assert "token id 100000 at place 1 is outside" in events[0].reason
        await in_order(deployment)

    live.use(use)


def test_an_answer_of_one_token_and_the_end_of_text_need_no_decoder(live, expected):
    async def use(deployment):
        before = deployment.transfers.num_handed_over
        todo = list(asks(3, max_tokens=1))
        await all_right(deployment, todo, [deployment.ask(ask) for ask in todo], expected=expected)
        assert deployment.transfers.num_handed_over == before

    live.use(use)


def test_a_line_that_does_not_carry_is_given_up_in_time_and_said_so(live, monkeypatch):
    """Whatever address the reader is told, nothing arrives: every attempt times out, and the client hears why."""
    monkeypatch.setattr(deployment_module, "HandTo", lambda _, first_page: HandTo("tcp://127.0.0.1:9", first_page))

    async def use(deployment):
        monkeypatch.setattr(deployment, "_config", replace(deployment._config, transfer_timeout_seconds=0.5))
        (ask,) = asks(1)
        tokens, events = await collect(deployment.ask(ask))
        assert events[-1].finish_reason is FinishReason.FAILED
        assert "given up after 4 attempts" in events[-1].error
        assert "its pages were under way for" in events[-1].error
        assert len(tokens) == 4, "each attempt had read the prompt, and told the token it drew"
        await in_order(deployment)

    live.use(use)


@pytest.mark.slow
def test_a_model_that_cannot_be_loaded_is_told_once_and_leaves_no_process(tmp_path):
    async def use():
        deployment = Deployment(config_of(tmp_path / "nothing"))
        try:
            with pytest.raises(ConfigError, match="nothing"):
                await deployment.start()
        finally:
            await deployment.stop()
        assert all(worker._process.poll() is not None for worker in deployment._fleet.workers)

    asyncio.run(use())


def test_one_kind_of_worker_alone_is_refused():
    with pytest.raises(ConfigError, match="2 prefill workers and 0 decode workers"):
        ServerConfig(model="m", prefill_workers=2)


def test_a_server_with_both_kinds_answers_as_the_library_and_survives_its_workers(start_server, tiny_folder):
    server = start_server("--prefill", "1", "--decode", "1", "--page-tokens", "4").wait(120)
    assert "1 prefill and 1 decode workers" in server.text()
    library = load(tiny_folder, device="cpu")
    ask = {"prompt": "In the beginning", "max_tokens": 12, "temperature": 0}
    answer = httpx.post(f"{server.url}/v1/completions", json=ask, timeout=60).json()
    assert answer["choices"][0]["text"] == library.generate("In the beginning", max_tokens=12, temperature=0.0)
    assert server.metric("dsv3_handovers_total") == 1
    assert server.metric('dsv3_worker_up{kind="decode",worker="decode-0"}') == 1

    long = ask | {"max_tokens": 450, "ignore_eos": True, "stream": True, "temperature": 1.0, "seed": 3}
    whole = "".join(
        library.stream("In the beginning", max_tokens=450, ignore_end=True, seed=3, temperature=1.0, top_p=1.0)
    )
    with httpx.stream("POST", f"{server.url}/v1/completions", json=long, timeout=120) as stream:
        pieces = []
        for line in stream.iter_lines():
            if line.startswith("data: {"):
                pieces.append(json.loads(line.removeprefix("data: "))["choices"][0]["text"])
            if len(pieces) == 3:
                for pid in server.engine_process():
                    os.kill(pid, signal.SIGKILL)
                eventually(lambda: httpx.get(f"{server.url}/health").status_code == 503)
    assert "".join(pieces) == whole
    assert server.metric("dsv3_retries_total") >= 1
    eventually(lambda: httpx.get(f"{server.url}/health").json() == {"status": "ok"})
    server.signal(signal.SIGTERM)
    assert server.ended() == 0
