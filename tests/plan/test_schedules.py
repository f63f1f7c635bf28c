"""Schedules against the report's Table 2, Figure 5 and the published run's numbers."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3.errors import ConfigError
from dsv3.plan.pipeline import Action, Kind, Schedule
from dsv3.plan.schedules import SCHEDULES, dualpipe, dualpipe_v, gpipe, interleaved, one_f_one_b, zb1p, zbv
from dsv3.plan.simulate import ChunkCosts, simulate

SIZES = st.tuples(st.integers(1, 8), st.integers(0, 12))
TIMES = st.floats(0.1, 10)
CHECKS = settings(deadline=None, max_examples=25)


def made(name, *, ranks, more):
    """Return a schedule of a size that it can have, `more` micro-batches beyond the fewest, rounded up."""
    if name == "dualpipe":
        ranks = 2 * ranks
    least = {"dualpipe": 2 * ranks, "dualpipe_v": 2 * ranks, "zbv": 2 * ranks}.get(name, 1)
    step = {"dualpipe": 2, "interleaved": ranks}.get(name, 1)
    return SCHEDULES[name](num_ranks=ranks, num_micro_batches=-(-(least + more) // step) * step)


@pytest.mark.parametrize("name", SCHEDULES)
@CHECKS
@given(size=SIZES, costs=st.tuples(TIMES, TIMES, TIMES, TIMES))
def test_every_schedule_comes_to_its_end_in_order(name, size, costs):
    """Whatever the chunks take: once forward and once backward at each stage, nothing before what it needs."""
    forward, inputs, weight, send = costs
    schedule = made(name, ranks=size[0], more=size[1])
    timeline = simulate(schedule, costs=ChunkCosts(forward=forward, backward=inputs + weight, weight=weight, send=send))
    start, end, rank_of = {}, {}, {}
    for rank, spans in enumerate(timeline.spans):
        assert all(before.end <= after.start for before, after in pairwise(spans))
        for span in spans:
            for action in span.step:
                start[action], end[action], rank_of[action] = span.start, span.end, rank
    for stage in range(schedule.num_stages):
        for m in range(schedule.num_micro_batches):
            ahead = Action(Kind.FORWARD, stage, m)
            back = next(a for a in (Action(Kind.BACKWARD, stage, m), Action(Kind.INPUT, stage, m)) if a in start)
            assert end[ahead] <= start[back]
            if back.kind is Kind.INPUT:
                assert end[back] <= start[Action(Kind.WEIGHT, stage, m)]
            if stage:
                before = Action(Kind.FORWARD, stage - 1, m)
                wait = send if rank_of[before] != rank_of[ahead] else 0.0
                assert end[before] + wait <= start[ahead]
                after = next(
                    a for a in (Action(Kind.BACKWARD, stage - 1, m), Action(Kind.INPUT, stage - 1, m)) if a in start
                )
                assert end[back] <= start[after]


# ---- Table 2 ----


@CHECKS
@given(ranks=st.integers(1, 10), more=st.integers(0, 20), forward=TIMES, inputs=TIMES, weight=TIMES)
def test_the_bubble_of_1f1b_and_of_gpipe_is_that_of_table_2(ranks, more, forward, inputs, weight):
    costs = ChunkCosts(forward=forward, backward=inputs + weight, weight=weight)
    for make in (one_f_one_b, gpipe):
        timeline = simulate(make(num_ranks=ranks, num_micro_batches=ranks + more), costs=costs)
        assert timeline.bubble == pytest.approx((ranks - 1) * (costs.forward + costs.backward))


@CHECKS
@given(ranks=st.integers(2, 10), more=st.integers(0, 20), time=TIMES)
def test_the_bubble_of_zb1p_is_that_of_table_2(ranks, more, time):
    costs = ChunkCosts(forward=time, backward=2 * time, weight=time)
    timeline = simulate(zb1p(num_ranks=ranks, num_micro_batches=2 * ranks + more), costs=costs)
    assert timeline.bubble == pytest.approx((ranks - 1) * (costs.forward + costs.backward - 2 * costs.weight))


@CHECKS
@given(half=st.integers(1, 8), more=st.integers(0, 10), time=TIMES, woven=st.floats(0.5, 1.0))
def test_the_bubble_of_dualpipe_is_that_of_table_2(half, more, time, woven):
    """The formula holds to the letter where a forward chunk takes as long as one for weights' gradients."""
    costs = ChunkCosts(forward=time, backward=2 * time, weight=time, woven=3 * time * woven)
    formula = (half - 1) * (costs.woven + costs.backward - 3 * costs.weight)
    there_and_back = dualpipe(num_ranks=2 * half, num_micro_batches=4 * half + 2 * more)
    if woven >= 2 / 3 + 1e-6:  # Faster than its own backward chunk, and the ends would wait for the middle.
        assert simulate(there_and_back, costs=costs).bubble == pytest.approx(formula, abs=1e-9)


@pytest.mark.parametrize("half", [1, 2, 4, 8])
def test_dualpipe_v_has_the_bubble_of_as_many_stages(half):
    """Of 2 P stages on P ranks; (PP/2 - 1)(F&B + B - 3 W) with PP the number of stages."""
    costs = ChunkCosts(woven=2.4)
    timeline = simulate(dualpipe_v(num_ranks=half, num_micro_batches=4 * half), costs=costs)
    assert timeline.bubble == pytest.approx((half - 1) * (2.4 + 2 - 3))


