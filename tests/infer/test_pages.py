"""The pool of pages against a plain model of it, whatever is taken, shared, found and let go of in whatever order."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from dsv3.errors import ConfigError
from dsv3.infer.pages import PagePool, page_keys

NUM_PAGES = 6
KEYS = [bytes([letter]) for letter in b"abcdefgh"]


class Pages(RuleBasedStateMachine):
    """The model: who holds each page, its key, and a list of what nobody holds, the longest unwanted first."""

    def __init__(self):
        super().__init__()
        self.pool = PagePool(num_pages=NUM_PAGES, page_tokens=4)
        self.requests = []
        self.keys = {}
        self.kept = []

    def held(self):
        return {page for pages in self.requests for page in pages}

    @rule(count=st.integers(0, NUM_PAGES + 1))
    def take(self, count):
        held, kept = self.held(), list(self.kept)
        taken = self.pool.take(count)
        if count > NUM_PAGES - len(held):
            assert taken is None
            return
        assert len(set(taken)) == count
        assert not held & set(taken)
        num_free = NUM_PAGES - len(held) - len(kept)
        forgotten = kept[: max(0, count - num_free)]  # free ones go first, then those unwanted for the longest time
        assert [page for page in taken if page in kept] == forgotten
        for page in forgotten:
            self.kept.remove(page)
            del self.keys[page]
        self.requests.append(taken)

    @precondition(lambda self: any(self.requests))
    @rule(data=st.data(), key=st.sampled_from(KEYS))
    def register(self, data, key):
        page = data.draw(st.sampled_from(sorted(self.held())))
        self.pool.register(page, key=key)
        if page not in self.keys and key not in self.keys.values():
            self.keys[page] = key

    @rule(keys=st.lists(st.sampled_from(KEYS), unique=True, max_size=4))
    def share_what_is_found(self, keys):
        page_of = {key: page for page, key in self.keys.items()}
        expected = []
        for key in keys:
            if key not in page_of:
                break
            expected.append(page_of[key])
        found = self.pool.find(keys)
        assert found == len(expected)
        assert self.pool.num_kept_of(keys[:found]) == len(set(expected) & set(self.kept))
        assert self.pool.share(keys[:found]) == expected
        self.kept = [page for page in self.kept if page not in expected]
        self.requests.append(expected)

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def release(self, data):
        pages = self.requests.pop(data.draw(st.integers(0, len(self.requests) - 1)))
        self.pool.release(pages)
        self.kept += [page for page in reversed(pages) if page not in self.held() and page in self.keys]

    @invariant()
    def counts_agree(self):
        self.pool.check(self.requests)
        assert self.pool.num_held == len(self.held())
        assert self.pool.num_kept == len(self.kept)
        assert self.pool.num_available == NUM_PAGES - len(self.held())


TestPages = Pages.TestCase
TestPages.settings = settings(max_examples=60, stateful_step_count=40)


@given(
    first=st.lists(st.integers(0, 12), max_size=30),
    second=st.lists(st.integers(0, 12), max_size=30),
    page_tokens=st.integers(1, 5),
)
def test_two_texts_have_as_many_keys_in_common_as_full_pages_from_the_beginning(first, second, page_tokens):
    ours, theirs = (page_keys(text, page_tokens=page_tokens) for text in (first, second))
    assert (len(ours), len(theirs)) == (len(first) // page_tokens, len(second) // page_tokens)
    for page, (mine, other) in enumerate(zip(ours, theirs, strict=False), start=1):
        assert (mine == other) == (first[: page * page_tokens] == second[: page * page_tokens])


def test_a_key_tells_1_and_12_from_11_and_2_and_a_page_from_the_same_page_further_on():
    assert page_keys([1, 12], page_tokens=2) != page_keys([11, 2], page_tokens=2)
    first, second = page_keys([3, 4, 3, 4], page_tokens=2)
    assert first != second


@given(text=st.lists(st.integers(0, 99), max_size=40), known=st.integers(0, 40), page_tokens=st.integers(1, 5))
def test_keys_that_are_known_are_taken_over(text, known, page_tokens):
    before = page_keys(text[:known], page_tokens=page_tokens)
    assert page_keys(text, page_tokens=page_tokens, known=before) == page_keys(text, page_tokens=page_tokens)


def test_of_one_text_the_end_is_forgotten_before_the_beginning():
    pool, keys = PagePool(num_pages=3, page_tokens=1), page_keys([7, 8, 9], page_tokens=1)
    pages = pool.take(3)
    for page, key in zip(pages, keys, strict=True):
        pool.register(page, key=key)
    pool.release(pages)
    for left in (2, 1, 0):
        pool.take(1)
        assert pool.find(keys) == left


def test_a_pool_without_room_is_refused():
    for sizes in ({"num_pages": 0, "page_tokens": 4}, {"num_pages": 4, "page_tokens": 0}):
        with pytest.raises(ConfigError, match="hold nothing"):
            PagePool(**sizes)


def test_a_page_let_go_of_twice_is_noticed_at_once():
    pool = PagePool(num_pages=2, page_tokens=1)
    pages = pool.take(1)
    pool.release(pages)
    with pytest.raises(AssertionError, match="more often than it was taken"):
        pool.release(pages)
    with pytest.raises(AssertionError, match="nobody holds it"):
        pool.register(pages[0], key=b"a")


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (lambda pool: pool._free.pop(), "a page is lost"),
        (lambda pool: pool._free.append(pool._free[0]), "free twice"),
        (lambda pool: pool._kept.update({pool._free[0]: None}), "free twice"),
        (lambda pool: pool._holders.__setitem__(0, 2), "page 0: 2 holders on record, 1 in fact"),
        (lambda pool: pool._page_of.update({b"b": 1}), "keys and pages disagree"),
        (lambda pool: (pool._free.remove(3), pool._kept.update({3: None})), "cannot be found"),
    ],
)
def test_check_finds_a_planted_fault(fault, message):
    pool = PagePool(num_pages=4, page_tokens=1)
    held = pool.take(2)
    pool.register(held[0], key=b"a")
    pool.check([held])
    fault(pool)
    with pytest.raises(AssertionError, match=message):
        pool.check([held])


def test_check_finds_a_page_that_a_request_has_and_never_took():
    pool = PagePool(num_pages=4, page_tokens=1)
    held = pool.take(2)
    with pytest.raises(AssertionError, match="page 3: 0 holders on record, 1 in fact"):
        pool.check([held, [3]])
