"""A model whose routed experts are spread over ranks, while requests, attention and cache are each rank's own.

Attention is data-parallel, experts are expert-parallel (report 3.4): every rank is an engine with requests of its own,
and in each layer its tokens travel to where their experts are. Shared experts are on every rank, and compute while rows
travel home. No token is dropped, and one row goes to a rank for all of a token's experts there.

Two halves of a long pass may be run by turns: attention and dispatch of one while the other's rows travel, then experts
and combine (report 3.4.1). Short passes use the exchange that is made for latency (`FixedDispatch`).
"""

from collections import deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn

from dsv3.batch import TokenBatch
from dsv3.config import ExpertRanksConfig, ModelConfig
from dsv3.errors import ConfigError, RankLostError
from dsv3.fp8.formats import is_fp8
from dsv3.infer.engine import Engine
from dsv3.infer.events import ExpertStats, TokenEvent
from dsv3.infer.rebalancing import Balancer
from dsv3.infer.rounds import NOTHING, Round, Wish, meet
from dsv3.infer.runner import States, TorchRunner
from dsv3.model.block import MoeBlock
from dsv3.model.interfaces import Part, Routing, TokenDispatch
from dsv3.model.transformer import Transformer
from dsv3.parallel.dispatch import AllToAllDispatch, Hop
from dsv3.parallel.exchange import Channel
from dsv3.parallel.slots import FixedDispatch, LayerSlots, SlotChoice, SlotDispatch
from dsv3.plan.placement import Placement, in_order, place_experts
from dsv3.runtime.log import get_logger

log = get_logger(__name__)

T = TypeVar("T")
Piece = tuple[TokenBatch, Sequence[Sequence[int]]]
"""Tokens, and the pages of their sequences."""


