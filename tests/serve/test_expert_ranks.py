"""Experts over the processes that decode: answers are those of one engine, and a group ends and begins as a whole."""

import os
import signal

import pytest

from dsv3.config import ExpertRanksConfig, ServerConfig
from dsv3.errors import ConfigError
from dsv3.infer.loaded import load
from dsv3.infer.request import Request
from dsv3.serve.metrics import Metrics

from .test_deployment import ENGINE, SECRET, Live, all_right, asks, config_of, in_order, pid_of, until


@pytest.fixture(scope="module")
def expected(tiny_folder):
    """What one engine answers, over the same model that trains."""
    known = {}
    engine = load(tiny_folder, device="cpu", drafts=1, plain=True).new_engine(ENGINE, cache_tokens=2000)

    def answer(ask):
        key = (tuple(ask.prompt_ids), ask.params)
        if key not in known:
            engine.add(Request(id="a", prompt_ids=ask.prompt_ids, params=ask.params))
            known[key] = [
                token for _ in iter(lambda: engine.has_work, False) for e in engine.step() for token in e.tokens
            ]
        return known[key]

    return answer


@pytest.fixture(scope="module")
def live(tiny_folder):
    """One worker that prefills, and two of two machines that decode and share the experts, which move."""
    config = config_of(
        tiny_folder,
        decode_workers=2,
        expert_parallel=True,
        expert_ranks=ExpertRanksConfig(redundant_experts=2, rebalance_seconds=1.0, moved_bytes_per_step=1),
        worker_timeout_seconds=20.0,
        workers_at="127.0.0.1:0",
        secret=SECRET,
    )
    live = Live(config, machines=[(1, 1), (0, 1)])
    yield live
    live.close()


@pytest.mark.slow
def test_answers_are_those_of_one_engine(live, expected):
    async def use(deployment):
        assert "experts over 2 ranks" in deployment.ready.weights
        todo = list(asks(8, max_tokens=24))
        await all_right(deployment, todo, [deployment.ask(ask) for ask in todo], expected=expected)
        decoders = [member.stats for member in deployment.members if member.kind == "decode"]
        assert all(stats.num_generated_tokens > 0 for stats in decoders)

    live.use(use)


@pytest.mark.slow
def test_a_rank_without_requests_wakes_for_those_of_another_and_sleeps_again(live, expected):
    async def use(deployment):
        for ask in list(asks(3)):
            await all_right(deployment, [ask], [deployment.ask(ask)], expected=expected)

    live.use(use)


@pytest.mark.slow
def test_what_experts_do_is_told(live):
    async def use(deployment):
        stats = [member.stats.experts for member in deployment.members if member.kind == "decode"]
        assert all(one.num_rows > 0 for one in stats)
        text = Metrics(deployment).text().decode()
        assert 'dsv3_expert_rows_total{kind="decode",worker="decode-1"}' in text
        assert 'dsv3_expert_changes_total{kind="decode",worker="decode-0"}' in text

    live.use(use)


@pytest.mark.slow
def test_when_one_rank_is_killed_all_begin_anew_and_what_they_had_goes_on(live, expected):
    async def use(deployment):
        todo = list(asks(8, max_tokens=40))
        inboxes = [deployment.ask(ask) for ask in todo]
        slots = [slot for slot in deployment._fleet.slots if slot.kind == "decode"]
        await until(lambda: all(len(deployment._at[slot]) > 1 for slot in slots))
        os.kill(pid_of(deployment, "decode-1"), signal.SIGKILL)
        await all_right(deployment, todo, inboxes, expected=expected)
        assert [slot.num_restarts for slot in deployment._fleet.slots] == [0, 1, 1]
        assert deployment.transfers.num_retries > 0
        await in_order(deployment)

    live.use(use)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prefill_workers": 0, "decode_workers": 0}, "2 or more of one kind, such as --prefill 1 --decode 2"),
        ({"weights": "int8"}, "weights = 'int8' cannot be spread"),
        ({"device": "cuda"}, "on CPUs alone"),
        ({"expert_parallel": False, "expert_ranks": ExpertRanksConfig(redundant_experts=2)}, "add --expert-parallel"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(changes, words):
    settings = {"model": "m", "prefill_workers": 1, "decode_workers": 2, "expert_parallel": True}
    with pytest.raises(ConfigError, match=words):
        ServerConfig(**(settings | changes))