@CHECKS
@given(ranks=st.integers(1, 8), rounds=st.integers(1, 4), parts=st.integers(1, 4), forward=TIMES, backward=TIMES)
def test_interleaving_divides_the_bubble_by_the_stages_of_a_rank(ranks, rounds, parts, forward, backward):
    costs = ChunkCosts(forward=forward, backward=backward, weight=0.0)
    schedule = interleaved(num_ranks=ranks, num_micro_batches=ranks * rounds, stages_per_rank=parts)
    # Narayanan et al. 2021: (p - 1)(t_f + t_b) / v of whole passes, each of `parts` of these chunks.
    assert simulate(schedule, costs=costs).bubble == pytest.approx((ranks - 1) * (forward + backward))


@CHECKS
@given(ranks=st.integers(1, 8), more=st.integers(0, 12))
def test_zbv_ranks_never_idle_between_their_first_and_last_chunk(ranks, more):
    costs = ChunkCosts()
    timeline = simulate(zbv(num_ranks=ranks, num_micro_batches=2 * ranks + more), costs=costs)
    for spans, busy in zip(timeline.spans, timeline.busy, strict=True):
        assert spans[-1].end - spans[0].start == pytest.approx(busy)


@CHECKS
@given(half=st.integers(1, 8), more=st.integers(0, 10))
def test_activations_held_are_those_of_table_2(half, more):
    ranks, costs = 2 * half, ChunkCosts()
    held = {
        make: max(simulate(make(num_ranks=ranks, num_micro_batches=2 * ranks + 2 * more), costs=costs).peak_activations)
        for make in (one_f_one_b, zb1p, dualpipe)
    }
    assert held == {one_f_one_b: ranks, zb1p: ranks, dualpipe: ranks + 1}


# ---- the report's own run, and its figure ----


def test_the_published_run_weaves_97_pairs_at_its_ends_and_103_in_its_middle():
    """16 ranks, 120 micro-batches: 23 chunks of each kind stand alone on the first rank, 17 in the middle."""
    schedule = dualpipe(num_ranks=16, num_micro_batches=120)
    woven = [sum(len(step) == 2 for step in steps) for steps in schedule.steps]
    assert (woven[0], woven[7], woven[8], woven[15]) == (97, 103, 103, 97)
    assert woven == woven[::-1] == [*range(97, 104), 103, 103, *range(103, 96, -1)]


def test_figure_5_eight_ranks_and_twenty_micro_batches():
    """The first rank: 6 forward chunks alone, one pair of both ways, three times (backward, weights, forward), ..."""
    schedule = dualpipe(num_ranks=8, num_micro_batches=20)
    first = ["&".join(str(action.kind) for action in step) for step in schedule.steps[0]]
    assert first == [
        *["F"] * 6,
        *["F", "F"],
        *["I", "W", "F"] * 3,
        *["F&B", "F&B"] * 3,
        *["B", "F&B"] * 3,
        *["B", "I"],
        *["W", "I"] * 3,
        *["W"],
    ]
    assert schedule.stages_of(0) == schedule.stages_of(7) == (0, 7)
    assert schedule.direction(9) == 0
    assert schedule.direction(10) == 1


def test_both_ways_of_dualpipe_mirror_each_other():
    schedule = dualpipe(num_ranks=6, num_micro_batches=16)
    for rank in range(6):
        mirrored = [
            tuple(Action(action.kind, action.stage, (action.micro_batch + 8) % 16) for action in step)
            for step in schedule.steps[5 - rank]
        ]
        assert mirrored == list(schedule.steps[rank])


# ---- what is refused ----


@pytest.mark.parametrize(
    ("make", "ranks", "micro_batches", "message"),
    [
        (dualpipe, 5, 20, "an even number of ranks"),
        (dualpipe, 4, 9, "a multiple of 2; 8 would do"),
        (dualpipe, 8, 14, "at least 16"),
        (dualpipe_v, 4, 7, "at least 8"),
        (interleaved, 4, 10, "a multiple of 4; 8 would do"),
        (gpipe, 0, 4, "at least one rank"),
        (one_f_one_b, 4, 0, "at least 1"),
    ],
)
def test_sizes_that_cannot_be_are_refused_with_one_that_can(make, ranks, micro_batches, message):
    with pytest.raises(ConfigError, match=message):
        make(num_ranks=ranks, num_micro_batches=micro_batches)


def test_ranks_that_wait_in_a_circle_are_told():
    steps = [[Action(Kind.BACKWARD, 0, 0)], [Action(Kind.FORWARD, 1, 0), Action(Kind.BACKWARD, 1, 0)]]
    with pytest.raises(AssertionError, match="too early"):
        schedule_of(steps)
    forward, backward = Kind.FORWARD, Kind.BACKWARD
    circle = [
        [Action(forward, 0, 0), Action(backward, 0, 0), Action(forward, 0, 1), Action(backward, 0, 1)],
        [Action(forward, 1, 1), Action(forward, 1, 0), Action(backward, 1, 0), Action(backward, 1, 1)],
    ]
    with pytest.raises(ConfigError, match=r"all wait, rank 0 for B1\.0, rank 1 for F0\.1"):
        simulate(schedule_of(circle, micro_batches=2), costs=ChunkCosts())


def test_a_chunk_that_is_missing_or_done_twice_is_no_schedule():
    forward, backward = Action(Kind.FORWARD, 0, 0), Action(Kind.BACKWARD, 0, 0)
    for steps in ([forward], [forward, backward, backward]):
        with pytest.raises(AssertionError):
            schedule_of([steps])


def schedule_of(steps, *, micro_batches=1):
    return Schedule(
        name="drawn by hand",
        num_micro_batches=micro_batches,
        routes=(tuple(range(len(steps))),),
        steps=tuple(tuple((action,) for action in mine) for mine in steps),
    )
