"""Machines that bring workers: taken by those who know the secret and have the model, and missed when they go."""

import asyncio
import shutil
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from dsv3.cli.main import Options, build_app
from dsv3.config import JoinConfig, ServerConfig
from dsv3.config.address import Address
from dsv3.errors import ConfigError, EngineError
from dsv3.infer.events import EngineStats
from dsv3.infer.model_folder import find_model
from dsv3.serve import joining, machines
from dsv3.serve.fleet import Kind
from dsv3.serve.joining import Machine
from dsv3.serve.machines import Machines
from dsv3.serve.messages import Alive, Cancel, Leave, ProcessSettings, Progress
from dsv3.serve.model_digest import differences, digest_of
from dsv3.serve.worker import NOT_READY

SECRET = "known to all machines"


class Acting:
    """A worker without a process."""

    def __init__(self, settings, *, name, on_message, on_end):
        self.settings, self.name, self.on_message, self.on_end = settings, name, on_message, on_end
        self.ready, self.heard_of = NOT_READY, []
        self.has_ended = False

    async def start(self):
        if self.name == "broken":
            raise ConfigError("it cannot be loaded")

    async def stop(self):
        self.has_ended = True

    def abandon(self):
        self.has_ended = True

    def send(self, message):
        self.heard_of.append(message)


@pytest.fixture(autouse=True)
def acting(monkeypatch):
    monkeypatch.setattr(joining, "Worker", Acting)


def config_of(folder, **changes):
    settings = {"model": str(folder), "prefill_workers": 1, "decode_workers": 2, "api_keys": ("k",)}
    return ServerConfig(**(settings | {"workers_at": "127.0.0.1:0", "secret": SECRET} | changes))


@asynccontextmanager
async def server(config):
    found = Machines(config)
    found.asked_by = []
    await found.open()
    try:
        yield found
    finally:
        await found.close()
        if found.asked_by:
            await asyncio.wait(found.asked_by, timeout=10)
        await asyncio.sleep(0.01)


def machine_of(found, folder, **changes):
    settings = {"model": str(folder), "secret": SECRET, "prefill_workers": 1, "decode_workers": 2}
    address = Address(host="127.0.0.1", port=found.port)
    machine = Machine(JoinConfig(**(settings | {"server": address} | changes)), say=lambda _: None)
    machine.task = asyncio.ensure_future(machine.run())
    found.asked_by.append(machine.task)
    return machine


async def until(what, *, seconds=5.0):
    async with asyncio.timeout(seconds):
        while not what():
            await asyncio.sleep(0.002)


async def workers_of(found, kind, *, count, settings, name="w"):
    """Let machines start workers; return them, what they say and which of them end."""
    said, ended = [], []
    new = await found.seats(kind, count=count)
    workers = [
        each(settings, name=name, on_message=lambda *what: said.append(what), on_end=ended.append) for each in new
    ]
    await asyncio.gather(*(worker.start() for worker in workers))
    return workers, said, ended


def test_what_a_server_and_a_worker_tell_each_other_goes_by_the_machine(tiny_folder):
    async def use():
        config = config_of(tiny_folder)
        async with server(config) as found:
            machine = machine_of(found, tiny_folder, host="10.1.2.3", threads=3, device="cpu")
            settings = ProcessSettings(replace(config, model="elsewhere", workers_at="", secret=""), secret="pages")
            (worker,), said, ended = await workers_of(found, Kind.PREFILL, count=1, settings=settings)
            (there,) = machine.workers.values()
            assert (there.name, there.settings.host, there.settings.secret) == ("w", "10.1.2.3", "pages")
            assert (there.settings.config.model, there.settings.config.threads) == (str(tiny_folder), 3)
            worker.send(Cancel(["a"]))
            worker.send(Leave("b"))
            await until(lambda: there.heard_of == [Cancel(["a"]), Leave("b")])
            there.on_message(there, Alive())
            there.on_message(there, Progress([], replace(EngineStats(), num_steps=7)))
            await until(lambda: worker.stats.num_steps == 7)
            assert said[0] == (worker, Alive())
            there.on_end(there)  # by itself
            await until(lambda: ended == [worker])
            assert not machine.workers
            await asyncio.wait_for(found.seats(Kind.PREFILL, count=1), 5)  # there is room again
        await asyncio.wait_for(machine.task, 5)  # the server said farewell

    asyncio.run(use())


def test_one_that_cannot_load_the_model_says_why_and_gives_its_room_back(tiny_folder):
    async def use():
        async with server(config_of(tiny_folder)) as found:
            machine_of(found, tiny_folder)
            with pytest.raises(ConfigError, match=r"it cannot be loaded \(on "):
                await workers_of(found, Kind.PREFILL, count=1, settings=settings_of(tiny_folder), name="broken")
            await until(lambda: found._num_free(Kind.PREFILL) == 1)

    asyncio.run(use())


