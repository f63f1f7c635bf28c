"""Supervised fine-tuning (report 5.1): conversations, packed and mutually invisible, answers trained.

conversations -> tokens -> packed rows -> steps, validations, snapshots -> export
"""

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from dsv3.batch import IGNORE, TokenBatch
from dsv3.config import MtpLossConfig, PretrainConfig
from dsv3.config.teaching import RewardConfig, SftConfig
from dsv3.data.chance import falls_below, hash_text
from dsv3.data.chat_data import TaughtTokens, as_tokens, read_conversations
from dsv3.data.tokenizer import Tokenizer
from dsv3.errors import ConfigError, DataError
from dsv3.model.transformer import Transformer
from dsv3.ops.cross_entropy import token_nll
from dsv3.parallel.launch import open_ranks
from dsv3.posttrain.lesson import Lesson, open_lesson
from dsv3.runtime.log import get_logger
from dsv3.train.loss import pretraining_loss
from dsv3.train.step import LossFunction, train_step
from dsv3.train.stop import stop_on_signals

PEAK, FLOOR = 5e-6, 1e-6
"""Learning rates that a cosine joins (report 5.1)."""

Progress = Callable[[dict[str, Any]], None]
"""Told the record of every step and every validation."""
Look = Callable[[Transformer, Sequence[TaughtTokens]], dict[str, float]]
"""What is said of samples that were held out."""


@dataclass(frozen=True, kw_only=True)
class TaughtRows:
    """What is trained on, and what became of what was given."""

    rows: tuple[tuple[TaughtTokens, ...], ...]
    """Conversations of each packed row."""
    held_out: tuple[TaughtTokens, ...]
    dropped: tuple[str, ...]
    """Names of conversations that are longer than a row."""
    cut: tuple[str, ...]
    unanswered: tuple[str, ...]
    """Names of conversations whose answers all lay beyond the cut."""

    @property
    def num_tokens(self) -> int:
        """Of one epoch."""
        return sum(len(one.inputs) for row in self.rows for one in row)

    def told(self) -> str:
        """Say in a line what there is."""
        count, trained = sum(map(len, self.rows)), sum(sum(one.trained[1:]) for row in self.rows for one in row)
        tokens = f"{self.num_tokens:,} tokens, {trained:,} of them trained"
        said = [f"{count:,} conversations of {tokens}, in {len(self.rows):,} rows"]
        for names, what in (
            (self.held_out, "held out"),
            (self.dropped, "longer than a row and dropped"),
            (self.cut, "longer than a row and cut"),
            (self.unanswered, "cut before any answer, and dropped"),
        ):
            if names:
                said.append(f"{len(names):,} {what}")
        return "; ".join(said)


@dataclass(frozen=True, kw_only=True)
class SftResult:
    """Where a call of `sft` has left the run."""

    folder: Path
    step: int
    total_steps: int
    finished: bool
    interrupted: bool
    export: Path | None
    rows: TaughtRows


def sft_settings(
    base: PretrainConfig, *, lesson: SftConfig, start_from: Path, peak: float = PEAK, floor: float = FLOOR
) -> PretrainConfig:
    """Return the settings of training: those of the base, but for what fine-tuning has otherwise.

    A cosine from `peak` to `floor` over the whole run; MTP keeps its late weight; router biases stay where they are,
    as do the other settings of balance. What the report leaves open here are these defaults, and `--set` changes them.
    The weight average is not kept.
    """
    schedule = replace(
        base.optim.learning_rate,
        peak=peak,
        warmup_steps=0,
        constant_until_tokens=0,
        cosine_until_tokens=base.total_tokens,
        hold_until_tokens=base.total_tokens,
        cosine_floor=floor,
        final=floor,
    )
    return replace(
        base,
        recipe="",
        start_from=str(start_from.absolute()),
        optim=replace(base.optim, learning_rate=schedule, ema_decay=0.0),
        batch=replace(
            base.batch.steady(lesson.rows_per_step),
            micro_batch_sequences=min(base.batch.micro_batch_sequences, lesson.rows_per_step),
        ),
        mtp=MtpLossConfig(early_weight=base.mtp.late_weight, late_weight=base.mtp.late_weight, switch_tokens=0),
        balance=replace(base.balance, bias_update_speed=0.0),
    )


