"""The inference engine: many requests at once over one model, a step at a time.

Each step is one pass over whatever is due: chunks of prompts, the newest token of requests that decode, and drafts to
be verified. What a request is answered does not depend on the others: see docs/decisions/0005-engine.md.
"""

import math
import time
from collections.abc import Iterator
from collections.abc import Sequence as Items
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from dsv3.batch import TokenBatch
from dsv3.config import EngineConfig
from dsv3.errors import CheckpointError, ConfigError, Dsv3Error, RankLostError
from dsv3.infer.events import EngineStats, FinishReason, TokenEvent, TokenLogprob
from dsv3.infer.handover import Handover, MtpHandover, PageSink
from dsv3.infer.request import Request
from dsv3.infer.runner import Runner
from dsv3.infer.sampler import NOT_NUMBERS, TokenSampler, draw_freely
from dsv3.infer.scheduler import Scheduler, Work
from dsv3.infer.sequence import MtpPast, Sequence
from dsv3.infer.speculation import Chain, Drafter, DraftLength
from dsv3.runtime.log import get_logger

log = get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class Offer:
    """What is known of one row of logits before its sequence is looked at."""

    best: float
    """The highest logit."""
    token: int
    """What is drawn, or, unless `is_drawn`, the likeliest token."""
    is_drawn: bool
    logprob: TokenLogprob | None


@dataclass(kw_only=True, eq=False)
class Outcome:
    """What one pass brought one sequence."""

    work: Work
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    end: TokenLogprob | None = None
    num_accepted: int = 0
    finish_reason: FinishReason | None = None
    error: str = ""

    def fail(self, error: Exception) -> None:
        """End the request with what broke; tokens that it has brought by then stand."""
        self.finish_reason = FinishReason.FAILED
        self.error = (str(error) if isinstance(error, Dsv3Error) else "") or repr(error)


