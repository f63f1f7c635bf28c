"""Log-probabilities of tokens in many texts at once; what texts have in common is read once.

Texts are sorted, so that those which begin alike lie side by side, and are read as a tree: a stretch that several share
first, then what follows it in each, over the same pages of the cache. A page is shared whole or not at all, so a few
tokens before a fork are read once for each side.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from dsv3.batch import TokenBatch
from dsv3.errors import CheckpointError
from dsv3.infer.runner import Runner
from dsv3.infer.sampler import NOT_NUMBERS

TOKENS_AT_ONCE = 1024
"""Tokens of one forward pass."""
LOGITS_AT_ONCE = 1 << 22
_BYTES = 4
"""Of a token in a key; keys sort as the texts do."""


@dataclass(frozen=True, kw_only=True)
class ScoredText:
    """Tokens of which the last ones are scored."""

    tokens: Sequence[int]
    num_scored: int
    """At least one token stands before them."""


@dataclass(frozen=True, kw_only=True)
class TextScore:
    """What the scored tokens of a text were given."""

    logprobs: tuple[float, ...]
    is_greedy: bool
    """Whether each of them was the likeliest."""


@dataclass(kw_only=True, eq=False)
class Stretch:
    """Tokens `begin` to `end` of the texts `first` to `last`, which are the same up to there."""

    first: int
    last: int
    """One more than the last of them."""
    begin: int
    """The first of a page, always."""
    end: int
    parent: "Stretch | None"
    pages: list[int] = field(default_factory=list)
    """Its own."""
    table: list[int] = field(default_factory=list)
    """All from the beginning of the text on."""
    num_open: int = 0
    """Stretches right after it that are not done with."""

    @property
    def num_tokens(self) -> int:
        """How many there are to read."""
        return self.end - self.begin


class PrefixTree:
    """What is to be read of texts that are given without their last tokens, which are only predicted."""

    def __init__(self, texts: Sequence[ScoredText], *, page_tokens: int) -> None:
        self._texts = texts
        self._page_tokens = page_tokens
        keys = [np.asarray(text.tokens[:-1], dtype=">u4").tobytes() for text in texts]
        self._keys: list[bytes] = []
        self._riders: list[list[int]] = []
        # A text that is the beginning of another stands right before it, and is read when that one is.
        for place in sorted(range(len(keys)), key=keys.__getitem__, reverse=True):
            if self._keys and self._keys[-1].startswith(keys[place]):
                self._riders[-1].append(place)
            else:
                self._keys.append(keys[place])
                self._riders.append([place])
        self._keys.reverse()
        self._riders.reverse()

    @property
    def most_pages(self) -> int:
        """Pages that the longest text fills."""
        longest = max((len(key) // _BYTES for key in self._keys), default=0)
        return -(-longest // self._page_tokens)

    def roots(self) -> list[Stretch]:
        """Return what texts begin with."""
        return list(self._stretches(first=0, last=len(self._keys), begin=0, parent=None))

    def after(self, stretch: Stretch) -> list[Stretch]:
        """Return what follows; nothing at the end of a text."""
        if stretch.end * _BYTES == len(self._keys[stretch.first]):
            return []
        return list(self._stretches(first=stretch.first, last=stretch.last, begin=stretch.end, parent=stretch))

    def tokens(self, stretch: Stretch) -> list[int]:
        """Return the tokens to read."""
        part = self._keys[stretch.first][stretch.begin * _BYTES : stretch.end * _BYTES]
        return np.frombuffer(part, dtype=">u4").tolist()

    def predicted(self, stretch: Stretch) -> Iterator[tuple[int, int, int]]:
        """Yield what is to be scored after its tokens: place in the stretch, text, place in the text's scored ones."""
        for key in range(stretch.first, stretch.last):
            for text in self._riders[key]:
                length = len(self._texts[text].tokens) - 1
                start = length - self._texts[text].num_scored
                for row in range(max(start, stretch.begin), min(length, stretch.end)):
                    yield row - stretch.begin, text, row - start

    def _stretches(self, *, first: int, last: int, begin: int, parent: Stretch | None) -> Iterator[Stretch]:
        """Yield a stretch for each page that texts, the same before it, go on with."""
        page = slice(begin * _BYTES, (begin + self._page_tokens) * _BYTES)
        for _, group in groupby(range(first, last), key=lambda key: self._keys[key][page]):
            members = list(group)
            common = self._common(members[0], members[-1])
            most = begin + max(1, TOKENS_AT_ONCE // self._page_tokens) * self._page_tokens
            yield Stretch(first=members[0], last=members[-1] + 1, begin=begin, end=min(common, most), parent=parent)

    def _common(self, first: int, last: int) -> int:
        """Return how many tokens all texts between two begin with: all of one text, whole pages of several."""
        if first == last:
            return len(self._keys[first]) // _BYTES
        length = min(len(self._keys[first]), len(self._keys[last]))
        one, other = (np.frombuffer(self._keys[key][:length], dtype=">u4") for key in (first, last))
        return int((one != other).argmax()) // self._page_tokens * self._page_tokens


@torch.inference_mode()
def score_texts(
    runner: Runner, *, texts: Sequence[ScoredText], pages: Sequence[int], page_tokens: int
) -> list[TextScore]:
    """Return what the scored tokens of each text were given, reading through `pages`, which the caller holds.

    They must hold the longest text, its last token not counted; more of them allow more texts in one pass. Neither
    order nor company of the texts changes a score.

    Raises:
        CheckpointError: the model computes something that is no number.
    """
    tree = PrefixTree(texts, page_tokens=page_tokens)
    free = list(pages)
    assert len(free) >= tree.most_pages, f"{len(free)} pages do not hold a text of {tree.most_pages} pages"
    logprobs = [[math.nan] * text.num_scored for text in texts]
    is_greedy = [True] * len(texts)
    todo = tree.roots()[::-1]
    while todo:
        stretches = _next_pass(todo, free=free, kept_free=tree.most_pages, page_tokens=page_tokens)
        batch = TokenBatch.from_pieces(
            [tree.tokens(stretch) for stretch in stretches], firsts=[stretch.begin for stretch in stretches]
        )
        hidden = runner.forward(batch, pages=[stretch.table for stretch in stretches]).hidden
        wanted = [
            (start + row, text, place)
            for start, stretch in zip(batch.starts.tolist(), stretches, strict=False)
            for row, text, place in tree.predicted(stretch)
        ]
        tokens = [texts[text].tokens[place - texts[text].num_scored] for _, text, place in wanted]
        found = _scores(runner, hidden=hidden, rows=[row for row, _, _ in wanted], tokens=tokens)
        for (_, text, place), logprob, is_likeliest in zip(wanted, *found, strict=True):
            logprobs[text][place] = logprob
            is_greedy[text] &= is_likeliest
        for stretch in reversed(stretches):
            following = tree.after(stretch)
            stretch.num_open = len(following)
            todo += following[::-1]
            if not following:
                _close(stretch, free=free)
    return [
        TextScore(logprobs=tuple(values), is_greedy=greedy) for values, greedy in zip(logprobs, is_greedy, strict=True)
    ]


def _next_pass(todo: list[Stretch], *, free: list[int], kept_free: int, page_tokens: int) -> list[Stretch]:
    """Take stretches off the end of `todo`, and give them pages.

    All but the first must leave as many pages free as the longest text needs. So the one at the end of `todo` can
    always be read, with all that follows it one after the other, which gives back what it took.
    """
    taken: list[Stretch] = []
    tokens = 0
    while todo:
        stretch = todo[-1]
        needed = -(-stretch.num_tokens // page_tokens)
        tokens += stretch.num_tokens
        if taken and (tokens > TOKENS_AT_ONCE or len(free) - needed < kept_free):
            break
        todo.pop()
        stretch.pages = [free.pop() for _ in range(needed)]
        stretch.table = [*(stretch.parent.table if stretch.parent else ()), *stretch.pages]
        taken.append(stretch)
    return taken


def _close(stretch: Stretch, *, free: list[int]) -> None:
    """Give back the pages of a stretch that nothing follows any more, and of those before it that only it kept."""
    closed: Stretch | None = stretch
    while closed is not None:
        free += closed.pages
        closed = closed.parent
        if closed is not None:
            closed.num_open -= 1
            if closed.num_open:
                return


def _scores(
    runner: Runner, *, hidden: Float[Tensor, "token hidden"], rows: list[int], tokens: list[int]
) -> tuple[list[float], list[bool]]:
    """Return the log-probability of each token after its row, and whether it is the likeliest there.

    Logits are made of a few rows at a time, once for each row.
    """
    distinct, which = torch.tensor(rows, dtype=torch.long).unique(return_inverse=True)
    targets = torch.tensor(tokens, dtype=torch.long)
    logprobs, is_likeliest = torch.empty(len(rows)), torch.empty(len(rows), dtype=torch.bool)
    at_once = max(1, LOGITS_AT_ONCE // runner.config.vocab_size)
    for begin in range(0, len(distinct), at_once):
        block = distinct[begin : begin + at_once]
        # Not logsumexp, which sums over one row in another order than over several.
        table = runner.logits(hidden.index_select(0, block.to(hidden.device))).float().log_softmax(dim=-1)
        asked = ((which >= begin) & (which < begin + at_once)).nonzero()[:, 0]
        logprobs[asked] = table[which[asked] - begin, targets[asked]]
        is_likeliest[asked] = table.argmax(dim=-1)[which[asked] - begin] == targets[asked]
    if not logprobs.isfinite().all():
        raise CheckpointError(NOT_NUMBERS)
    return logprobs.tolist(), is_likeliest.tolist()
