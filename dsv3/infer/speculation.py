"""Drafts by the MTP modules (report 5.4.3): tokens guessed ahead, to be verified by the main model in one pass.

Module m reads, at position p, the state before it and token p + m + 1, as in training (model/mtp.py). Once the main
model has read a token, the modules follow: their entries of the cache are made anew from the tokens that were really
taken, and from its end the chain goes on with guesses. A chain longer than there are modules reads the last module's
own output, one position further on.
"""

from collections.abc import Sequence as Items
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from dsv3.batch import TokenBatch
from dsv3.infer.runner import Runner
from dsv3.infer.sequence import Sequence
from dsv3.runtime.log import get_logger

log = get_logger(__name__)


@dataclass(kw_only=True, eq=False)
class Chain:
    """A sequence that the modules follow, and the drafts that its chain has come to."""

    sequence: Sequence
    num_wanted: int
    """Drafts; 0 where a prompt is not read to its end."""
    drafts: list[int] = field(default_factory=list)
    states: list[Float[Tensor, "token hidden"]] = field(default_factory=list)
    """What the module before has just put out, from tokens that stand; the next module reads it first."""
    guesses: Float[Tensor, "guess hidden"] | None = None
    """What it made of drafts: good for this chain alone."""
    is_broken: bool = False
    """Whether the last draft could not be made, so that no further one can."""
    error: Exception | None = None
    """What the request's grammar raised when it was moved; where it stands now is not known."""

    def goes_on(self, step: int) -> bool:
        """Whether draft number `step` (from 0) is to be made."""
        return not self.is_broken and self.num_wanted > step == len(self.drafts)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Piece:
    """Positions of one sequence in one pass of a module."""

    chain: Chain
    first: int
    state: Float[Tensor, "token hidden"]
    tokens: list[int]
    """One further on than the module before reads."""
    num_true: int
    """Positions whose tokens all stand; those after them read drafts."""


class Drafter:
    """Runs the modules behind the main model. It keeps nothing: what is to be kept lies in the sequences."""

    def __init__(self, runner: Runner, *, num_modules: int, end_ids: frozenset[int], vocab_size: int) -> None:
        self.num_modules = num_modules
        self._runner = runner
        self._end_ids = end_ids
        self._vocab_size = vocab_size

    def keep(self, sequence: Sequence, state: Float[Tensor, "token hidden"], *, first: int) -> None:
        """Lay states of the main model by until the modules follow; `first` is the position of the first of them."""
        past = sequence.past_of(0, first=first)
        for module in range(1, self.num_modules):
            sequence.past_of(module, first=first)
        past.unread.append(state)

    def follow(self, chains: Items[Chain]) -> None:
        """Bring all modules in step with the sequences, and leave drafts in these, where they are wanted.

        The request of a chain with an `error` cannot go on.
        """
        for module in range(self.num_modules):
            pieces = [piece for chain in chains if (piece := self._piece(chain, module=module)) is not None]
            self._run(pieces, module=module)
        for step in range(self.num_modules, max((chain.num_wanted for chain in chains), default=0)):
            pieces = [self._piece_ahead(chain, step=step) for chain in chains if chain.goes_on(step)]
            self._run(pieces, module=self.num_modules - 1, step=step)
        for chain in chains:
            _roll_back(chain)
            chain.sequence.drafts = chain.drafts

    def _piece(self, chain: Chain, *, module: int) -> _Piece | None:
        """Return what a module reads of one sequence: all that stands, and up to its end if it is to draft."""
        sequence, tokens = chain.sequence, [*chain.sequence.tokens, *chain.drafts]
        past = sequence.mtp[module]
        states = [*past.unread, *chain.states]
        rows = torch.cat(states) if states else None
        num_states = 0 if rows is None else len(rows)
        last_true = len(sequence.tokens) - 2 - module
        num_true = max(0, min(num_states, last_true + 1 - past.done))
        past.unread = [] if rows is None or num_true == num_states else [rows[num_true:].clone()]
        first, past.done = past.done, past.done + num_true
        count = num_true
        if chain.goes_on(module):
            assert rows is not None
            count = len(sequence.tokens) - 1 - first
            if chain.guesses is not None:
                rows = torch.cat([rows, chain.guesses])
        chain.states, chain.guesses = [], None
        if rows is None or count == 0:
            return None
        return _Piece(
            chain=chain,
            first=first,
            state=rows[:count],
            tokens=tokens[first + module + 1 : first + module + 1 + count],
            num_true=num_true,
        )

    def _piece_ahead(self, chain: Chain, *, step: int) -> _Piece:
        """Return what the last module reads beyond its chain: its own state, and the newest draft."""
        assert chain.guesses is not None
        first = len(chain.sequence.tokens) - 1 + step - self.num_modules
        return _Piece(chain=chain, first=first, state=chain.guesses[-1:], tokens=chain.drafts[-1:], num_true=0)

    def _run(self, pieces: Items[_Piece], *, module: int, step: int | None = None) -> None:
        if not pieces:
            return
        batch = TokenBatch.from_pieces([piece.tokens for piece in pieces], firsts=[piece.first for piece in pieces])
        states = self._runner.predict_ahead(
            torch.cat([piece.state for piece in pieces]),
            depth=module,
            batch=batch,
            pages=[piece.chain.sequence.pages for piece in pieces],
        )
        outputs = states.handed_on.split(list(batch.lengths))
        number = module if step is None else step
        drafting = [place for place, piece in enumerate(pieces) if piece.chain.goes_on(number)]
        for piece, output in zip(pieces, outputs, strict=True):
            piece.chain.states = [output[: piece.num_true]] if step is None else []
            piece.chain.guesses = (
                output[piece.num_true :] if step is None and module + 1 < self.num_modules else output[-1:]
            )
        if drafting:
            last = (batch.starts[1:][drafting] - 1).to(states.hidden.device)
            logits = self._runner.logits(states.hidden.index_select(0, last))
            for row, place in zip(logits, drafting, strict=True):
                self._draft(pieces[place].chain, row)

    def _draft(self, chain: Chain, logits: Float[Tensor, " vocab"]) -> None:
        """Draw the chain's next draft, as the token it stands for will be drawn; end tokens are not worth verifying."""
        request = chain.sequence.request
        token = self._choose(chain, logits)
        chain.is_broken = (
            token is None
            or token in self._end_ids
            or token in request.params.stop_token_ids
            or (request.constraint is not None and not _advance(chain, token))
        )
        if token is not None and not chain.is_broken:
            chain.drafts.append(token)

    def _choose(self, chain: Chain, logits: Float[Tensor, " vocab"]) -> int | None:
        """Return the token drawn, or None where that fails: if the text comes here, its own draw will say why."""
        sequence, constraint = chain.sequence, chain.sequence.request.constraint
        try:
            allowed = None if constraint is None else constraint.allowed(vocab_size=self._vocab_size)
            place = sequence.num_answer + len(chain.drafts)
            return sequence.sampler.choose(logits, place=place, drafts=chain.drafts, allowed=allowed)
        except Exception as error:
            log.debug("request %s: no draft, for %r", sequence.request.id, error)
            return None


