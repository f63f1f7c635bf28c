"""Answers drawn from the model as it is, by our own engine, with the log-probability of every token."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from dsv3.checkpoint.names import published_layout
from dsv3.config import EngineConfig
from dsv3.data.chance import hash_parts
from dsv3.data.chat_template import render_chat
from dsv3.data.tokenizer import Tokenizer
from dsv3.errors import ConfigError, TrainingError
from dsv3.infer.engine import Engine
from dsv3.infer.events import FinishReason
from dsv3.infer.packed_model import pack_from_state
from dsv3.infer.packed_runner import PackedRunner
from dsv3.infer.params import SamplingParams
from dsv3.infer.request import Request
from dsv3.infer.runner import Runner, TorchRunner
from dsv3.model.transformer import Transformer
from dsv3.native import engine as native_engine
from dsv3.posttrain.problem import Problem

PAGE_TOKENS = 16
"""Answers are short at first; a page that is half empty is memory lost."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One answer to a problem."""

    problem: Problem
    prompt_ids: list[int]
    ids: list[int]
    """What the model said, its end token included."""
    logprobs: list[float]
    """One for each of `ids`; empty where they were not asked for."""
    experts: Int[Tensor, "token layer chosen"] | None = None
    """Where the tokens that were read went, prompt and answer but for its last, where that was asked for."""
    text: str
    finished: bool
    """Whether the model ended it, and not the limit on tokens."""

    @property
    def num_tokens(self) -> int:
        """Of prompt and answer."""
        return len(self.prompt_ids) + len(self.ids)


def runner_for(model: Transformer, *, alone: bool = False) -> Runner:
    """Return what computes with the weights as they are now: laid out for the engine on a CPU, the model on a GPU.

    With `alone` it keeps them, whatever becomes of the model's.
    """
    if model.device.type == "cpu" and native_engine.available():
        packed = pack_from_state(
            model.state_dict(), config=model.config, layout=published_layout(model.config), name="fp32"
        )
        return PackedRunner(packed)
    return TorchRunner(copy.deepcopy(model).eval().requires_grad_(False) if alone else model)


def draw_answers(
    runner: Runner,
    *,
    tokenizer: Tokenizer,
    problems: Sequence[Problem],
    group_size: int,
    temperature: float,
    max_tokens: int,
    seed: int,
    with_logprobs: bool = True,
    with_experts: bool = False,
    places: Sequence[int] | None = None,
) -> list[Answer]:
    """Return `group_size` answers to each problem, side by side. The same weights and seed give the same answers.

    `places` are what chance knows the problems by; where they stand here, unless given.

    Raises:
        ConfigError: a prompt leaves no room for an answer.
        TrainingError: the engine failed on one.
    """
    prompts = [prompt_of(problem, tokenizer=tokenizer) for problem in problems]
    room = max(map(len, prompts)) + max_tokens
    if room > runner.config.max_position_embeddings:
        raise ConfigError(
            f"prompts of up to {room - max_tokens} tokens and answers of {max_tokens} need {room} positions, and the "
            f"model has {runner.config.max_position_embeddings}; use fewer max_answer_tokens"
        )
    count = len(problems) * group_size
    pages = -(-(room + 1) // PAGE_TOKENS)
    config = EngineConfig(
        page_tokens=PAGE_TOKENS,
        num_pages=max(pages * min(count, 256), -(-runner.config.max_position_embeddings // PAGE_TOKENS)),
        max_sequences=min(count, 256),
        max_step_tokens=2048,
    )
    engine = Engine(runner, config=config, vocab_size=tokenizer.vocab_size, eos_id=tokenizer.eos_id)
    numbers = range(len(problems)) if places is None else places
    for place, (prompt, known_by) in enumerate(zip(prompts, numbers, strict=True)):
        for number in range(group_size):
            params = SamplingParams(
                temperature=temperature,
                top_p=1.0,
                max_tokens=max_tokens,
                seed=answer_seed(seed, place=known_by, number=number),
            )
            name = f"{place} {number}"
            engine.add(
                Request(
                    id=name,
                    prompt_ids=prompt,
                    params=params,
                    num_logprobs=0 if with_logprobs else None,
                    with_experts=with_experts,
                )
            )
    ids: dict[str, list[int]] = {}
    logprobs: dict[str, list[float]] = {}
    ended: dict[str, FinishReason] = {}
    experts: dict[str, Tensor | None] = {}
    while engine.has_work:
        for event in engine.step():
            if event.finish_reason is FinishReason.FAILED:
                raise TrainingError(f"an answer could not be drawn: {event.error}")
            ids.setdefault(event.id, []).extend(event.tokens)
            logprobs.setdefault(event.id, []).extend(one.logprob for one in event.logprobs)
            if event.finish_reason is not None:
                ended[event.id] = event.finish_reason
                experts[event.id] = None if event.experts is None else torch.from_numpy(event.experts)
            if event.finish_reason is FinishReason.END_OF_TEXT:
                ids[event.id].append(tokenizer.eos_id)
                if event.end is not None:
                    logprobs[event.id].append(event.end.logprob)
    answers = []
    for place, (problem, prompt) in enumerate(zip(problems, prompts, strict=True)):
        for number in range(group_size):
            name = f"{place} {number}"
            finished = ended[name] is FinishReason.END_OF_TEXT
            said = ids[name][:-1] if finished else ids[name]
            answers.append(
                Answer(
                    problem=problem,
                    prompt_ids=prompt,
                    ids=ids[name],
                    logprobs=logprobs[name],
                    experts=experts[name],
                    text=tokenizer.decode(said),
                    finished=finished,
                )
            )
    return answers


def answer_seed(seed: int, *, place: int, number: int) -> int:
    """Return what all chance in one answer hangs on."""
    return hash_parts(seed, place, number) >> 1


def prompt_of(problem: Problem, *, tokenizer: Tokenizer) -> list[int]:
    """Return a problem as the model reads it, up to where its answer begins."""
    text = render_chat(tokenizer, messages=list(problem.messages), add_generation_prompt=True)
    return tokenizer.encode(text)