class Engine:
    """Requests in, tokens out. It does nothing by itself: call `step` while it `has_work`, from one thread."""

    def __init__(self, runner: Runner, *, config: EngineConfig, vocab_size: int, eos_id: int) -> None:
        if config.max_drafts and not runner.num_mtp_modules:
            raise ConfigError(
                f"max_drafts = {config.max_drafts}, but the model has no MTP module to draft with; use max_drafts = 0"
            )
        runner.make_pages(num_pages=config.num_pages, page_tokens=config.page_tokens)
        self.config = config
        self._runner = runner
        self._vocab_size = vocab_size
        self._eos_id = eos_id
        self._limit = min(runner.config.max_position_embeddings, config.num_pages * config.page_tokens)
        self._scheduler = Scheduler(config)
        self._drafter = Drafter(
            runner,
            num_modules=min(config.max_drafts, runner.num_mtp_modules),
            end_ids=frozenset([eos_id]),
            vocab_size=vocab_size,
        )
        self._draft_length = DraftLength(config.max_drafts, is_adaptive=config.adaptive_drafts)
        self._num_wanted = 0
        """Drafts that were wanted of each sequence after the last step."""
        self._most_unread = max(64, config.page_tokens)
        self._sequences: dict[str, Sequence] = {}
        self._num_arrived = 0
        self._unsaid: list[TokenEvent] = []
        self._stats = EngineStats(
            num_pages=config.num_pages, drafted_at=[0] * config.max_drafts, accepted_at=[0] * config.max_drafts
        )

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to do or to tell."""
        return bool(self._scheduler.waiting or self._scheduler.running or self._unsaid)

    @property
    def context_limit(self) -> int:
        """Tokens that prompt and answer may have together: the model's context, or what all pages hold."""
        return self._limit

    def add(self, request: Request) -> None:
        """Take in a request; its first tokens come with a later `step`.

        Raises:
            ConfigError: it can never be run: an empty prompt, ids outside the vocabulary, no room for an answer, or an
                id that is in use.
        """
        sequence = self._sequence(request)
        self._sequences[request.id] = sequence
        self._scheduler.add(sequence)

    def expect(self, request: Request) -> int | None:
        """Keep room for a request that another engine reads; `write` fills it, and `adopt` lets it go on here.

        Returns the first page of the text that is lacking here; those before it are in the prefix cache. None if there
        is no room now: ask again when something has ended.

        Raises:
            ConfigError: as for `add`.
        """
        sequence = self._sequence(request)
        if not self._scheduler.expect(sequence):
            return None
        self._sequences[request.id] = sequence
        return sequence.num_registered

    def write(self, request_id: str, *, entries: Float[Tensor, "layer page token entry"], first_page: int) -> None:
        """Fill pages of an expected request, number `first_page` of the text and those that follow it."""
        sequence = self._sequences[request_id]
        pages = sequence.pages[first_page : first_page + entries.shape[1]]
        assert sequence in self._scheduler.expected, f"request {request_id} is not expected"
        assert first_page >= sequence.num_registered, "a page that others hold would be written"
        self._runner.write_pages(pages, entries=entries)

    def adopt(self, request_id: str, handover: Handover) -> None:
        """Go on with an expected request whose pages are all there.

        Raises:
            ConfigError: its grammar does not allow the token, so that the two engines do not agree.
        """
        sequence = self._sequences[request_id]
        assert handover.num_computed == len(sequence.tokens), "what was read is not what was asked"
        sequence.take(handover.token)
        sequence.num_computed = handover.num_computed
        sequence.has_reported = True
        sequence.mtp = [
            MtpPast(done=past.done, unread=[] if past.unread is None else [past.unread.to(self._runner.device)])
            for past in handover.mtp
        ]
        self._scheduler.adopt(sequence)

    def cancel(self, request_id: str) -> None:
        """End a request and free its pages now; its last event comes with the next step. Unknown ids are no error."""
        sequence = self._sequences.get(request_id)
        if sequence is None:
            return
        self._end(sequence, FinishReason.CANCELLED)
        event = TokenEvent(
            id=request_id,
            finish_reason=FinishReason.CANCELLED,
            num_prompt_tokens=sequence.num_prompt,
            num_cached_tokens=sequence.num_cached or 0,
        )
        self._unsaid.append(event)

    @torch.inference_mode()
    def step(self) -> list[TokenEvent]:
        """Run one pass, and return what it brought, request by request."""
        events, self._unsaid = self._unsaid, []
        began = time.perf_counter()
        works = self._scheduler.next_work()
        if not works:
            return events
        outcomes = [Outcome(work=work) for work in works]
        try:
            self._read(outcomes)
            num_wanted = self._draft_length.choose(num_sequences=len(works))
            self._draft(outcomes, num_wanted=num_wanted)
        except RankLostError:  # What ranks have begun together no rank can go on with by itself.
            raise
        except Exception as error:  # Whatever a model may raise: this step's requests fail, the engine goes on.
            log.exception("a step failed; its %d requests are ended", len(works))
            for outcome in outcomes:
                if outcome.finish_reason is None:
                    outcome.fail(error)
        else:
            self._time(works, seconds=time.perf_counter() - began, num_wanted=num_wanted)
        self._stats.num_steps += 1
        self._stats.num_read_tokens += sum(work.num_tokens for work in works)
        self._stats.step_seconds += time.perf_counter() - began
        return events + [event for outcome in outcomes if (event := self._event(outcome)) is not None]

    @torch.inference_mode()
    def read(self, ids: list[int]) -> Float[Tensor, "token vocab"]:
        """Return the logits after each of the given tokens, read by themselves in one pass, between steps.

        Raises:
            ConfigError: ids outside the vocabulary, or more tokens than there are free pages for.
        """
        check_ids(ids, vocab_size=self._runner.config.vocab_size)
        with self.lend_pages(len(ids)) as pages:
            return self._runner.logits(self._runner.forward(TokenBatch.from_sequences([ids]), pages=[pages]).hidden)

    @contextmanager
    def lend_pages(self, num_tokens: int, *, most_tokens: int = 0) -> Iterator[list[int]]:
        """Lend pages of the cache to whoever reads by the runner between steps: for `num_tokens` at least.

        There are more, up to `most_tokens`, where so many are free.

        Raises:
            ConfigError: there is less room.
        """
        pool, size = self._scheduler.pool, self.config.page_tokens
        pages = pool.take(max(-(-num_tokens // size), min(-(-most_tokens // size), pool.num_available)))
        if pages is None:
            raise ConfigError(
                f"{num_tokens} tokens do not fit the {pool.num_available * size} that the cache has room for; "
                "give fewer, or load the model with more cache_tokens"
            )
        try:
            yield pages
        finally:
            pool.release(pages)

    def stats(self) -> EngineStats:
        """Return counts since the start, and what is held now."""
        pool = self._scheduler.pool
        return replace(
            self._stats,
            num_waiting=len(self._scheduler.waiting),
            num_running=len(self._scheduler.running),
            num_pages_in_use=pool.num_held,
            num_pages_cached=pool.num_kept,
            num_preemptions=self._scheduler.num_preemptions,
            drafted_at=list(self._stats.drafted_at),
            accepted_at=list(self._stats.accepted_at),
            finished=dict(self._stats.finished),
        )

    def check(self) -> None:
        """Raise AssertionError unless pages, prefixes and requests agree, and nothing is held for nobody."""
        self._scheduler.check()
        known = {*self._scheduler.waiting, *self._scheduler.running, *self._scheduler.expected}
        assert known == set(self._sequences.values()), "a request is on one list and not on the other"

    def _sequence(self, request: Request) -> Sequence:
        self._refuse_what_cannot_run(request)
        sampler = TokenSampler(request.params, prompt_ids=request.prompt_ids, vocab_size=self._vocab_size)
        sequence = Sequence(
            request=request, arrival=self._num_arrived, tokens=list(request.prompt_ids), sampler=sampler
        )
        for token in request.answer_ids:
            sequence.take(token)
            sequence.has_reported = True
        self._num_arrived += 1
        return sequence

    def _refuse_what_cannot_run(self, request: Request) -> None:
        prompt, params = [*request.prompt_ids, *request.answer_ids], request.params
        if request.id in self._sequences:
            raise ConfigError(f"request {request.id!r} is being worked on already; give each request an id of its own")
        if not prompt:
            raise ConfigError("the prompt has no tokens; give at least one, such as the model's bos_token_id")
        # What the model has a row for can be read; a probability belongs to what can be drawn alone.
        known = self._vocab_size if request.prompt_logprobs else self._runner.config.vocab_size
        check_ids(prompt, vocab_size=known)
        check_ids([token for token, _ in params.logit_bias], vocab_size=self._vocab_size, what="of logit_bias")
        check_ids(params.stop_token_ids, vocab_size=self._vocab_size, what="of stop_token_ids")
        if request.answer_ids and params.max_tokens is not None and len(request.answer_ids) >= params.max_tokens:
            raise ConfigError(
                f"answer_ids has {len(request.answer_ids)} tokens, and max_tokens = {params.max_tokens}: it is whole"
            )
        if len(prompt) >= self._limit:
            whose = "the model's context is"
            if self._limit < self._runner.config.max_position_embeddings:
                whose = "all pages of the engine's cache hold"
            raise ConfigError(
                f"the prompt has {len(prompt)} tokens, and {whose} {self._limit} tokens, prompt and answer together; "
                f"shorten the prompt to at most {self._limit - 1}"
            )

    # ---- one pass ----

    def _read(self, outcomes: Items[Outcome]) -> None:
        """Run the main model, draw what follows each sequence that was read to its end, and keep what was right."""
        works = [outcome.work for outcome in outcomes]
        batch = TokenBatch.from_pieces([work.tokens for work in works], firsts=[work.first for work in works])
        starts = batch.starts.tolist()
        with_experts = any(work.sequence.request.with_experts for work in works)
        pages = [work.sequence.pages for work in works]
        states = self._runner.forward(batch, pages=pages, with_experts=with_experts)
        wanted = [rows_wanted(work) for work in works]
        rows = [start + row for start, mine in zip(starts, wanted, strict=False) for row in mine]
        logits = torch.empty(0, self._vocab_size)
        if rows:
            logits = self._runner.logits(states.hidden.index_select(0, torch.tensor(rows, device=states.hidden.device)))
        offers = self._offers(works, logits=logits[:, : self._vocab_size], counts=[len(mine) for mine in wanted])
        begin = 0
        for outcome, mine, (first, end) in zip(outcomes, wanted, pairwise(starts), strict=True):
            work = outcome.work
            part = slice(begin, begin + len(mine))
            begin += len(mine)
            if states.experts is not None and work.sequence.request.with_experts:
                work.sequence.keep_experts(states.experts[first:end].to(torch.int16).numpy())
            self._take(outcome, logits=logits[part], offers=offers[part])
            if outcome.finish_reason in (None, FinishReason.HANDED_OVER) and self._drafter.num_modules:
                standing = min(work.first + work.num_tokens, len(work.sequence.tokens) - 1) - work.first
                self._drafter.keep(work.sequence, states.handed_on[first:end][:standing], first=work.first)

    def _offers(self, works: Items[Work], *, logits: Float[Tensor, "row vocab"], counts: Items[int]) -> list[Offer]:
        """Return what can be said of all rows at once, `counts` of them for each sequence.

        The likeliest token is drawn where nothing else is asked for, and so are draws from all tokens; their
        log-probabilities come with them where no others are wanted.
        """
        best, likeliest = logits.max(dim=1)
        tokens = likeliest.tolist()
        is_drawn, is_told = [False] * len(tokens), [False] * len(tokens)
        free: dict[int, tuple[int, int, float]] = {}
        end = 0
        for work, count in zip(works, counts, strict=True):
            sequence, end = work.sequence, end + count
            request, sampler = sequence.request, sequence.sampler
            if request.constraint is not None or not (sampler.is_plain or sampler.is_free):
                continue
            first = end - len(drawn_rows(work))
            for row in range(first, end):
                is_drawn[row], is_told[row] = True, request.num_logprobs == 0
                if sampler.is_free:
                    free[row] = (sampler.seed, sequence.num_answer + row - first, request.params.temperature)
        if free:
            seeds, places, temperatures = zip(*free.values(), strict=True)
            drawn = draw_freely(logits[list(free)], seeds=seeds, places=places, temperatures=temperatures)
            for row, token in zip(free, drawn, strict=True):
                tokens[row] = token
        logprobs: dict[int, TokenLogprob] = {}
        if told := [row for row, is_so in enumerate(is_told) if is_so]:
            chosen = torch.tensor([tokens[row] for row in told], device=logits.device)
            values = logits[told].log_softmax(dim=-1).gather(1, chosen[:, None])[:, 0].tolist()
            logprobs = {
                row: TokenLogprob(token=tokens[row], logprob=value, top=())
                for row, value in zip(told, values, strict=True)
            }
        return [
            Offer(best=value, token=token, is_drawn=done, logprob=logprobs.get(row))
            for row, (value, token, done) in enumerate(zip(best.tolist(), tokens, is_drawn, strict=True))
        ]

    def _take(self, outcome: Outcome, *, logits: Float[Tensor, "row vocab"], offers: Items[Offer]) -> None:
        """Draw and commit tokens of one sequence: one more than drafts that were right."""
        work, sequence = outcome.work, outcome.work.sequence
        try:
            skipped = self._score_prompt(work, logits)
            sequence.num_computed = work.first + work.count
            if work.reaches_end:
                self._draw(outcome, logits=logits[skipped:], offers=offers[skipped:])
        except Dsv3Error as error:
            outcome.fail(error)
        except Exception as error:  # A grammar is foreign code; what breaks in it ends its own request.
            log.exception("request %s failed", sequence.request.id)
            outcome.fail(error)

    def _draw(self, outcome: Outcome, *, logits: Float[Tensor, "row vocab"], offers: Items[Offer]) -> None:
        """Draw token after token for as long as the drafts agree with what is drawn."""
        sequence, drafts = outcome.work.sequence, outcome.work.drafts
        request, constraint = sequence.request, sequence.request.constraint
        for place, offer in enumerate(offers):
            if not math.isfinite(offer.best):
                raise CheckpointError(NOT_NUMBERS)
            token, logprob = offer.token, offer.logprob
            if not offer.is_drawn:
                allowed = None if constraint is None else constraint.allowed(vocab_size=self._vocab_size)
                token = sequence.sampler.choose(logits[place], place=sequence.num_answer, allowed=allowed)
            if request.num_logprobs is not None and logprob is None:
                logprob = logprob_of(logits[place, : self._vocab_size], token, num_top=request.num_logprobs)
            if self._ends(token, request):
                outcome.finish_reason, outcome.end = FinishReason.END_OF_TEXT, logprob
                return
            sequence.take(token)
            if logprob is not None:
                outcome.logprobs.append(logprob)
            outcome.tokens.append(token)
            outcome.finish_reason = self._limit_reached(sequence)
            if outcome.finish_reason is None and request.hand_to is not None:
                outcome.finish_reason = FinishReason.HANDED_OVER
            is_right = place < len(drafts) and drafts[place] == token
            sequence.num_computed += is_right
            outcome.num_accepted += is_right
            if outcome.finish_reason is not None or not is_right:
                return

    def _ends(self, token: int, request: Request) -> bool:
        if token == self._eos_id:
            # Where a grammar allows the end token, the text is complete, and nothing else may follow it.
            return not request.params.ignore_end or request.constraint is not None
        return token in request.params.stop_token_ids

    def _limit_reached(self, sequence: Sequence) -> FinishReason | None:
        most = sequence.request.params.max_tokens
        if most is not None and sequence.num_answer >= most:
            return FinishReason.MAX_TOKENS
        return FinishReason.CONTEXT_LIMIT if len(sequence.tokens) >= self._limit else None

    def _score_prompt(self, work: Work, logits: Float[Tensor, "row vocab"]) -> int:
        """Note what the prompt's tokens of this pass were given; return how many rows of logits were for that."""
        sequence, request = work.sequence, work.sequence.request
        scored = prompt_rows(work)
        if not scored:
            return 0
        if not sequence.prompt_logprobs:
            sequence.prompt_logprobs.append(None)
        for row in scored:
            token = sequence.tokens[work.first + row + 1]
            entry = logprob_of(logits[row, : self._vocab_size], token, num_top=request.num_logprobs or 0)
            sequence.prompt_logprobs.append(entry)
        return len(scored)

    # ---- drafts ----

    def _draft(self, outcomes: Items[Outcome], *, num_wanted: int) -> None:
        """Let the MTP modules follow, and draft for the sequences that decode on."""
        if not self._drafter.num_modules:
            return
        chains: dict[Chain, Outcome] = {}
        for outcome in outcomes:
            sequence = outcome.work.sequence
            if outcome.finish_reason is not None:
                continue
            wanted = self._most_drafts(sequence, num_wanted=num_wanted) if outcome.work.reaches_end else 0
            # Where nothing is to be drafted the modules may stay behind, but not so far that pages wait for them.
            if wanted == 0 and outcome.work.reaches_end and sequence.mtp[0].num_unread < self._most_unread:
                sequence.drafts = []
                continue
            chains[Chain(sequence=sequence, num_wanted=wanted)] = outcome
        if chains:
            self._drafter.follow(list(chains))
        for chain, outcome in chains.items():
            if chain.error is not None:
                outcome.fail(chain.error)

    def _most_drafts(self, sequence: Sequence, *, num_wanted: int) -> int:
        """Return how many drafts are of use: the last token of an answer is drawn anyway, and each needs a page."""
        left = self._limit - len(sequence.tokens)
        if sequence.request.params.max_tokens is not None:
            left = min(left, sequence.request.params.max_tokens - sequence.num_answer)
        wanted = max(0, min(num_wanted, left - 1))
        if wanted and not self._scheduler.reach(sequence, end=len(sequence.tokens) + wanted):
            room = len(sequence.pages) * self.config.page_tokens
            wanted = max(0, min(wanted, room - len(sequence.tokens)))
        return wanted

    def _time(self, works: Items[Work], *, seconds: float, num_wanted: int) -> None:
        """Tell what a step took, if all it did was decode, and as many drafts were wanted before as after it.

        Fewer may have been made: among many requests there is always one that is near its end.
        """
        if self.config.max_drafts and num_wanted == self._num_wanted and all(work.count == 1 for work in works):
            self._draft_length.record(num_sequences=len(works), length=num_wanted, seconds=seconds)
        self._num_wanted = num_wanted

    # ---- what is told ----

    def _count(self, outcome: Outcome) -> None:
        stats, work = self._stats, outcome.work
        for place in range(len(work.drafts)):
            stats.drafted_at[place] += 1
            stats.accepted_at[place] += place < outcome.num_accepted
        if work.drafts:
            self._draft_length.record_drafts(drafted=len(work.drafts), accepted=outcome.num_accepted)
        stats.num_generated_tokens += len(outcome.tokens)

    def _event(self, outcome: Outcome) -> TokenEvent | None:
        """Return what is to be told of an outcome, and end the request or make its pages known."""
        work, sequence = outcome.work, outcome.work.sequence
        self._count(outcome)
        if outcome.finish_reason is not FinishReason.FAILED:
            end = sequence.num_computed
            if self._drafter.num_modules:
                end = min([end, *(past.done for past in sequence.mtp)])
            self._scheduler.register(sequence, end=end)
            if sequence.request.hand_to is not None:
                self._hand_over(outcome, sink=sequence.request.hand_to, end=end)
        if outcome.finish_reason is None and not outcome.tokens:
            return None
        first_time = not sequence.has_reported
        sequence.has_reported = True
        if first_time:
            self._stats.num_prompt_tokens += sequence.num_prompt
            self._stats.num_cached_tokens += sequence.num_cached or 0
        event = TokenEvent(
            id=sequence.request.id,
            tokens=tuple(outcome.tokens),
            logprobs=tuple(outcome.logprobs),
            end=outcome.end,
            prompt_logprobs=tuple(sequence.prompt_logprobs) if first_time else (),
            experts=None if outcome.finish_reason is None else sequence.experts_of_tokens(),
            finish_reason=outcome.finish_reason,
            error=outcome.error,
            num_prompt_tokens=sequence.num_prompt,
            num_cached_tokens=sequence.num_cached or 0,
            num_drafted=len(work.drafts),
            num_accepted=outcome.num_accepted,
        )
        if outcome.finish_reason is not None:
            self._end(sequence, outcome.finish_reason)
        return event

    def _hand_over(self, outcome: Outcome, *, sink: PageSink, end: int) -> None:
        """Send pages whose positions, `end` of them, are all in step, and with the first token all that remains."""
        sequence, size = outcome.work.sequence, self.config.page_tokens
        is_last = outcome.finish_reason is FinishReason.HANDED_OVER
        num_ready = -(-sequence.num_computed // size) if is_last else end // size
        first = max(sequence.num_handed, sink.first_page)
        if outcome.finish_reason is None or is_last:
            if num_ready > first:
                sink.send(self._runner.read_pages(sequence.pages[first:num_ready]), first_page=first)
                sequence.num_handed = num_ready
            if is_last:
                mtp = tuple(
                    MtpHandover(done=past.done, unread=torch.cat(past.unread).cpu() if past.unread else None)
                    for past in sequence.mtp
                )
                sink.finish(Handover(token=sequence.tokens[-1], num_computed=sequence.num_computed, mtp=mtp))

    def _end(self, sequence: Sequence, reason: FinishReason) -> None:
        """Forget a request. What it computed stays good as a prefix."""
        del self._sequences[sequence.request.id]
        self._scheduler.remove(sequence)
        self._stats.finished[str(reason)] = self._stats.finished.get(str(reason), 0) + 1


def prompt_rows(work: Work) -> range:
    """Return the rows of a pass whose logits say what the prompt's next token was given; none unless asked for."""
    sequence = work.sequence
    if not sequence.request.prompt_logprobs or sequence.has_reported:
        return range(0)
    return range(max(0, min(work.count, sequence.num_prompt - 1 - work.first)))


def rows_wanted(work: Work) -> list[int]:
    """Return the rows whose logits are needed: of the prompt where asked for, then those that are drawn from."""
    return [*prompt_rows(work), *drawn_rows(work)]


def drawn_rows(work: Work) -> range:
    """Return the rows of a pass that are drawn from: the last one read, and every draft."""
    return range(work.count - 1, work.num_tokens) if work.reaches_end else range(0)


def logprob_of(logits: Float[Tensor, " vocab"], token: int, *, num_top: int) -> TokenLogprob:
    """Return the log-probability of a token, with those of the likeliest ones."""
    logprobs = logits.log_softmax(dim=-1)
    top = logprobs.topk(min(num_top, len(logprobs)))
    return TokenLogprob(
        token=token,
        logprob=float(logprobs[token]),
        top=tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True)),
    )


def check_ids(ids: Items[int], *, vocab_size: int, what: str = "") -> None:
    """Raise ConfigError unless every id is one of `vocab_size`; names the first that is not, and its place."""
    for place, token in enumerate(ids):
        if not 0 <= token < vocab_size:
            raise ConfigError(
                f"token id {token} at place {place}{f' {what}' if what else ''} is outside the model's vocabulary of "
                f"{vocab_size} (0 to {vocab_size - 1})"
            )
