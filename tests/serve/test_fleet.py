"""Workers that share experts are a group: up together, woken together, started again together."""

import asyncio
from types import SimpleNamespace

import pytest

from dsv3.config import ServerConfig
from dsv3.errors import ConfigError
from dsv3.infer.events import EngineStats
from dsv3.serve import fleet as fleet_module
from dsv3.serve.fleet import Fleet, Kind, ThisMachine
from dsv3.serve.messages import ProcessSettings, Wake
from dsv3.serve.worker import NOT_READY


class Acting:
    """A worker without a process. `play` says what each one does when it is started."""

    play = staticmethod(lambda worker: None)
    all: "list[Acting]"

    def __init__(self, settings, *, name, on_message, on_end):
        del on_message
        self.name, self.ready, self.stats = name, NOT_READY, EngineStats()
        self.is_alive, self.heard, self.said = False, 0.0, []
        self.place = settings.place
        self.on_end = on_end
        self.all.append(self)

    async def start(self):
        self.is_alive = True
        await asyncio.sleep(0.01 * self.place.rank)
        self.play(self)
        if not self.is_alive:
            raise ConfigError("cannot be loaded")

    async def stop(self):
        self.is_alive = False

    def abandon(self):
        self.is_alive = False

    def end(self):
        self.is_alive = False
        self.on_end(self)

    def send(self, message):
        self.said.append(message)


@pytest.fixture
def fleet(monkeypatch):
    monkeypatch.setattr(Acting, "all", [], raising=False)
    monkeypatch.setattr(fleet_module, "Worker", Acting)
    monkeypatch.setattr(fleet_module, "PAUSE_SECONDS", (0.001, 0.01))
    config = ServerConfig(model="m", prefill_workers=2, decode_workers=2, expert_parallel=True)
    heard = []
    fleet = Fleet(
        ProcessSettings(config),
        workplace=ThisMachine(),
        numbers={Kind.PREFILL: 2, Kind.DECODE: 2},
        on_message=lambda *_: None,
        on_loss=lambda slot, _: heard.append(("lost", slot.name)),
        on_ready=lambda slot: heard.append(("ready", slot.name)),
        on_death=lambda: heard.append(("dead", "")),
    )
    fleet.heard = heard
    return fleet


async def settle(fleet):
    while fleet._beside:
        await asyncio.sleep(0.01)


def test_a_group_is_told_where_to_meet_and_is_up_as_a_whole(fleet):
    async def use():
        await fleet.start()
        places = [worker.place for worker in Acting.all]
        assert [(place.rank, place.size, place.decodes) for place in places] == [
            (0, 2, False),
            (1, 2, False),
            (0, 2, True),
            (1, 2, True),
        ]
        assert places[0].meeting == places[1].meeting != places[2].meeting == places[3].meeting
        readers, decoders = fleet.of(Kind.PREFILL), fleet.of(Kind.DECODE)
        decoders[1].worker.is_alive = False
        assert [slot.is_up for slot in [*readers, *decoders]] == [True, True, False, False]
        assert (fleet.is_alive, fleet.absent) == (True, ["decode"])
        readers[1].group.wake()
        readers[0].group.wake()
        assert [slot.worker.said for slot in readers] == [[Wake(1), Wake(2)]] * 2
        assert [slot.worker.said for slot in decoders] == [[], []]

    asyncio.run(use())


def test_when_one_ends_all_of_its_group_are_lost_and_begin_again_elsewhere(fleet):
    async def use():
        await fleet.start()
        fleet.heard.clear()
        Acting.all[3].end()
        assert fleet.heard == [("lost", "decode-0"), ("lost", "decode-1")]
        assert not Acting.all[2].is_alive
        await settle(fleet)
        assert fleet.heard[2:] == [("ready", "decode-0"), ("ready", "decode-1")]
        assert [slot.num_restarts for slot in fleet.slots] == [0, 0, 1, 1]
        assert Acting.all[4].place.meeting != Acting.all[2].place.meeting

    asyncio.run(use())


def test_one_that_ends_while_others_of_its_group_begin_is_not_overlooked(fleet, monkeypatch):
    def play(worker):
        if worker is Acting.all[3]:
            Acting.all[2].end()  # it had been ready

    monkeypatch.setattr(Acting, "play", staticmethod(play))

    async def use():
        await fleet.start()
        await settle(fleet)
        assert [slot.num_restarts for slot in fleet.slots] == [0, 0, 1, 1]
        assert all(slot.is_up for slot in fleet.slots)
        assert fleet.heard.count(("ready", "decode-1")) == 1

    asyncio.run(use())


@pytest.mark.parametrize(("lasts", "is_given_up"), [(9.0, True), (11.0, False)])
def test_only_starts_that_do_not_last_are_counted_against_a_group(fleet, monkeypatch, lasts, is_given_up):
    """Whoever kills one every half minute ends no server."""
    now = 0.0
    monkeypatch.setattr(fleet_module, "time", SimpleNamespace(monotonic=lambda: now))

    async def use():
        nonlocal now
        await fleet.start()
        for _ in range(8):
            now += lasts
            if (worker := fleet.of(Kind.DECODE)[0].worker) is not None:
                worker.end()
            await settle(fleet)
        assert [slot.is_given_up for slot in fleet.slots] == [False, False, is_given_up, is_given_up]
        assert (("dead", "") in fleet.heard) == is_given_up

    asyncio.run(use())


def test_a_group_is_not_started_where_one_cannot_load_the_model(fleet, monkeypatch):
    def play(worker):
        worker.is_alive = worker.is_alive and worker is not Acting.all[2]

    monkeypatch.setattr(Acting, "play", staticmethod(play))

    async def use():
        with pytest.raises(ConfigError, match="cannot be loaded"):
            await fleet.start()
        assert not Acting.all[3].is_alive, "the other one waits for it in vain"

    asyncio.run(use())
