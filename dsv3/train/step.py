"""One optimizer step: the spine of training.

    quantise weights -> micro-batches -> forward -> loss -> backward -> clip -> optimizer -> balance update -> average

Nothing is changed before loss and gradients have been found finite.
"""

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NoReturn, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dsv3.batch import TokenBatch
from dsv3.config import BalanceConfig, PrecisionConfig, PretrainConfig
from dsv3.errors import NonFiniteError
from dsv3.fp8.recipe import recipe_named
from dsv3.model.interfaces import Cut, ModelOutput, Part, keep_whole
from dsv3.model.precision import Precision, quantise_weights
from dsv3.model.transformer import Transformer
from dsv3.parallel.ranks import Alone
from dsv3.runtime.later import Later
from dsv3.train.balance import max_violation, plain_top_k_counts, update_router_biases
from dsv3.train.ema import WeightAverage
from dsv3.train.loss import LossParts, WholeBatch, pretraining_loss
from dsv3.train.optimizer import AdamW
from dsv3.train.schedule import bias_update_speed, learning_rate, mtp_loss_weight
from dsv3.train.stages import forward_by_stages, places_of, room_for


@dataclass(kw_only=True)
class TrainState:
    """Everything a step changes, and the configuration it follows. A snapshot holds all of it."""

    config: PretrainConfig
    model: Transformer
    optimizer: AdamW
    average: WeightAverage | None
    """None when `ema_decay` is 0."""
    step: int = 0
    """Optimizer steps taken."""
    tokens: int = 0
    """Tokens seen in them. Rows are drawn in order, so this is also where the data stands."""
    ranks: Alone = field(default_factory=Alone)
    """Those that train together; each is given its share of every batch."""
    describe_rows: Callable[[range], str] = str
    """Says which documents rows of the data come from, for the message when a step must not be taken."""


@dataclass(frozen=True, kw_only=True)
class StepMetrics:
    """What one step reports."""

    step: int
    """Counted from 1."""
    tokens: int
    """Seen in total, this step included."""
    loss: float
    """Next-token loss in nats a token, before the step changed the weights."""
    mtp_loss: tuple[float, ...]
    mtp_weight: float
    balance_loss: float
    gradient_norm: float
    """Before clipping."""
    learning_rate: float
    batch_sequences: int
    batch_tokens: int
    bias_update_speed: float
    wire_bytes: int
    """Sent between ranks by dispatch and combine, forward, all ranks and hops together."""
    load: tuple[Int[Tensor, " expert"], ...]
    """Tokens sent to each expert, for every MoE layer, MTP modules last; on the CPU."""
    rank_loss: tuple[float, ...]
    """The share of each rank in `loss`; of a pipeline, those that hold the last layers have one."""
    rank_gradient_norm: tuple[float, ...]
    """Of what each rank has found by itself, before gradients are summed over ranks."""

    @property
    def max_violation(self) -> list[float]:
        """MaxVio of the batch, for every MoE layer."""
        return [max_violation(load) for load in self.load]


@dataclass(frozen=True, kw_only=True)
class _Passes:
    """What the forward and backward passes of all micro-batches leave, besides gradients."""

    parts: dict[tuple[int, int], LossParts]
    """By micro-batch and first layer, of those that ran on this rank; the losses are where the last layers are."""
    load: Int[Tensor, "layer expert"]
    """Of all ranks and layers."""
    own_norm: float
    """Of this rank's gradients by themselves; 0 where it has all."""


@runtime_checkable
class _Run(Protocol):
    """The forward and backward passes of some micro-batches, everything else being settled."""

    def __call__(self, *, batches: Sequence[TokenBatch], loss_scale: float = 1.0) -> _Passes: ...


@runtime_checkable
class LossFunction(Protocol):
    """What a step minimises: `pretraining_loss`, or another in its place."""

    def __call__(
        self,
        model: Transformer,
        *,
        output: ModelOutput,
        batch: TokenBatch,
        whole: WholeBatch,
        mtp_weight: float,
        balance: BalanceConfig,
        is_last: bool = True,
    ) -> LossParts:
        """Return the share of one micro-batch in the loss of the whole batch."""
        ...