def settings_of(folder):
    return ProcessSettings(replace(config_of(folder), workers_at="", secret=""))


@pytest.mark.parametrize("changes", [{}, {"host": "127.0.0.1"}], ids=["line ends", "silent"])
def test_a_machine_that_goes_loses_all_its_workers_before_anything_is_placed_elsewhere(
    tiny_folder, monkeypatch, changes
):
    async def use():
        if changes:
            monkeypatch.setattr(machines, "BEAT_SECONDS", 0.1)
            monkeypatch.setattr(joining, "BEAT_SECONDS", 0.1)
        async with server(config_of(tiny_folder, worker_timeout_seconds=1.0 if changes else 60.0)) as found:
            machine = machine_of(found, tiny_folder, **changes)
            workers, _, ended = await workers_of(found, Kind.DECODE, count=2, settings=settings_of(tiny_folder))
            seen = []
            for worker in workers:
                worker._on_end = lambda one: seen.append((one, [other.is_alive for other in workers]))
            if changes:
                monkeypatch.setattr(machine, "_tell", lambda _: None)
            else:
                machine._line.abort()
            await until(lambda: len(seen) == 2)
            assert all(alive == [False, False] for _, alive in seen)
            with pytest.raises(EngineError, match="may join again"):
                await asyncio.wait_for(machine.task, 5)
            assert found._num_free(Kind.DECODE) == 0
            assert not ended
            # One of them comes back, and a worker is started on it.
            machine_of(found, tiny_folder, prefill_workers=0, decode_workers=1)
            await workers_of(found, Kind.DECODE, count=1, settings=settings_of(tiny_folder))

    asyncio.run(use())


def test_a_server_that_is_gone_or_not_there_yet(tiny_folder, monkeypatch):
    monkeypatch.setattr(joining, "TRY_AGAIN_SECONDS", 0.01)

    async def use():
        found = Machines(config_of(tiny_folder))
        found.asked_by = []
        found._server = type("Nobody", (), {"sockets": [type("S", (), {"getsockname": lambda _: ("", 1)})()]})()
        machine = machine_of(found, tiny_folder, join_timeout_seconds=0.05)
        with pytest.raises(ConfigError, match=r"cannot reach 127.0.0.1:1: connection refused"):
            await machine.task

    asyncio.run(use())


def test_workers_that_do_not_come_in_time_are_told_with_the_command_that_brings_them(tiny_folder):
    async def use():
        async with server(config_of(tiny_folder, join_timeout_seconds=0.2)) as found:
            machine_of(found, tiny_folder, decode_workers=0)
            with pytest.raises(ConfigError, match=r"1 prefill and 2 decode workers were to join .* --decode 1"):
                await found.seats(Kind.DECODE, count=1)

    asyncio.run(use())


def test_another_model_or_version_is_turned_away_with_what_differs(tiny_folder, tmp_path, monkeypatch):
    other = shutil.copytree(tiny_folder, tmp_path / "other")
    (weights,) = other.glob("*.safetensors")
    octets = bytearray(weights.read_bytes())
    octets[-1] ^= 1
    weights.write_bytes(octets)

    async def use():
        async with server(config_of(tiny_folder)) as found:
            with pytest.raises(ConfigError, match="its MODEL is not the server's: weights differ"):
                await machine_of(found, other).task
            monkeypatch.setattr(joining, "__version__", "0.0.0")
            with pytest.raises(ConfigError, match=r"it runs dsv3 0.0.0, and the server "):
                await machine_of(found, tiny_folder).task
            with pytest.raises(ConfigError, match="another secret"):
                await machine_of(found, tiny_folder, secret="x" * 16).task

    asyncio.run(use())
    one, changed = digest_of(find_model(tiny_folder)), digest_of(find_model(other))
    assert differences(one, one) == ""
    assert differences(one | {"config.json": "x"}, changed) == "config.json and weights differ"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--join", "a:1"], "brings no workers"),
        (
            ["--join", "a:1", "--prefill", "1", "--drafts", "2", "--port", "1"],
            "--drafts, --port is the server's to say",
        ),
        (["--join", "a", "--prefill", "1"], "write HOST:PORT"),
        (["--join", "a:1", "--prefill", "1"], "there is none; make a file with: openssl"),
        (["--workers-at", "a:1"], "say how many: --prefill P --decode D"),
        (["--workers-at", "a:1", "--prefill", "1", "--decode", "1"], "openssl rand"),
        (["--prefill", "1", "--decode", "1", "--join-timeout", "3"], "are for --join and --workers-at"),
        (["--workers-at", "a:1", "--address", "b"], "for a machine that joins"),
        (["--join", "a:1", "--secret-file", "nowhere"], "there is no such file"),
    ],
    ids=str,
)
def test_options_that_do_not_fit_are_refused(options, words):
    result = CliRunner().invoke(build_app(Options()), ["serve", "model", *options])
    assert isinstance(result.exception, ConfigError)
    assert words in str(result.exception)