class RanksRunner(TorchRunner):
    """A `Runner` on one of several ranks. A pass waits for the others, so all must be woken when one has work.

    While it `is_awake` and its engine has nothing to run, `join` must be called again and again.
    """

    def __init__(self, model: Transformer, *, group: dist.ProcessGroup, config: ExpertRanksConfig) -> None:
        """Let go of the experts that are on other ranks.

        Raises:
            ConfigError: experts and their copies do not divide over the ranks, or weights are in FP8.
        """
        placement = first_placement(model.config, num_ranks=group.size(), redundant=config.redundant_experts)
        layers = [*model.layers, *(module.block for module in model.mtp)]
        blocks = [layer for layer in layers if isinstance(layer, MoeBlock)]
        for block in blocks:
            _keep_only(block.mlp.experts, experts=placement.experts_of(group.rank()))
        super().__init__(model)
        self.num_rounds = 0
        self._group = group
        self._channel = Channel(group=group)
        self._settings = config
        self._main = len(model.mtp)
        self._blocks = blocks
        self._slots = [LayerSlots(choice=SlotChoice(placement=placement, rank=group.rank())) for _ in blocks]
        self._nothing = _no_tokens(model, block=blocks[0])
        self._balancer = Balancer(
            self._slots,
            experts=[block.mlp.experts for block in blocks],
            group=group,
            every_seconds=config.rebalance_seconds,
            bytes_per_round=config.moved_bytes_per_step,
        )
        self._woken = 0
        self._is_settled = True
        self._has_told = config.fixed_step_tokens == 0

    # ---- in step with the others ----

    @property
    def num_ranks(self) -> int:
        """Ranks that share the experts."""
        return self._group.size()

    @property
    def is_awake(self) -> bool:
        """Whether other ranks may need this one."""
        return not self._is_settled

    def wake(self, number: int) -> None:
        """Take part until all ranks want nothing and have been woken with the same number."""
        self._woken, self._is_settled = number, False

    def join(self, *, has_work: bool = False) -> None:
        """Take part in one pass without tokens, if others want any.

        Nobody goes to sleep while a rank `has_work`, such as requests that wait for pages.

        Raises:
            RankLostError: one of them has gone.
        """
        with self._together():
            turn = self._meet(NOTHING, tokens=0, has_work=has_work)
            if turn.kind != NOTHING:
                self._serve(turn)

    def stats(self) -> ExpertStats:
        """Return what the experts here have done."""
        return self._balancer.stats()

    def _wait_for(self, kind: int, *, tokens: int) -> Round:
        """Take part in what comes before this rank's own pass."""
        while (turn := self._meet(kind, tokens=tokens)).kind != kind:
            self._serve(turn)
        return turn

    def _meet(self, kind: int, *, tokens: int, has_work: bool = True) -> Round:
        self._balancer.end_moves()
        wish = Wish(
            kind=kind,
            tokens=tokens,
            woken=self._woken,
            order=self._balancer.order(),
            is_busy=has_work or self._balancer.is_moving,
        )
        turn = meet(wish, group=self._group)
        self._balancer.obey(turn.order)
        self._balancer.begin_moves()
        self._is_settled = turn.is_last
        self.num_rounds += 1
        return turn

    @contextmanager
    def _together(self) -> Iterator[None]:
        """Whatever breaks between ranks, they are out of step: this one cannot go on."""
        try:
            yield
        except RankLostError:
            raise
        except Exception as error:
            raise RankLostError(f"a pass of ranks that share experts broke: {error!r}") from error

    # ---- passes ----

    def forward(self, batch: TokenBatch, *, pages: Sequence[Sequence[int]], with_experts: bool = False) -> States:
        """Read tokens through the main model, together with the other ranks."""
        with self._together():
            turn = self._wait_for(self._main, tokens=batch.num_tokens)
            works = [
                self._serving(turn, dispatch)
                if piece is None
                else self._model.steps(
                    piece[0].to(self.device),
                    cache=self._bound(piece[0], pages=piece[1]),
                    dispatch=dispatch,
                    precision=self._precision,
                    cut=_stop,
                )
                for piece, dispatch in self._pieces(turn, batch, pages=pages)
            ]
            outputs = [output for output in weave(works) if output is not None]
        states = self._states(
            torch.cat([output.hidden for output in outputs]),
            before_norm=torch.cat([output.before_norm for output in outputs]),
        )
        if not (with_experts and outputs[0].routings):
            return states
        experts = [torch.stack([one.experts for one in output.routings], dim=1) for output in outputs]
        return States(hidden=states.hidden, handed_on=states.handed_on, experts=torch.cat(experts).cpu())

    def predict_ahead(
        self, state: Float[Tensor, "token hidden"], *, depth: int, batch: TokenBatch, pages: Sequence[Sequence[int]]
    ) -> States:
        """Run MTP module `depth`, together with the other ranks."""
        with self._together():
            turn = self._wait_for(depth, tokens=batch.num_tokens)
            works: list[Generator[Part, None, Any]] = []
            begin = 0
            for piece, dispatch in self._pieces(turn, batch, pages=pages):
                if piece is None:
                    works.append(self._serving(turn, dispatch))
                    continue
                works.append(
                    self._model.steps_ahead(
                        state[begin : begin + piece[0].num_tokens],
                        depth=depth,
                        batch=piece[0].to(self.device),
                        cache=self._bound(piece[0], pages=piece[1]),
                        dispatch=dispatch,
                        precision=self._precision,
                        cut=_stop,
                    )
                )
                begin += piece[0].num_tokens
            outputs = [output for output in weave(works) if output is not None]
        return self._states(
            torch.cat([output.hidden for output, _ in outputs]),
            before_norm=torch.cat([output.before_norm for output, _ in outputs]),
        )

    def _pieces(
        self, turn: Round, batch: TokenBatch, *, pages: Sequence[Sequence[int]]
    ) -> list[tuple[Piece | None, SlotDispatch]]:
        """Return what is run by turns: the batch, or its halves, each with its way to the experts."""
        dispatches = self._dispatches(turn)
        pieces: Sequence[Piece | None] = [(batch, pages)] if len(dispatches) == 1 else halves(batch, pages=pages)
        return list(zip(pieces, dispatches, strict=True))

    def _dispatches(self, turn: Round) -> list[SlotDispatch]:
        """Return the ways to the experts in this pass, which are the same on all ranks."""
        most = self._settings.fixed_step_tokens
        size = self._slots[0].placement.slots_per_device
        through: list[TokenDispatch]
        if turn.most_tokens <= most:
            capacity = min(most, 1 << (turn.most_tokens - 1).bit_length())  # few sizes, so few shapes
            through = [FixedDispatch(channel=self._channel, slots_per_rank=size, capacity=capacity)]
        else:
            if not self._has_told:
                self._has_told = True
                log.warning(
                    "a pass of %d tokens is more than the %d that have fixed room; such passes tell first what comes",
                    turn.most_tokens,
                    most,
                )
            overlap = self._settings.overlap_step_tokens
            parts = 2 if 0 < overlap <= turn.most_tokens else 1
            through = [
                AllToAllDispatch(hops=(Hop(channel=self._channel, experts_per_rank=size),)) for _ in range(parts)
            ]
        layers = self._slots_of(turn.kind)
        return [SlotDispatch(layers=layers, through=one) for one in through]

    @torch.inference_mode()
    def _serve(self, turn: Round) -> None:
        """Take part in a pass with the experts that are here, without tokens."""
        weave([self._serving(turn, dispatch) for dispatch in self._dispatches(turn)])

    def _serving(self, turn: Round, dispatch: SlotDispatch) -> Generator[Part, None, None]:
        """Do what the steps of a pass do where rows travel, and stop where they do."""
        tokens, routing = self._nothing
        for block in self._blocks_of(turn.kind):
            announced = dispatch.announce(tokens, routing=routing)
            yield Part.ATTENTION
            travelling = dispatch.send(announced)
            yield Part.DISPATCH
            dispatched = dispatch.receive(travelling)
            outputs = block.mlp.experts(dispatched, precision=self._precision)
            yield Part.EXPERTS
            returning = dispatch.send_back(outputs, dispatched=dispatched)
            yield Part.COMBINE
            dispatch.receive_back(returning)

    def _blocks_of(self, kind: int) -> list[MoeBlock]:
        return self._of_kind(self._blocks, kind)

    def _slots_of(self, kind: int) -> list[LayerSlots]:
        return self._of_kind(self._slots, kind)

    def _of_kind(self, all_layers: list[T], kind: int) -> list[T]:
        """Return what a pass runs: the layers of the main model, or the one of an MTP module."""
        num_main = len(all_layers) - self._main
        return all_layers[:num_main] if kind == self._main else [all_layers[num_main + kind]]