def train_step(
    state: TrainState, *, batches: Sequence[TokenBatch], loss: LossFunction = pretraining_loss
) -> StepMetrics:
    """Take one step on a batch, given as micro-batches on the model's device, and change `state` in place.

    Of several ranks each is given its own share of the batch, in as many micro-batches as the others. What is minimised
    is `loss`, of next tokens unless told otherwise.

    Schedules are read at the tokens seen before the step. Router biases move after the weights, by the load of all
    micro-batches together; so the choice made in this step never depends on tokens of this step (report 2.1.2).

    Raises:
        NonFiniteError: a loss or gradient is NaN or infinite. Weights, moments, biases and counts are untouched.
    """
    config, step = state.config, state.step + 1
    mtp_weight = mtp_loss_weight(config.mtp, tokens=state.tokens)
    rate = learning_rate(config.optim.learning_rate, step=step, tokens=state.tokens)
    speed = bias_update_speed(config.balance, tokens=state.tokens)

    state.model.train()
    precision = quantise_weights(state.model.weights_in_fp8(), config=config.precision)  # once, for all micro-batches
    whole = _count_whole_batch(state, batches=batches, precision=precision)
    run = partial(_forward_backward, state, loss=loss, whole=whole, mtp_weight=mtp_weight, precision=precision)
    passes, norm, is_lost = _passes_in_range(state, run=run, batches=batches)
    if is_lost or not math.isfinite(norm):
        _stop(state, passes=passes, batches=batches, run=run)

    state.optimizer.step(learning_rate=rate, gradient_norm=norm)
    state.optimizer.forget_gradients()
    state.ranks.share_weights(state.optimizer.parameters)
    routers = {place: router for place, router in state.model.routers_by_place().items() if place < len(passes.load)}
    update_router_biases(list(routers.values()), loads=[passes.load[place] for place in routers], speed=speed)
    if state.average is not None:
        state.average.update(state.optimizer.master)
    [tokens] = state.ranks.total_over_data([sum(batch.num_tokens for batch in batches)])
    modules = config.model.num_nextn_predict_layers if mtp_weight > 0 else 0
    own_loss = sum(part.next_token.item() for part in passes.parts.values())
    by_rank = state.ranks.gather_numbers([own_loss, passes.own_norm])
    [wire_bytes, total_loss, balance, *mtp] = state.ranks.total(
        [
            state.ranks.take_wire_bytes(),
            own_loss,
            sum(part.balance.item() for part in passes.parts.values()),
            *(sum(part.mtp[depth].item() for part in passes.parts.values() if part.mtp) for depth in range(modules)),
        ]
    )
    state.step = step
    state.tokens += int(tokens)
    return StepMetrics(
        step=step,
        tokens=state.tokens,
        loss=total_loss,
        mtp_loss=tuple(mtp),
        mtp_weight=mtp_weight,
        balance_loss=balance,
        gradient_norm=norm,
        learning_rate=rate,
        batch_sequences=whole.num_sequences,
        batch_tokens=int(tokens),
        wire_bytes=int(wire_bytes),
        bias_update_speed=speed,
        load=tuple(passes.load.cpu()),
        rank_loss=tuple(loss for loss, _ in by_rank),
        rank_gradient_norm=tuple(norm for _, norm in by_rank),
    )


def _passes_in_range(state: TrainState, *, run: _Run, batches: Sequence[TokenBatch]) -> tuple[_Passes, float, bool]:
    """Run all micro-batches; return what they leave, the norm of their gradients, and whether any loss is lost.

    Gradients are then those of all ranks, and no longer scaled.

    A loss scale that throws gradients out of the range of numbers is halved, for this step, until they are in it.
    """
    scale, optimizer = _loss_scale(state.config.precision), state.optimizer
    while True:
        optimizer.forget_gradients()
        passes = run(batches=batches, loss_scale=scale)
        optimizer.make_zero_gradients(state.ranks.lacking(list(optimizer.parameters), gradients=optimizer.gradients))
        state.ranks.reduce_gradients(optimizer.gradients)
        optimizer.divide_gradients(scale)
        norm = state.ranks.gradient_norm(optimizer.own_gradients)
        lost = (not math.isfinite(part.total.item()) for part in passes.parts.values())
        [num_lost] = state.ranks.total([sum(lost)])
        if math.isfinite(norm) or num_lost or scale <= 1:
            return passes, norm, num_lost > 0
        scale /= 2