def _advance(chain: Chain, token: int) -> bool:
    """Move the grammar by one draft; False if it does not allow that, or breaks."""
    constraint = chain.sequence.request.constraint
    assert constraint is not None
    try:
        return constraint.advance(token)
    except Exception as error:
        chain.error = error
        return False


def _roll_back(chain: Chain) -> None:
    """Move the grammar back over the drafts, which are not part of the text yet."""
    constraint = chain.sequence.request.constraint
    if constraint is None or not chain.drafts or chain.error:
        return
    try:
        constraint.roll_back(len(chain.drafts))
    except Exception as error:
        chain.error = error


class DraftLength:
    """How many drafts pay: the length that gives most tokens a second, by what was accepted and what steps took.

    Acceptance is estimated for each place in the chain, time for each length and (roughly) number of sequences. Lengths
    not timed yet are tried first; one that seems worse is tried again now and then, for texts change.
    """

    TRIES = 3
    """Steps of a length before its time is believed."""
    PATIENCE = (64, 256)
    """Steps after which a neighbour of the best length is tried again: at first, and at most. Each time that the same
    length stays the best, it takes twice as long."""
    RATE = 0.1
    """Weight of the newest observation."""
    DOUBT = 0.98
    """What a draft more must bring at least, as a factor."""

    def __init__(self, most: int, *, is_adaptive: bool) -> None:
        self._most = most
        self._is_adaptive = is_adaptive
        self._accepted = [0.8 * 0.9**place for place in range(most)]
        self._seconds: dict[tuple[int, int], float] = {}
        self._tries: dict[tuple[int, int], int] = {}
        self._best: int | None = None
        self._patience, _ = self.PATIENCE
        self._steps = 0
        """Since the last try of a neighbour."""
        self._turn = False

    def choose(self, *, num_sequences: int) -> int:
        """Return how many drafts to make for each sequence of the next step."""
        if not self._is_adaptive or self._most == 0 or num_sequences == 0:
            return self._most
        size = num_sequences.bit_length()
        for length in (self._most, *range(self._most)):
            if self._tries.get((size, length), 0) < self.TRIES:
                return length
        # A draft more must be worth more than what is not known of its cost.
        best = max(
            range(self._most + 1), key=lambda length: self.tokens_per_second(length, size=size) * self.DOUBT**length
        )
        if best != self._best:
            self._best, self._steps = best, 0
            self._patience, _ = self.PATIENCE
        self._steps += 1
        if self._steps <= self._patience:
            return best
        if self._steps == self._patience + self.TRIES:
            self._steps, self._turn = 0, not self._turn
            self._patience = min(2 * self._patience, self.PATIENCE[1])
        goes_up = best == 0 or (best < self._most and self._turn)
        return best + 1 if goes_up else best - 1

    def tokens_per_second(self, length: int, *, size: int) -> float:
        """Return what a length is expected to bring for one sequence."""
        expected, chance = 1.0, 1.0
        for place in range(length):
            chance *= self._accepted[place]
            expected += chance
        return expected / self._seconds[size, length]

    def record(self, *, num_sequences: int, length: int, seconds: float) -> None:
        """Take in what a step of nothing but decoding took, in which so many drafts were verified and made."""
        key = (num_sequences.bit_length(), length)
        self._tries[key] = self._tries.get(key, 0) + 1
        known = self._seconds.get(key, seconds)
        # The first time of anything is the slowest; later ones count a little each, and the odd slow one no more.
        is_new = self._tries[key] <= self.TRIES
        seen = min(max(seconds, known / 2), 1.5 * known)
        self._seconds[key] = min(seconds, known) if is_new else known + self.RATE * (seen - known)

    def record_drafts(self, *, drafted: int, accepted: int) -> None:
        """Take in how far one chain held: each place counts once those before it were right."""
        for place in range(min(accepted + 1, drafted)):
            seen = 1.0 if place < accepted else 0.0
            self._accepted[place] += self.RATE * (seen - self._accepted[place])
