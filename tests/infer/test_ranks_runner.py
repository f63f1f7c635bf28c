"""Engines that share experts over ranks answer as one engine that has them all."""

from functools import cache

import pytest
import torch

from dsv3.batch import TokenBatch
from dsv3.errors import ConfigError
from dsv3.infer.ranks_runner import first_placement, halves
from dsv3.infer.runner import TorchRunner

from ..parallel.conftest import end, launch, results_of
from .conftest import TINY
from .engines_on_ranks import answer_all
from .test_engine import answers, engine_of, mixed_requests, model_of

EVEN, ONE_SIDED = (range(4), range(4, 8)), (range(8), range(0))
SCENARIOS = {
    "plain": {"shares": EVEN, "settings": {}, "engine": {}},
    "drafts": {"shares": EVEN, "settings": {}, "engine": {"max_drafts": 2}},
    "idle": {"shares": ONE_SIDED, "settings": {"fixed_step_tokens": 64}, "engine": {"max_drafts": 1}},
    "uneven": {
        "shares": (range(7), range(7, 8)),
        "settings": {"redundant_experts": 4, "fixed_step_tokens": 16},
        "engine": {"max_drafts": 2, "max_step_tokens": 24},
        "rounds_between": 9,
    },
    "halves": {"shares": EVEN, "settings": {"overlap_step_tokens": 2}, "engine": {"max_drafts": 1}},
    "moves": {
        "shares": EVEN,
        "settings": {"redundant_experts": 2, "rebalance_seconds": 0.05, "moved_bytes_per_step": 1},
        "engine": {"max_drafts": 1, "max_sequences": 2},
        "times": 3,
    },
}


@cache
def expected():
    """What one engine answers; drafts change nothing."""
    return answers(engine_of(TorchRunner(model_of(1, dtype=torch.float64))), mixed_requests(8))


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """What two ranks have answered, by scenario."""
    folder = tmp_path_factory.mktemp("ranks")
    processes = launch(answer_all, folder=folder, size=2, arguments={"scenarios": SCENARIOS})
    try:
        return results_of(processes, folder=folder)
    finally:
        end(processes)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_two_ranks_answer_as_one_engine(ran, scenario):
    of_ranks = [one[scenario] for one in ran]
    tokens = of_ranks[0]["tokens"] | of_ranks[1]["tokens"]
    times = SCENARIOS[scenario].get("times", 1)
    assert tokens == {f"{name}/{again}": found for name, found in expected().items() for again in range(times)}
    assert len(tokens) == sum(len(one["tokens"]) for one in of_ranks), "one was answered twice"
    assert [one["held"] for one in of_ranks] == [0, 0]
    assert of_ranks[0]["rounds"] == of_ranks[1]["rounds"], "they fell asleep in different rounds"
    assert [one["wrong weights"] for one in of_ranks] == [[], []]


def test_an_idle_rank_computes_for_the_other_one(ran):
    _, idle = (one["idle"]["stats"] for one in ran)
    assert idle.num_rows > 0


def test_experts_move_while_answers_are_made(ran):
    """The answers are those of one engine, as the test above sees; here, that something moved, the same on all."""
    of_ranks = [one["moves"] for one in ran]
    first = first_placement(TINY, num_ranks=2, redundant=2)
    assert of_ranks[0]["slots"] == of_ranks[1]["slots"] != [first.slots] * 2
    stats = [one["stats"] for one in of_ranks]
    assert stats[0].num_changes == stats[1].num_changes > 0
    assert sum(one.num_moves for one in stats) > 0
    width, hidden = TINY.moe_intermediate_size, TINY.hidden_size
    assert stats[0].moved_bytes == stats[0].num_moves * 3 * width * hidden * 8
    for one in stats:
        assert 0.5 <= one.balance <= 1
        assert 0.5 <= one.balance_before <= one.balance_after <= 1
    assert sum(one.load_after for one in stats) == pytest.approx(2), "of fair shares"


def test_a_rank_that_stands_still_is_noticed_by_the_others(ran):
    told = [one["told"] for one in ran]
    assert "a rank that shares experts with this one has gone" in told[0] or "shares experts broke" in told[0]
    assert not told[1]


def test_experts_that_do_not_divide_are_refused_with_a_number_that_would():
    with pytest.raises(
        ConfigError, match="8 routed experts and 3 redundant ones do not divide over 4 ranks; use 4 red"
    ):
        first_placement(TINY, num_ranks=4, redundant=3)


def test_first_copies_lie_on_different_ranks():
    placement = first_placement(TINY, num_ranks=4, redundant=4)
    for slots in placement.copies:
        assert len({placement.device_of(slot) for slot in slots}) == len(slots)


def test_halves_are_a_batch_cut_in_the_middle_of_a_sequence():
    batch = TokenBatch.from_pieces([[1, 2], [3, 4, 5, 6], [7]], firsts=[0, 5, 9])
    (first, before), (second, after) = halves(batch, pages=[[0], [1, 2], [3]])
    assert [first.tokens.tolist(), second.tokens.tolist()] == [[1, 2, 3], [4, 5, 6, 7]]
    assert [first.positions.tolist(), second.positions.tolist()] == [[0, 1, 5], [6, 7, 8, 9]]
    assert (before, after) == ([[0], [1, 2]], [[1, 2], [3]])
    assert halves(TokenBatch.from_sequences([[1]]), pages=[[0]])[0] is None