def step_together(engine: Engine, *, runner: RanksRunner) -> list[TokenEvent]:
    """Let a rank's engine make a step, or take part in a pass of the others; nothing happens where all sleep.

    Raises:
        RankLostError: one of them has gone.
    """
    rounds = runner.num_rounds
    events = engine.step() if engine.has_work else []
    if runner.num_rounds == rounds and runner.is_awake:
        runner.join(has_work=engine.has_work)
    return events


def first_placement(config: ModelConfig, *, num_ranks: int, redundant: int) -> Placement:
    """Return where experts lie while nothing is known of their load.

    Raises:
        ConfigError: experts and their copies do not divide over the ranks.
    """
    experts = config.n_routed_experts
    if (experts + redundant) % num_ranks:
        most = -(-(experts + redundant) // num_ranks) * num_ranks
        raise ConfigError(
            f"{experts} routed experts and {redundant} redundant ones do not divide over {num_ranks} ranks; "
            f"use {most - experts} redundant experts, or another number of ranks"
        )
    if not redundant:
        return in_order(num_experts=experts, num_devices=num_ranks)
    return place_experts([1] * experts, num_slots=experts + redundant, num_devices=num_ranks)


def halves(batch: TokenBatch, *, pages: Sequence[Sequence[int]]) -> tuple[Piece | None, Piece | None]:
    """Return the two halves of a batch, one sequence perhaps in both; None where there is nothing.

    The second half may read what the first has put into the cache, layer by layer.
    """
    middle = batch.num_tokens // 2
    return _part(batch, pages, first=0, end=middle), _part(batch, pages, first=middle, end=batch.num_tokens)


def weave(works: Sequence[Generator[Part, None, T]]) -> list[T]:
    """Run generators by turns, each until rows of it are under way; return what they return."""
    results: dict[int, T] = {}
    ahead = deque(enumerate(works))
    while ahead:
        place, work = ahead.popleft()
        try:
            while next(work) not in (Part.DISPATCH, Part.COMBINE):
                pass
        except StopIteration as end:
            results[place] = end.value
        else:
            ahead.append((place, work))
    return [results[place] for place in range(len(works))]


def _part(batch: TokenBatch, pages: Sequence[Sequence[int]], *, first: int, end: int) -> Piece | None:
    tokens, starts = batch.tokens.tolist(), batch.starts.tolist()
    pieces, firsts, tables = [], [], []
    for (start, stop), position, table in zip(pairwise(starts), batch.firsts, pages, strict=True):
        here = range(max(start, first), min(stop, end))
        if here:
            pieces.append(tokens[here.start : here.stop])
            firsts.append(position + here.start - start)
            tables.append(table)
    return (TokenBatch.from_pieces(pieces, firsts=firsts), tables) if pieces else None


def _stop(made: T, part: Part) -> T:
    """Cut nothing, but have layers stop after each part."""
    del part
    return made


def _keep_only(module: nn.Module, *, experts: Sequence[int]) -> None:
    """Keep the weights of some experts, slot by slot."""
    for name, parameter in list(module.named_parameters(recurse=False)):
        if is_fp8(parameter):
            raise ConfigError("experts in FP8 cannot be spread over ranks yet; use weights = 'bf16' or 'fp32'")
        kept = parameter.detach()[list(experts)].clone()
        setattr(module, name, nn.Parameter(kept, requires_grad=False))


@torch.inference_mode()
def _no_tokens(model: Transformer, *, block: MoeBlock) -> tuple[Tensor, Routing]:
    """Return no tokens and their routing, in the types that those of others have."""
    weight = model.embed_tokens.weight
    routing: Routing = block.mlp.gate(weight.new_zeros(1, model.config.hidden_size))
    return weight.new_zeros(0, model.config.hidden_size), Routing(
        experts=routing.experts[:0],
        gates=routing.gates[:0],
        affinity=routing.affinity[:0],
        load=torch.zeros_like(routing.load),
    )
