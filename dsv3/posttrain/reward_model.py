"""A reward model (report 5.2.1): a model that says what an answer is worth, taught by pairs of which one is preferred.

    r(answer) = the logit of the padding token after the answer's last token
    loss      = - log sigmoid(r(chosen) - r(rejected))      (Bradley-Terry)

The report leaves the form of the head open. The row of the output head that belongs to the padding token, which nothing
is ever taught to say, is as free a vector as a head of its own: so there is no new parameter, and snapshots, exports
and ranks need to know nothing of it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from dsv3.batch import IGNORE, TokenBatch
from dsv3.config import BalanceConfig, MtpLossConfig, PretrainConfig
from dsv3.config.files import write_config
from dsv3.config.teaching import RewardConfig, SftConfig
from dsv3.data.chance import falls_below, hash_text
from dsv3.data.chat_data import Conversation, TaughtTokens, as_tokens, messages_of, read_records
from dsv3.data.tokenizer import Tokenizer
from dsv3.errors import ConfigError, DataError
from dsv3.infer.loaded import load
from dsv3.infer.model_folder import find_model
from dsv3.model.interfaces import ModelOutput
from dsv3.model.transformer import Transformer
from dsv3.parallel.launch import open_ranks
from dsv3.posttrain.lesson import open_lesson
from dsv3.posttrain.problem import Problem
from dsv3.posttrain.sft import Progress, SftResult, TaughtRows, batch_of, data_hash, sft_settings, teach_rows
from dsv3.train.balance import balance_loss
from dsv3.train.loss import LossParts, WholeBatch

PEAK, FLOOR = 5e-6, 1e-6
"""Learning rates that a cosine joins: those of fine-tuning, since these are unpublished."""
MARK = "reward.json"
"""Stands in a run and in its export, and tells a reward model from one that answers."""
TOKENS_AT_ONCE = 8192
"""Of answers that are scored."""


@dataclass(frozen=True, kw_only=True)
class PairLoss:
    """The loss as `train_step` asks for it, of batches in which each chosen answer stands before its rejected one."""

    pad_id: int

    def __call__(
        self,
        model: Transformer,
        *,
        output: ModelOutput,
        batch: TokenBatch,
        whole: WholeBatch,
        mtp_weight: float,  # noqa: ARG002 - nothing is drafted
        balance: BalanceConfig,
        is_last: bool = True,
    ) -> LossParts:
        """Return the share of one micro-batch in the mean over pairs."""
        even = balance_loss(
            output,
            config=balance,
            model_config=model.config,
            num_sequences=whole.num_sequences,
            whole_batch_counts=whole.plain_top_k,
        )
        if not is_last:
            return LossParts(total=even, next_token=even.new_zeros(()), mtp=(), balance=even)
        assert batch.targets is not None
        rewards = rewards_in(model, hidden=output.hidden, batch=batch, pad_id=self.pad_id)
        counts = (batch.targets[batch.starts[1::2].to(batch.targets.device) - 1] != IGNORE).to(rewards.dtype)
        losses = -torch.nn.functional.logsigmoid(rewards[0::2] - rewards[1::2])
        loss = (losses * counts).sum() / (whole.num_targets / 2)
        return LossParts(total=loss + even, next_token=loss, mtp=(), balance=even)


def rewards_in(
    model: Transformer, *, hidden: Float[Tensor, "token hidden"], batch: TokenBatch, pad_id: int
) -> Float[Tensor, " sequence"]:
    """Return what each sequence of a batch is worth, by the hidden state of its last token."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    last = hidden[(batch.starts[1:] - 1).to(hidden.device)]
    return last.to(wide) @ model.lm_head.weight[pad_id].to(wide)


def reward_settings(
    base: PretrainConfig, *, lesson: RewardConfig, start_from: Path, peak: float = PEAK, floor: float = FLOOR
) -> PretrainConfig:
    """Return the settings of training: those of fine-tuning, without MTP. A row of a micro-batch is a pair."""
    config = sft_settings(
        base, lesson=SftConfig(rows_per_step=lesson.rows_per_step), start_from=start_from, peak=peak, floor=floor
    )
    return replace(config, mtp=MtpLossConfig(early_weight=0.0, late_weight=0.0, switch_tokens=0))


def teach_reward(
    config: PretrainConfig,
    *,
    lesson: RewardConfig,
    folder: Path,
    on_record: Progress | None = None,
    stop_after_steps: int | None = None,
) -> SftResult:
    """Teach in the run folder `folder`, from its newest snapshot if it has one, until every epoch is read.

    Called again with the same settings it goes on, bit for bit as if it had never stopped.

    Raises:
        ConfigError, DataError, SnapshotError, CheckpointError, NonFiniteError, TrainingError: as their texts say.
    """
    if config.parallel.context > 1:
        raise ConfigError(f"parallel.context = {config.parallel.context}: a reward is read where an answer is whole")
    length = config.batch.sequence_length
    with open_ranks(config.parallel, model=config.model, sequence_length=length, device=config.runtime.device) as ranks:
        if lesson.rows_per_step % ranks.row_size:
            raise ConfigError(f"rows_per_step = {lesson.rows_per_step} pairs do not divide over {ranks.row_size} ranks")
        data = data_hash(lesson.data)
        with open_lesson(config, lesson=lesson, name="reward", data=data, folder=folder, ranks=ranks) as run:
            pad_id = run.tokenizer.pad_id

            def look(model: Transformer, samples: Sequence[TaughtTokens]) -> dict[str, float]:
                rewards = _scored(model, samples=samples, pad_id=pad_id)
                wins = [chosen > rejected for chosen, rejected in zip(rewards[0::2], rewards[1::2], strict=True)]
                return {"held_out_accuracy": sum(wins) / len(wins)}

            result = teach_rows(
                run,
                lesson=lesson,
                taught=pairs_of(lesson, tokenizer=run.tokenizer, length=length),
                look=look,
                loss=PairLoss(pad_id=pad_id),
                name="reward",
                notify=on_record,
                limit=stop_after_steps,
            )
            if result.export is not None and ranks.rank == 0:
                write_config(lesson, path=result.export / MARK)
            return result


