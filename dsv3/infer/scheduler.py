"""Which tokens go into the next pass: continuous batching with chunked prompts over a pool of pages.

Requests that decode come first, each with its drafts; what is left of a step goes to prompts in order of arrival, in
chunks. Where pages run out, the request that came last gives up its own and is computed again later.
"""

from bisect import insort
from collections.abc import Iterator
from dataclasses import dataclass

from dsv3.config import EngineConfig
from dsv3.infer.pages import PagePool, page_keys
from dsv3.infer.sequence import Sequence


@dataclass(frozen=True, kw_only=True, eq=False)
class Work:
    """Tokens of one sequence in one pass."""

    sequence: Sequence
    first: int
    """Position of the first token."""
    count: int
    """Known tokens."""
    drafts: tuple[int, ...] = ()
    """Tokens after them that are to be verified."""
    reaches_end: bool
    """Whether what follows the sequence is to be drawn after this pass."""

    @property
    def tokens(self) -> list[int]:
        """All tokens of the pass."""
        return [*self.sequence.tokens[self.first : self.first + self.count], *self.drafts]

    @property
    def num_tokens(self) -> int:
        """How many there are."""
        return self.count + len(self.drafts)


class Scheduler:
    """Sequences that wait and that run, each kept in order of arrival, and the pages they hold."""

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.pool = PagePool(num_pages=config.num_pages, page_tokens=config.page_tokens)
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.expected: list[Sequence] = []
        """They hold pages that are filled from elsewhere, and join those that run once that is done."""
        self.num_preemptions = 0

    def add(self, sequence: Sequence) -> None:
        """Let a sequence wait for its turn."""
        self._find_keys(sequence)
        insort(self.waiting, sequence, key=lambda other: other.arrival)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence off the lists; its pages are free at once, those that are full stay good as a prefix."""
        if sequence in self.waiting:
            self.waiting.remove(sequence)
        else:
            (self.expected if sequence in self.expected else self.running).remove(sequence)
            self.pool.release(sequence.pages)
        sequence.start_over()

    def expect(self, sequence: Sequence) -> bool:
        """Keep pages for a sequence that is read elsewhere; False, and no change, if there is no room for it now."""
        self._find_keys(sequence)
        if len(self.running) + len(self.expected) >= self.config.max_sequences or not self._take_pages(sequence):
            return False
        self.expected.append(sequence)
        return True

    def adopt(self, sequence: Sequence) -> None:
        """Let a sequence run whose pages have been filled."""
        self.expected.remove(sequence)
        insort(self.running, sequence, key=lambda other: other.arrival)

    def next_work(self) -> list[Work]:
        """Return what goes into the next pass; nothing only if nobody waits or runs."""
        works: dict[int, Work] = {}
        budget = self.config.max_step_tokens
        for sequence in self._in_order(decoding=True):
            if budget < 1:
                break
            drafts = sequence.drafts[: budget - 1]
            if drafts and not self.reach(sequence, end=len(sequence.tokens) + len(drafts)):
                drafts = []
            if self._reach_at_any_price(sequence, end=len(sequence.tokens), works=works):
                works[sequence.arrival] = Work(
                    sequence=sequence, first=sequence.num_computed, count=1, drafts=tuple(drafts), reaches_end=True
                )
                budget -= 1 + len(drafts)
        for sequence in self._in_order(decoding=False):
            budget = self._add_chunk(sequence, works=works, budget=budget)
        self._admit(works=works, budget=budget)
        return list(works.values())

    def reach(self, sequence: Sequence, *, end: int) -> bool:
        """Take pages for positions below `end`, all that are lacking or none; return whether they are there."""
        needed = -(-end // self.config.page_tokens) - len(sequence.pages)
        if needed <= 0:
            return True
        taken = self.pool.take(needed)
        sequence.pages += taken or []
        return taken is not None

    def register(self, sequence: Sequence, *, end: int) -> None:
        """Let the full pages of the first `end` positions be found by requests that begin alike."""
        if not self.config.prefix_caching:
            return
        full = end // self.config.page_tokens
        if full <= sequence.num_registered:
            return
        sequence.keys = page_keys(sequence.tokens, page_tokens=self.config.page_tokens, known=sequence.keys)
        for place in range(sequence.num_registered, full):
            self.pool.register(sequence.pages[place], key=sequence.keys[place])
        sequence.num_registered = full

    def check(self) -> None:
        """Raise AssertionError unless pages and sequences agree."""
        self.pool.check([sequence.pages for sequence in [*self.running, *self.expected]])
        assert not any(sequence.pages for sequence in self.waiting), "a sequence that waits holds pages"
        for sequence in self.running:
            assert sequence.num_computed <= len(sequence.pages) * self.config.page_tokens, "entries without a page"

    def _find_keys(self, sequence: Sequence) -> None:
        if self.config.prefix_caching:
            sequence.keys = page_keys(sequence.tokens, page_tokens=self.config.page_tokens, known=sequence.keys)

    def _in_order(self, *, decoding: bool) -> Iterator[Sequence]:
        """Yield running sequences as they arrived, but none that has been preempted by then."""
        for sequence in [sequence for sequence in self.running if sequence.is_decoding == decoding]:
            if sequence in self.running:
                yield sequence

    def _add_chunk(self, sequence: Sequence, *, works: dict[int, Work], budget: int) -> int:
        """Add as much of a prompt as there is room for; return what is left of the step."""
        count = min(sequence.num_pending, budget)
        if count < 1 or not self._reach_at_any_price(sequence, end=sequence.num_computed + count, works=works):
            return budget
        works[sequence.arrival] = Work(
            sequence=sequence,
            first=sequence.num_computed,
            count=count,
            reaches_end=count == sequence.num_pending,
        )
        return self.config.max_step_tokens - sum(work.num_tokens for work in works.values())

    def _admit(self, *, works: dict[int, Work], budget: int) -> None:
        for sequence in list(self.waiting):
            if budget < 1 or len(self.running) >= self.config.max_sequences:
                return
            if self._is_being_computed(sequence):
                continue
            if not self._take_pages(sequence):
                return
            self.waiting.remove(sequence)
            insort(self.running, sequence, key=lambda other: other.arrival)
            budget = self._add_chunk(sequence, works=works, budget=budget)

    def _take_pages(self, sequence: Sequence) -> bool:
        """Give a sequence pages for all its tokens, shared ones first; False, and no change, if they do not suffice."""
        size = self.config.page_tokens
        shared = sequence.keys[: min(self.pool.find(sequence.keys), self._most_shared(sequence))]
        needed = -(-(len(sequence.tokens) + 1) // size) - len(shared)
        if needed > self.pool.num_available - self.pool.num_kept_of(shared):
            return False
        sequence.pages = self.pool.share(shared)
        taken = self.pool.take(needed)
        assert taken is not None
        sequence.pages += taken
        sequence.num_computed = len(shared) * size
        sequence.num_registered = len(shared)
        if sequence.num_cached is None:
            sequence.num_cached = sequence.num_computed
        return True

    def _most_shared(self, sequence: Sequence) -> int:
        """Return how many pages may come from others: something must be left to compute."""
        request = sequence.request
        wants_all = request.with_experts or (request.prompt_logprobs and not sequence.has_reported)
        return 0 if wants_all else (len(sequence.tokens) - 1) // self.config.page_tokens

    def _is_being_computed(self, sequence: Sequence) -> bool:
        """Whether a prompt that runs right now will soon leave pages that this sequence can share."""
        found = self.pool.find(sequence.keys)
        most = self._most_shared(sequence)
        for other in self.running:
            if other.num_registered < min(len(other.keys), most) and other.num_pending > 1:
                common = 0
                while common < min(len(other.keys), most) and other.keys[common] == sequence.keys[common]:
                    common += 1
                if common > found:
                    return True
        return False

    def _reach_at_any_price(self, sequence: Sequence, *, end: int, works: dict[int, Work]) -> bool:
        """Take pages for positions below `end`, from those who came last; False if that was this sequence itself."""
        while not self.reach(sequence, end=end):
            last = self.running[-1]
            works.pop(last.arrival, None)
            self.num_preemptions += 1
            self.remove(last)
            self.add(last)
            if last is sequence:
                return False
        return True