def sft(
    config: PretrainConfig,
    *,
    lesson: SftConfig,
    folder: Path,
    on_record: Progress | None = None,
    stop_after_steps: int | None = None,
) -> SftResult:
    """Teach in the run folder `folder`, from its newest snapshot if it has one, until every epoch is read.

    Called again with the same settings it goes on, bit for bit as if it had never stopped.

    Raises:
        ConfigError, DataError, SnapshotError, CheckpointError, NonFiniteError, TrainingError: as their texts say.
    """
    opened = open_ranks(
        config.parallel,
        model=config.model,
        sequence_length=config.batch.sequence_length,
        device=config.runtime.device,
    )
    with opened as ranks:
        if lesson.rows_per_step % ranks.row_size:
            raise ConfigError(
                f"rows_per_step = {lesson.rows_per_step} does not divide over {ranks.row_size} ranks that read "
                "different rows"
            )
        data = data_hash(lesson.data)
        with open_lesson(config, lesson=lesson, name="sft", data=data, folder=folder, ranks=ranks) as opened_lesson:
            length = config.batch.sequence_length
            taught = taught_rows(lesson, tokenizer=opened_lesson.tokenizer, length=length)
            get_logger(__name__).info(taught.told())
            return teach_rows(
                opened_lesson, lesson=lesson, taught=taught, look=_look, notify=on_record, limit=stop_after_steps
            )


