"""Pages of the latent cache: who holds which, and which of them are worth keeping for requests to come.

A page that is full and computed can be registered under a key that stands for its tokens and all before them. It is
then found again by a request that begins with the same tokens, while others hold it or after they have let go, until
its room is needed: the one that was not wanted for the longest time goes first.
"""

from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b

from dsv3.errors import ConfigError

Key = bytes
"""Stands for the tokens of a page and of all pages before it; a digest, so that no two texts share one."""


def page_keys(tokens: Sequence[int], *, page_tokens: int, known: Sequence[Key] = ()) -> list[Key]:
    """Return the key of every full page of a text; those `known` already are taken over."""
    keys = list(known)
    for first in range(len(keys) * page_tokens, len(tokens) - page_tokens + 1, page_tokens):
        digest = blake2b(keys[-1] if keys else b"", digest_size=20)
        digest.update(",".join(map(str, tokens[first : first + page_tokens])).encode())
        keys.append(digest.digest())
    return keys


class PagePool:
    """Reference counts of pages 0 to `num_pages` - 1. A page is free, held by one or more requests, or kept."""

    def __init__(self, *, num_pages: int, page_tokens: int) -> None:
        if num_pages < 1 or page_tokens < 1:
            raise ConfigError(f"{num_pages} pages of {page_tokens} tokens hold nothing; both must be 1 or more")
        self.num_pages = num_pages
        self.page_tokens = page_tokens
        self._free = list(range(num_pages - 1, -1, -1))
        self._holders = [0] * num_pages
        self._page_of: dict[Key, int] = {}
        self._key_of: dict[int, Key] = {}
        self._kept: OrderedDict[int, None] = OrderedDict()
        """Registered pages that nobody holds, the longest unwanted first."""

    @property
    def num_available(self) -> int:
        """Pages that `take` can give."""
        return len(self._free) + len(self._kept)

    @property
    def num_kept(self) -> int:
        """Pages that nobody holds and that are still good as a beginning."""
        return len(self._kept)

    @property
    def num_held(self) -> int:
        """Pages that requests hold."""
        return self.num_pages - self.num_available

    def take(self, count: int) -> list[int] | None:
        """Return `count` pages, now held by the caller, or None, and no change, if there are not so many."""
        if count > self.num_available:
            return None
        taken = []
        for _ in range(count):
            if self._free:
                page = self._free.pop()
            else:
                page, _ = self._kept.popitem(last=False)
                del self._page_of[self._key_of.pop(page)]
            self._holders[page] = 1
            taken.append(page)
        return taken

    def find(self, keys: Sequence[Key]) -> int:
        """Return how many pages of a text, from its beginning on, are registered."""
        return next((place for place, key in enumerate(keys) if key not in self._page_of), len(keys))

    def share(self, keys: Sequence[Key]) -> list[int]:
        """Return the registered pages of these keys, now held by the caller too; all of them must be registered."""
        pages = [self._page_of[key] for key in keys]
        for page in pages:
            self._holders[page] += 1
            self._kept.pop(page, None)
        return pages

    def num_kept_of(self, keys: Sequence[Key]) -> int:
        """Return how many of these registered pages nobody holds; sharing them makes so many fewer available."""
        return sum(self._page_of[key] in self._kept for key in keys)

    def register(self, page: int, *, key: Key) -> None:
        """Let a page that the caller holds be found under its key. The first page with a key keeps it."""
        assert self._holders[page] > 0, f"page {page} is registered, and nobody holds it"
        if key not in self._page_of and page not in self._key_of:
            self._page_of[key], self._key_of[page] = page, key

    def release(self, pages: Iterable[int]) -> None:
        """Let go of pages, given in the order of the text; later ones are the first to be forgotten."""
        for page in reversed(list(pages)):
            assert self._holders[page] > 0, f"page {page} is let go of more often than it was taken"
            self._holders[page] -= 1
            if self._holders[page] == 0:
                if page in self._key_of:
                    self._kept[page] = None
                else:
                    self._free.append(page)

    def check(self, held: Iterable[Sequence[int]]) -> None:
        """Raise AssertionError unless the counts are those of `held`, the pages of every request, and all adds up."""
        expected = Counter(page for pages in held for page in pages)
        for page, holders in enumerate(self._holders):
            assert holders == expected[page], f"page {page}: {holders} holders on record, {expected[page]} in fact"
        idle = [*self._free, *self._kept]
        assert len(set(idle)) == len(idle), "a page is free twice"
        assert set(idle) == {page for page, holders in enumerate(self._holders) if not holders}, "a page is lost"
        assert {key: page for page, key in self._key_of.items()} == self._page_of, "keys and pages disagree"
        assert set(self._kept) <= set(self._key_of), "a page is kept that cannot be found"