def pairs_of(lesson: RewardConfig, *, tokenizer: Tokenizer, length: int) -> TaughtRows:
    """Read all pairs: a row is a chosen answer and a rejected one, of at most `length` tokens each, or else dropped.

    Raises:
        DataError: a record is no pair, or none is left to train on.
    """
    kept: list[tuple[TaughtTokens, ...]] = []
    held_out: list[TaughtTokens] = []
    dropped: list[str] = []
    for name, record in _records(lesson.data):
        pair = [_answered(record, which=which, name=name) for which in ("chosen", "rejected")]
        samples = tuple(reading_of(one, tokenizer=tokenizer) for one in pair)
        if max(len(one.inputs) for one in samples) > length:
            dropped.append(name)
        # By what is asked, so that no other pair of the same question is trained on.
        elif falls_below(hash_text(str(pair[0].messages[:-1])), rate=lesson.held_out_rate):
            held_out += samples
        else:
            kept.append(samples)
    if not kept:
        raise DataError(
            f"of the pairs in {', '.join(lesson.data) or 'no file'} none is left to train on: {len(dropped)} are "
            f"longer than {length} tokens, {len(held_out) // 2} are held out"
        )
    return TaughtRows(rows=tuple(kept), held_out=tuple(held_out), dropped=tuple(dropped), cut=(), unanswered=())


def reading_of(conversation: Conversation, *, tokenizer: Tokenizer) -> TaughtTokens:
    """Return a conversation as a reward model reads it: whole, with the padding token as target of its last token."""
    ids = as_tokens(conversation, tokenizer=tokenizer).ids
    return TaughtTokens(ids=[*ids, tokenizer.pad_id], trained=[*[False] * len(ids), True], name=conversation.name)


@dataclass(frozen=True, kw_only=True)
class RewardModel:
    """A reward model that is ready to be asked."""

    model: Transformer
    tokenizer: Tokenizer

    def score(self, problems: Sequence[Problem], answers: Sequence[str]) -> list[float]:
        """Return what answers to problems are worth: any number, which means something beside others alone.

        Raises:
            DataError: one is longer than the model's context.
        """
        samples = []
        for problem, answer in zip(problems, answers, strict=True):
            messages = [*problem.messages, {"role": "assistant", "content": answer}]
            sample = reading_of(Conversation(messages=messages, name=problem.name), tokenizer=self.tokenizer)
            if len(sample.inputs) > self.model.config.max_position_embeddings:
                raise DataError(
                    f"the answer to {problem.name!r} has {len(sample.inputs)} tokens with its prompt, and the reward "
                    f"model's context {self.model.config.max_position_embeddings}"
                )
            samples.append(sample)
        return _scored(self.model, samples=samples, pad_id=self.tokenizer.pad_id)


def load_reward_model(folder: str | Path) -> RewardModel:
    """Return the reward model in a folder: a run of `dsv3 reward`, or its export.

    Raises:
        CheckpointError, ConfigError: there is no model, or one that was taught otherwise.
    """
    found = find_model(folder)
    if not (Path(folder).expanduser() / MARK).is_file():
        raise ConfigError(f"{found.weights} is no reward model: {folder} has no {MARK}; dsv3 reward makes one")
    loaded = load(folder, plain=True)
    return RewardModel(model=loaded.model, tokenizer=loaded.tokenizer)


@torch.no_grad()
def _scored(model: Transformer, *, samples: Sequence[TaughtTokens], pad_id: int) -> list[float]:
    model.eval()
    rewards: list[float] = []
    for part in _parts(samples):
        batch = batch_of(part).to(model.device)
        rewards += rewards_in(model, hidden=model(batch).hidden, batch=batch, pad_id=pad_id).tolist()
    return rewards


def _parts(samples: Sequence[TaughtTokens]) -> Iterator[list[TaughtTokens]]:
    part: list[TaughtTokens] = []
    for sample in samples:
        if part and sum(len(one.inputs) for one in part) + len(sample.inputs) > TOKENS_AT_ONCE:
            yield part
            part = []
        part.append(sample)
    if part:
        yield part


def _records(paths: Sequence[str]) -> Iterator[tuple[str, Any]]:
    for path in paths:
        for number, record in enumerate(read_records(path), start=1):
            yield f"{path}#{number}", record


def _answered(record: Any, *, which: str, name: str) -> Conversation:
    if not isinstance(record, dict) or not {"prompt", "chosen", "rejected"} <= set(record):
        raise DataError(f"{name} is no pair: it needs 'prompt', 'chosen' and 'rejected'")
    asked = {"prompt": record["prompt"], "completion": record[which]}
    messages = messages_of(asked, name=f"{name} ({which})")
    if messages[-1]["role"] != "assistant":
        raise DataError(f"{name} has no answer at the end of '{which}', but a message of '{messages[-1]['role']}'")
    return Conversation(messages=messages, name=f"{name} ({which})")