def teach_rows(
    run: Lesson,
    *,
    lesson: SftConfig | RewardConfig,
    taught: TaughtRows,
    look: Look,
    loss: LossFunction = pretraining_loss,
    name: str = "sft",
    notify: Progress | None,
    limit: int | None,
) -> SftResult:
    """Teach rows until every epoch is read, and `look` at what is held out after each."""
    state, tell = run.state, notify or _ignore
    epoch_steps = -(-len(taught.rows) // lesson.rows_per_step)
    total_steps = lesson.epochs * epoch_steps
    # The schedule follows tokens, and how many there are is known only now.
    tokens = lesson.epochs * taught.num_tokens
    schedule = replace(state.config.optim.learning_rate, cosine_until_tokens=tokens, hold_until_tokens=tokens)
    state.config = replace(state.config, optim=replace(state.config.optim, learning_rate=schedule))
    state.describe_rows = lambda _: f"the conversations of step {state.step + 1}"
    with stop_on_signals() as stop:
        taken, stopping = 0, False
        while state.step < total_steps and not stopping and taken != limit:
            started = time.perf_counter()
            rows = rows_of_step(taught, lesson=lesson, step=state.step, seed=run.config.runtime.seed)
            metrics = train_step(state, batches=_batches(run, rows=rows), loss=loss)
            # Rows that only keep ranks busy move no schedule.
            state.tokens -= -len(rows) % state.ranks.row_size * sum(len(one.inputs) for one in rows[0])
            taken += 1
            tell(run.log.step(metrics, seconds=time.perf_counter() - started))
            if taught.held_out and state.step % epoch_steps == 0:
                tell(run.log.record(name, step=state.step, values=look(state.model, taught.held_out)))
            if state.step % run.config.snapshot.every_steps == 0:
                run.save()
            [wants_stop] = state.ranks.total([stop.requested])
            stopping = wants_stop > 0
    run.save()
    finished = state.step >= total_steps
    return SftResult(
        folder=run.folder,
        step=state.step,
        total_steps=total_steps,
        finished=finished,
        interrupted=stopping and not finished,
        export=run.export() if finished else None,
        rows=taught,
    )


def taught_rows(lesson: SftConfig, *, tokenizer: Tokenizer, length: int) -> TaughtRows:
    """Read all conversations and pack them into rows of at most `length` tokens.

    Raises:
        DataError: a conversation cannot be read, or none is left to train on.
    """
    kept: list[TaughtTokens] = []
    held_out: list[TaughtTokens] = []
    dropped: list[str] = []
    cut: list[str] = []
    unanswered: list[str] = []
    for conversation in read_conversations(lesson.data):
        taught = as_tokens(conversation, tokenizer=tokenizer, train_prompts=lesson.train_prompts)
        if len(taught.inputs) > length and lesson.too_long == "drop":
            dropped.append(taught.name)
            continue
        if len(taught.inputs) > length:
            cut.append(taught.name)
            taught = replace(taught, ids=taught.ids[: length + 1], trained=taught.trained[: length + 1])
            if not any(taught.trained[1:]):
                unanswered.append(taught.name)
                continue
        said = "".join(message["content"] for message in conversation.messages)
        (held_out if falls_below(hash_text(said), rate=lesson.held_out_rate) else kept).append(taught)
    if not kept:
        raise DataError(
            f"of the conversations in {', '.join(lesson.data) or 'no file'} none is left to train on: "
            f"{len(dropped)} are longer than a row of {length} tokens, {len(held_out)} are held out"
        )
    return TaughtRows(
        rows=pack(kept, length=length),
        held_out=tuple(held_out),
        dropped=tuple(dropped),
        cut=tuple(cut),
        unanswered=tuple(unanswered),
    )


def pack(samples: Sequence[TaughtTokens], *, length: int) -> tuple[tuple[TaughtTokens, ...], ...]:
    """Put samples into rows of at most `length` tokens: the longest first, each where the least room is left.

    Rows are in no particular order; within one, samples neither see nor follow each other.
    """
    rows: list[list[TaughtTokens]] = []
    by_room: list[list[int]] = [[] for _ in range(length + 1)]
    """Rows by the room that is left in them."""
    for sample in sorted(samples, key=lambda one: len(one.inputs), reverse=True):
        size = len(sample.inputs)
        room = next((room for room in range(size, length + 1) if by_room[room]), None)
        if room is None:
            rows.append([sample])
            by_room[length - size].append(len(rows) - 1)
        else:
            row = by_room[room].pop()
            rows[row].append(sample)
            by_room[room - size].append(row)
    return tuple(map(tuple, rows))


def rows_of_step(
    taught: TaughtRows, *, lesson: SftConfig | RewardConfig, step: int, seed: int
) -> list[tuple[TaughtTokens, ...]]:
    """Return the rows of a step, counted from 0: each epoch is an order of its own; its last step may be smaller."""
    epoch_steps = -(-len(taught.rows) // lesson.rows_per_step)
    epoch, place = divmod(step, epoch_steps)
    digest = hashlib.sha256(f"{seed} sft {epoch}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    order = torch.randperm(len(taught.rows), generator=generator).tolist()
    here = order[place * lesson.rows_per_step : (place + 1) * lesson.rows_per_step]
    return [taught.rows[row] for row in here]


def batch_of(samples: Sequence[TaughtTokens]) -> TokenBatch:
    """Return conversations as one batch, each a sequence that begins at position 0 and sees itself alone."""
    batch = TokenBatch.from_sequences([one.inputs for one in samples])
    return replace(batch, targets=torch.tensor(list(chain.from_iterable(one.targets for one in samples))))


@torch.no_grad()
def held_out_loss(model: Transformer, *, samples: Sequence[TaughtTokens], at_once: int = 16) -> tuple[float, int]:
    """Return the nats of all trained tokens of some conversations, and how many these are."""
    nats, count = 0.0, 0
    model.eval()
    for first in range(0, len(samples), at_once):
        batch = batch_of(samples[first : first + at_once]).to(model.device)
        assert batch.targets is not None
        hidden = model(batch).hidden
        losses = token_nll(hidden, weight=model.lm_head.weight, targets=batch.targets)
        nats, count = nats + losses.double().sum().item(), count + int((batch.targets != IGNORE).sum())
    return nats, count


def _look(model: Transformer, samples: Sequence[TaughtTokens]) -> dict[str, float]:
    nats, count = held_out_loss(model, samples=samples)
    return {"held_out_loss": nats / max(1, count)}


def _batches(run: Lesson, *, rows: Sequence[tuple[TaughtTokens, ...]]) -> list[TokenBatch]:
    """Return this rank's micro-batches; where rows do not divide over the ranks, some read one that is not trained."""
    ranks = run.state.ranks
    idle = tuple(replace(one, trained=[False] * len(one.trained)) for one in rows[0])
    own = [*rows, *[idle] * (-len(rows) % ranks.row_size)][ranks.row_rank :: ranks.row_size]
    at_once = run.config.batch.micro_batch_sequences
    parts: Iterator[list[TaughtTokens]] = (
        list(chain.from_iterable(own[first : first + at_once])) for first in range(0, len(own), at_once)
    )
    return [ranks.share_rows(batch_of(part)).to(run.state.model.device) for part in parts]


def _ignore(record: dict[str, Any]) -> None:
    pass


def data_hash(paths: Sequence[str]) -> str:
    """Return a hash of the bytes of files, and of the names of what is no file."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(f"{path}\n".encode())
        file = Path(path)
        if file.is_file():
            digest.update(file.read_bytes())
    return digest.hexdigest()
