"""The reproductions that need no training give the report's own numbers (fact sheet 1.2, 3.4, 3.8)."""

import pytest

from dsv3.fp8.gemm import HOPPER, HOPPER_PROMOTED
from dsv3.recipes import tiny, v3_671b
from dsv3.reproduce import accumulator, bubbles, cache, cost, schedule
from dsv3.reproduce.experiment import Ask
from dsv3.reproduce.finding import Verdict

EXPECTED = {Verdict.SAME, Verdict.AGREES}


def made(experiment, folder):
    outcome = experiment.run(Ask(folder=folder))
    for picture in outcome.pictures:
        file = folder / picture.file
        assert file.read_bytes().startswith(b"\x89PNG")
        assert file.stat().st_size < 100_000
    return outcome


def test_bubbles_and_memory_are_those_of_table_2(tmp_path):
    """With F = W = 1, B = 2, F&B = 2.4: 15 x 3, 15 x 1 and 7 x 1.4."""
    outcome = made(bubbles, tmp_path)
    assert {finding.verdict for finding in outcome.findings} == EXPECTED
    assert {name: one["bubble"] for name, one in outcome.data.items()} == pytest.approx(
        {"1f1b": 45, "zb1p": 15, "dualpipe": 9.8}
    )


def test_the_schedule_has_the_pairs_of_the_published_code(tmp_path):
    outcome = made(schedule, tmp_path)
    assert {finding.verdict for finding in outcome.findings} == {Verdict.AGREES}
    # Counted in the published code for 16 ranks and 120 micro-batches.
    pairs = [schedule.woven_by_the_published_code(rank, ranks=16, micro_batches=120) for rank in (0, 7, 8, 15)]
    assert pairs == [97, 103, 103, 97]


def test_the_cost_is_that_of_table_1_within_5_percent(tmp_path):
    outcome = made(cost, tmp_path)
    assert {finding.verdict for finding in outcome.findings} == {Verdict.AGREES}
    assert outcome.data["pre-training"] == pytest.approx(2_664_000, rel=0.05)
    assert outcome.data["price"] == pytest.approx(5_576_000, rel=0.05)


def test_the_cache_takes_70272_bytes_and_one_71st_of_mhas(tmp_path):
    outcome = made(cache, tmp_path)
    assert {finding.verdict for finding in outcome.findings} == EXPECTED
    assert outcome.data["MLA, allocated"] == 70_272
    assert outcome.data["MHA"] == 4_997_120
    assert cache.attention_bytes_per_token(v3_671b().model, heads=128) // 70_272 == 71


def test_the_cache_of_a_running_engine_is_counted_with_its_mtp_module():
    """Four layers of 32 + 16 numbers of four bytes."""
    assert cache.engine_bytes_per_token(tiny().model) == 4 * 48 * 4


def test_promotion_makes_sums_of_14_bits_several_times_better():
    held, promoted, exact = (
        accumulator.accumulator_error(1024, accumulator=kind) for kind in (HOPPER, HOPPER_PROMOTED, None)
    )
    assert exact < promoted < held / 3