def _loss_scale(config: PrecisionConfig) -> float:
    if config.loss_scale or config.recipe == "original":
        return config.loss_scale or 1.0
    return recipe_named(config.recipe).loss_scale


@dataclass(kw_only=True)
class _Work:
    """What a pipeline does with the micro-batches of a step: `ChunkWork`."""

    state: TrainState
    batches: Sequence[TokenBatch]
    loss_function: LossFunction
    whole: WholeBatch
    mtp_weight: float
    precision: Precision
    loss_scale: float
    load: Int[Tensor, "layer expert"]
    parts: dict[tuple[int, int], LossParts] = field(default_factory=dict)

    def steps(
        self, micro_batch: int, *, layers: range, hidden: Tensor | None, cut: Cut, later: Later | None
    ) -> Generator[Part, None, ModelOutput]:
        """Run layers on a micro-batch."""
        model, batch = self.state.model, self.batches[micro_batch]
        given: dict[str, Any] = {
            "dispatch": self.state.ranks.dispatch,
            "recompute": self.state.config.recompute,
            "precision": self.precision if later is None else self.precision.putting_off(later),
            "mtp": self.mtp_weight > 0,
        }
        if cut is keep_whole and len(layers) == self.state.config.model.num_hidden_layers:
            return model(batch, **given)  # a call, so that hooks of the model run
        return (yield from model.steps(batch, hidden=hidden, layers=layers, cut=cut, **given))

    def loss(self, micro_batch: int, *, layers: range, output: ModelOutput) -> Float[Tensor, ""]:
        """Return what these layers add to the loss, and note it."""
        places = places_of(output, layers=layers, model=self.state.config.model)
        counts = self.whole.plain_top_k
        loss = self.loss_function(
            self.state.model,
            output=output,
            batch=self.batches[micro_batch],
            whole=replace(self.whole, plain_top_k=counts and [counts[place] for place in places]),
            mtp_weight=self.mtp_weight,
            balance=self.state.config.balance,
            is_last=layers.stop == self.state.config.model.num_hidden_layers,
        )
        self.parts[micro_batch, layers.start] = _detached(loss)
        for place, routing in zip(places, output.routings, strict=True):
            self.load[place] += routing.load
        return loss.total * self.loss_scale if self.loss_scale != 1 else loss.total

    def gradients_made(self) -> None:
        """Move new gradients into FP32."""
        self.state.optimizer.accumulate()


def _forward_backward(
    state: TrainState,
    *,
    batches: Sequence[TokenBatch],
    loss: LossFunction,
    whole: WholeBatch,
    mtp_weight: float,
    precision: Precision,
    loss_scale: float = 1.0,
) -> _Passes:
    model = state.config.model
    num_routed = model.num_moe_layers + (model.num_nextn_predict_layers if mtp_weight > 0 else 0)
    work = _Work(
        state=state,
        batches=batches,
        loss_function=loss,
        whole=whole,
        mtp_weight=mtp_weight,
        precision=precision,
        loss_scale=loss_scale,
        load=torch.zeros(num_routed, model.n_routed_experts, dtype=torch.long, device=state.model.device),
    )
    state.ranks.run(
        work,
        num_layers=model.num_hidden_layers,
        num_micro_batches=len(batches),
        room=lambda micro_batch: room_for(state.model, batches[micro_batch]),
    )
    own_norm = Alone().gradient_norm(state.optimizer.gradients) if state.ranks.size > 1 else 0.0
    return _Passes(parts=dict(sorted(work.parts.items())), load=state.ranks.total_loads(work.load), own_norm=own_norm)


