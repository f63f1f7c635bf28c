"""Which tokens go into a pass: order, chunks, drafts, shared beginnings, and who gives up pages when they run out."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3.config import EngineConfig
from dsv3.infer.params import SamplingParams
from dsv3.infer.request import Request
from dsv3.infer.sampler import TokenSampler
from dsv3.infer.scheduler import Scheduler
from dsv3.infer.sequence import Sequence


def scheduler_of(**changes):
    return Scheduler(EngineConfig(**({"page_tokens": 4, "num_pages": 32, "max_step_tokens": 64} | changes)))


def sequence_of(arrival, prompt, *, prompt_logprobs=False):
    params = SamplingParams(temperature=0.0)
    prompt = list(prompt)
    return Sequence(
        request=Request(id=str(arrival), prompt_ids=prompt, params=params, prompt_logprobs=prompt_logprobs),
        arrival=arrival,
        tokens=list(prompt),
        sampler=TokenSampler(params, prompt_ids=prompt, vocab_size=1000),
    )


def added(scheduler, *prompts, **options):
    sequences = [sequence_of(arrival, prompt, **options) for arrival, prompt in enumerate(prompts)]
    for sequence in sequences:
        scheduler.add(sequence)
    return sequences


def run(scheduler, *, num_right=0, drafts=()):
    """Do what an engine does with the next pass: count its tokens as computed, and draw one at the end of a text."""
    works = scheduler.next_work()
    scheduler.check()
    for work in works:
        sequence = work.sequence
        sequence.num_computed = work.first + work.count
        if work.reaches_end:
            right = list(work.drafts[:num_right])
            sequence.tokens += [*right, 500 + len(sequence.tokens)]
            sequence.num_computed += len(right)
            sequence.drafts = list(drafts)
        scheduler.register(sequence, end=sequence.num_computed)
        scheduler.check()
    return works


def summary(works):
    return [(work.sequence.arrival, work.first, work.count, len(work.drafts), work.reaches_end) for work in works]


def test_prompts_are_read_in_order_of_arrival_and_in_chunks():
    scheduler = scheduler_of(max_step_tokens=10)
    added(scheduler, range(15), range(100, 103), range(200, 204))
    assert summary(run(scheduler)) == [(0, 0, 10, 0, False)]
    assert summary(run(scheduler)) == [(0, 10, 5, 0, True), (1, 0, 3, 0, True), (2, 0, 2, 0, False)]
    assert summary(run(scheduler)) == [(0, 15, 1, 0, True), (1, 3, 1, 0, True), (2, 2, 2, 0, True)]


def test_those_that_decode_go_before_a_prompt_that_came_earlier():
    scheduler = scheduler_of(max_step_tokens=8)
    long, short = sequence_of(0, range(30)), sequence_of(1, range(100, 102))
    scheduler.add(short)
    run(scheduler)
    scheduler.add(long)
    assert summary(run(scheduler)) == [(1, 2, 1, 0, True), (0, 0, 7, 0, False)]


def test_a_step_never_reads_more_tokens_than_it_may_drafts_included():
    scheduler = scheduler_of(max_step_tokens=5)
    added(scheduler, [1], [2], [3])
    run(scheduler)
    for sequence in scheduler.running:
        sequence.drafts = [7, 8, 9]
    assert summary(run(scheduler)) == [(0, 1, 1, 3, True), (1, 1, 1, 0, True)]


def test_no_more_run_than_may():
    scheduler = scheduler_of(max_sequences=2)
    sequences = added(scheduler, [1], [2], [3])
    assert [work.sequence for work in run(scheduler)] == sequences[:2]
    scheduler.remove(sequences[0])
    assert [work.sequence for work in run(scheduler)] == sequences[1:]


def test_a_request_that_does_not_fit_lets_no_later_one_pass():
    scheduler = scheduler_of(num_pages=5)
    first, large, small = added(scheduler, range(10), range(100, 112), [7])
    assert [work.sequence for work in run(scheduler)] == [first]
    scheduler.remove(first)
    assert [work.sequence for work in run(scheduler)] == [large, small]


def test_who_came_last_gives_up_its_pages_and_comes_back_first():
    scheduler = scheduler_of(num_pages=4, prefix_caching=False)
    first, second = added(scheduler, range(7), range(100, 107))
    late = sequence_of(2, [300])
    run(scheduler)
    scheduler.add(late)
    run(scheduler)  # both fill their second page
    assert [work.sequence for work in run(scheduler)] == [first]  # which needs a third one
    assert scheduler.waiting == [second, late]
    assert (second.pages, second.num_computed, scheduler.num_preemptions) == ([], 0, 1)
    scheduler.remove(first)
    assert summary(run(scheduler))[0] == (1, 0, 9, 0, True)  # its answer so far is read again with its prompt


def test_a_request_alone_never_gives_up_its_own_pages_before_all_are_full():
    scheduler = scheduler_of(num_pages=3)
    (only,) = added(scheduler, range(5))
    for length in range(5, 13):
        assert run(scheduler)
        assert len(only.tokens) == length + 1
    assert scheduler.num_preemptions == 0


def test_drafts_are_left_out_rather_than_that_someone_gives_up_pages():
    scheduler = scheduler_of(num_pages=4, prefix_caching=False)
    added(scheduler, range(6), range(100, 106))
    run(scheduler, drafts=[7, 8, 9])
    works = run(scheduler)
    assert [len(work.drafts) for work in works] == [0, 0]  # position 9 would be on a third page
    assert scheduler.num_preemptions == 0


def test_a_beginning_that_was_read_before_is_shared_up_to_its_last_full_page():
    scheduler = scheduler_of()
    (first,) = added(scheduler, range(10))
    run(scheduler)
    again = sequence_of(1, range(8))  # its last token must be read anew, so that something can be drawn
    other = sequence_of(2, [*range(9), 700, 701])
    for sequence in (again, other):
        scheduler.add(sequence)
    assert summary(run(scheduler))[1:] == [(1, 4, 4, 0, True), (2, 8, 3, 0, True)]
    assert again.pages[0] == other.pages[0] == first.pages[0]
    assert other.pages[1] == first.pages[1] != again.pages[1]
    assert [sequence.num_cached for sequence in (first, again, other)] == [0, 4, 8]


def test_pages_of_a_request_that_ended_are_found_until_their_room_is_needed():
    scheduler = scheduler_of(num_pages=4)
    (first,) = added(scheduler, range(12))
    run(scheduler)
    scheduler.remove(first)
    assert (scheduler.pool.num_kept, scheduler.pool.num_held) == (3, 0)
    scheduler.add(other := sequence_of(1, range(100, 107)))
    run(scheduler)
    scheduler.remove(other)  # it took the free page and the end of the first text
    scheduler.add(again := sequence_of(2, range(12)))
    run(scheduler)
    assert again.num_cached == 8


def test_a_prompt_waits_for_one_that_is_being_read_and_begins_alike():
    scheduler = scheduler_of(max_step_tokens=8)
    first, twin, other = added(scheduler, range(14), [*range(12), 700], [800])
    assert [work.sequence for work in run(scheduler)] == [first]
    assert [work.sequence for work in run(scheduler)] == [first, other]  # nobody waits for the twin
    assert summary(run(scheduler))[-1] == (1, 12, 1, 0, True)
    assert twin.num_cached == 12


def test_without_prefix_caching_nothing_is_shared_and_nobody_waits():
    scheduler = scheduler_of(prefix_caching=False)
    added(scheduler, range(12), range(12))
    assert summary(run(scheduler)) == [(0, 0, 12, 0, True), (1, 0, 12, 0, True)]
    for sequence in list(scheduler.running):
        scheduler.remove(sequence)
    assert scheduler.pool.num_kept == 0


def test_a_prompt_whose_log_probabilities_are_wanted_is_read_whole():
    scheduler = scheduler_of()
    (first,) = added(scheduler, range(12))
    run(scheduler)
    scheduler.add(asked := sequence_of(1, range(12), prompt_logprobs=True))
    assert summary(run(scheduler))[1] == (1, 0, 12, 0, True)
    assert not set(first.pages) & set(asked.pages)


def test_pages_ahead_are_taken_only_if_they_are_to_be_had():
    scheduler = scheduler_of(num_pages=3)
    first, second = added(scheduler, range(3), range(100, 103))
    run(scheduler)
    assert scheduler.reach(first, end=8)
    assert not scheduler.reach(second, end=8)
    assert (len(first.pages), len(second.pages)) == (2, 1)
    scheduler.check()


def test_check_finds_what_does_not_agree():
    scheduler = scheduler_of()
    first, second = added(scheduler, range(3), range(100, 103))
    run(scheduler)
    first.num_computed = 5
    with pytest.raises(AssertionError, match="entries without a page"):
        scheduler.check()
    first.num_computed = 3
    scheduler.running.remove(second)
    scheduler.waiting.append(second)
    with pytest.raises(AssertionError, match="0 in fact"):
        scheduler.check()


@given(
    prompts=st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=20), min_size=1, max_size=6),
    page_tokens=st.integers(1, 5),
    spare_pages=st.integers(0, 10),
    max_step_tokens=st.integers(1, 12),
    max_sequences=st.integers(1, 4),
    drafts=st.lists(st.integers(0, 1), max_size=3),
    num_right=st.integers(0, 3),
)
def test_everyone_comes_to_an_end_in_a_bounded_number_of_steps(
    prompts, page_tokens, spare_pages, max_step_tokens, max_sequences, drafts, num_right
):
    """Ten answer tokens each, with as few pages as the longest needs."""
    most = max(map(len, prompts)) + 10
    num_pages = -(-(most + 4) // page_tokens) + spare_pages
    scheduler = scheduler_of(
        page_tokens=page_tokens, num_pages=num_pages, max_step_tokens=max_step_tokens, max_sequences=max_sequences
    )
    sequences = added(scheduler, *prompts)
    for _ in range(sum(len(prompt) + 20 for prompt in prompts) * 20):
        works = run(scheduler, num_right=num_right, drafts=drafts)
        assert works
        assert sum(work.num_tokens for work in works) <= max_step_tokens
        assert len(works) <= len(scheduler.running) <= max_sequences
        for sequence in list(scheduler.running):
            if sequence.num_answer >= 10:
                scheduler.remove(sequence)
        if not scheduler.running and not scheduler.waiting:
            break
    assert all(sequence.num_answer >= 10 for sequence in sequences)
    assert scheduler.pool.num_held == 0