def _count_whole_batch(state: TrainState, *, batches: Sequence[TokenBatch], precision: Precision) -> WholeBatch:
    """Count targets and sequences; for 'batch_loss' over several micro-batches, run them once to count experts too.

    The frequencies of that loss belong to the whole batch, and are needed before the first gradient.
    """
    whole = WholeBatch.of(batches)
    targets, sequences = state.ranks.total_over_data([whole.num_targets, whole.num_sequences])
    whole = replace(whole, num_targets=int(targets), num_sequences=int(sequences))
    if state.config.balance.method != "batch_loss" or (len(batches) == 1 and state.ranks.size == 1):
        return whole
    model = state.config.model
    num_routed = model.num_moe_layers + model.num_nextn_predict_layers
    counts = torch.zeros(num_routed, model.n_routed_experts, dtype=torch.long, device=state.model.device)
    with torch.no_grad():
        for batch in batches:
            for layers, output in forward_by_stages(state.model, batch=batch, ranks=state.ranks, precision=precision):
                for place, routing in zip(places_of(output, layers=layers, model=model), output.routings, strict=True):
                    counts[place] += plain_top_k_counts(routing)
    return replace(whole, plain_top_k=list(state.ranks.total_loads(counts)))


def _stop(state: TrainState, *, passes: _Passes, batches: Sequence[TokenBatch], run: _Run) -> NoReturn:
    """Stop all ranks alike, with what is wrong on the first of them where something is."""
    losses = {place: part.total.item() for place, part in passes.parts.items()}
    lost = next((place for place, loss in losses.items() if not math.isfinite(loss)), None)
    told = None if lost is None else _fault(state, batches=batches, index=lost[0], what=f"the loss is {losses[lost]}")
    _stop_if_any(state, told)
    # Which rows? Each micro-batch once more, by itself: the weights are still those that met the fault.
    for index, batch in enumerate(batches):
        state.optimizer.forget_gradients()
        run(batches=[batch] * state.ranks.fewest_micro_batches)
        gradients = state.optimizer.gradients
        if told is None and not math.isfinite(Alone().gradient_norm(gradients)):
            names = [name for name, gradient in gradients.items() if not gradient.isfinite().all()]
            where = f"the gradient of {names[0]}" if names else "the norm of the gradients"
            told = _fault(state, batches=batches, index=index, what=f"{where} is not finite")
    _stop_if_any(state, told)
    state.optimizer.forget_gradients()
    raise NonFiniteError(_fault(state, batches=batches, index=None, what="the sum of the gradients is not finite"))


def _fault(state: TrainState, *, batches: Sequence[TokenBatch], index: int | None, what: str) -> str:
    """Return what is wrong with the rows of a micro-batch, or of all, counted as the loader counts them."""
    sizes = [batch.num_rows for batch in batches]
    begin, ranks = state.tokens // state.config.batch.sequence_length, state.ranks
    first = begin + sum(sizes[: index or 0]) * ranks.row_size
    count = sum(sizes) if index is None else sizes[index]
    if ranks.row_size == 1:
        rows, where = range(first, first + count), f"rows {first} to {first + count - 1} of the data"
    else:
        step = ranks.row_size
        rows = range(first + ranks.row_rank, first + count * step, step)
        where = f"rows {rows.start}, {rows.start + step}, ... of the data, {count} of them"
    if ranks.size > 1:
        where += f", on rank {ranks.rank}"
    return f"step {state.step + 1} cannot be taken: {what}, in {where} ({state.describe_rows(rows)})"


def _stop_if_any(state: TrainState, told: str | None) -> None:
    """Raise on every rank where one of them has something to tell."""
    found = [message for message in state.ranks.gather(told) if message is not None]
    if found:
        state.optimizer.forget_gradients()
        raise NonFiniteError(found[0])


def _detached(loss: LossParts) -> LossParts:
    return LossParts(
        total=loss.total.detach(),
        next_token=loss.next_token.detach(),
        mtp=tuple(part.detach() for part in loss.mtp),
        balance=loss.balance.detach(),
    )
