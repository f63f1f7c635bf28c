"""A model that is ready to use: `dsv3.load(folder)` and what it returns."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TypedDict, Unpack

import torch
from jaxtyping import Float
from torch import Tensor

from dsv3.checkpoint.names import published_layout
from dsv3.checkpoint.published import assemble, load_published
from dsv3.checkpoint.snapshot import read_snapshot
from dsv3.checkpoint.writer import FP8
from dsv3.config import EngineConfig, ModelConfig
from dsv3.config.files import read_config
from dsv3.data.chat_template import render_chat
from dsv3.data.tokenizer import Tokenizer
from dsv3.errors import CheckpointError, ConfigError, TokenizerError
from dsv3.infer.engine import Engine, check_ids
from dsv3.infer.model_folder import ModelFolder, find_model
from dsv3.infer.packed_loading import load_packed
from dsv3.infer.packed_model import PackedModel, pack_from_state
from dsv3.infer.packed_runner import PackedRunner
from dsv3.infer.packed_weights import FORMATS
from dsv3.infer.params import SamplingParams
from dsv3.infer.runner import Runner, TorchRunner
from dsv3.infer.stream import TokenStreams
from dsv3.infer.text import TextStream
from dsv3.model.transformer import Transformer
from dsv3.native import engine as native_engine
from dsv3.runtime.device import available_memory, choose_device, choose_dtype
from dsv3.runtime.log import get_logger

log = get_logger(__name__)

WEIGHTS = ("auto", *FORMATS)
"""The formats of weights that can be asked for."""
PAGE_TOKENS = 16
"""Of the cache of a model that is used in this process: what a conversation reads again at most."""
CACHE_TOKENS = 16_384
"""Tokens of all requests together that there is room for, or one whole context if that is more."""
LESSONS = ("sft.json", "grpo.json")
"""What a run has that was taught to answer."""
SHARE_OF_MEMORY = 0.3
"""Of the memory that is free, what the cache may take."""
MOST_SEQUENCES = 32
FORMAT_OF_TYPE = {"auto": "auto", "float32": "fp32", "bfloat16": "bf16"}
"""What a run calls a compute type, and what weights in it are called here."""
_TYPE_OF_FORMAT = {format: name for name, format in FORMAT_OF_TYPE.items()}


class _PlainSettings(TypedDict, total=False):
    max_tokens: int | None
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    logit_bias: tuple[tuple[int, float], ...]
    stop_token_ids: tuple[int, ...]
    ignore_end: bool
    seed: int | None


class SamplingSettings(_PlainSettings, total=False):
    """The settings of `SamplingParams` as keyword arguments; what is left out keeps its default there."""

    stop: str | Sequence[str]


class LoadedModel:
    """A model with its tokenizer. One may serve many conversations, side by side too.

    Sampling settings of `generate`, `stream`, `chat` and `stream_chat` (see `SamplingParams` for each):
    max_tokens=256, temperature=0.8, top_p=0.95, top_k=0, min_p=0, penalties, seed=None, stop=(). Prompts that leave no
    room in the context are refused; an answer that meets its end stops there, with a warning in the log. What was read
    stays in the cache for texts that begin alike, until its room is needed.
    """

    def __init__(
        self,
        runner: Runner,
        *,
        tokenizer: Tokenizer | None,
        source: str,
        is_base: bool,
        trained_length: int,
        model: Transformer | None = None,
        cache_tokens: int | None = None,
        drafts: int = 0,
    ) -> None:
        self.runner: Runner = runner
        """What computes: the engine's form of the model, over the weights as they are kept."""
        self.source = source
        """Where the weights came from."""
        self.is_base = is_base
        """True of the weights of a pre-training run, and of a tokenizer without a chat format: they continue text."""
        self.trained_length = trained_length
        """Longest text, in tokens, that training has shown the model: a run's rows; `max_position_embeddings` where no
        run is at hand."""
        self._tokenizer = tokenizer
        self._model = model
        self._cache_tokens = cache_tokens
        self._drafts = drafts

    @property
    def model(self) -> Transformer:
        """The model that trains, where it was loaded as such."""
        if self._model is None:
            raise ConfigError(f"{self.source} was loaded for use; load(..., plain=True) gives the model that trains")
        return self._model

    @cached_property
    def streams(self) -> TokenStreams:
        """The engine that all answers come from."""
        config = EngineConfig(page_tokens=PAGE_TOKENS, max_sequences=MOST_SEQUENCES, max_drafts=self._drafts)
        return TokenStreams(self.new_engine(config, cache_tokens=self._cache_tokens))

    def new_engine(self, config: EngineConfig, *, cache_tokens: int | None) -> Engine:
        """Return an engine over this model, with `num_pages` for so many tokens, or for as many as memory allows.

        A model has one cache, so the engine before it, if there was one, must not be used any more.
        """
        limit, device = self.config.max_position_embeddings, torch.device("cpu")
        if self._model is not None:
            device = self._model.embed_tokens.weight.device
        wanted = max(CACHE_TOKENS, limit) if cache_tokens is None else cache_tokens
        tokens = tokens_that_fit(self.runner, wanted=wanted, device=device)
        vocab_size = self.config.vocab_size if self._tokenizer is None else self._tokenizer.vocab_size
        return Engine(
            self.runner,
            config=replace(config, num_pages=-(-tokens // config.page_tokens)),
            vocab_size=vocab_size,
            eos_id=self.config.eos_token_id,
        )

    @property
    def config(self) -> ModelConfig:
        """The architecture."""
        return self.runner.config

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer that came with the weights.

        Raises:
            TokenizerError: none did; such a model takes token ids, by `logits`.
        """
        if self._tokenizer is None:
            raise TokenizerError(
                f"{self.source} has no tokenizer.json, so text cannot be read or written; copy the tokenizer's files "
                "beside the weights, or use .logits(ids) with token ids"
            )
        return self._tokenizer

    @torch.inference_mode()
    def logits(self, ids: list[int]) -> Float[Tensor, "token vocab"]:
        """Return the logits after each of the given tokens, in float32 on the CPU; nothing is put before them.

        Raises:
            ConfigError: no ids, ids outside the vocabulary, or more of them than the context holds.
        """
        if not ids:
            raise ConfigError("logits of no tokens were asked for; give at least one id, such as config.bos_token_id")
        check_ids(ids, vocab_size=self.config.vocab_size)
        if len(ids) > self.config.max_position_embeddings:
            raise ConfigError(
                f"{len(ids)} tokens were given, and the model's context is {self.config.max_position_embeddings}; "
                "give fewer, or score them in parts"
            )
        return self.streams.engine.read(ids).float()

    def generate(self, prompt: str | list[int], **settings: Unpack[SamplingSettings]) -> str:
        """Return the continuation of `prompt`, without the prompt itself."""
        return "".join(self.stream(prompt, **settings))

    def stream(self, prompt: str | list[int], **settings: Unpack[SamplingSettings]) -> TextStream:
        """Return the continuation of `prompt` in pieces as they are made; computing starts with the first one.

        A text gets the begin token in front, as documents in training have it; a list of ids is taken as it is.
        """
        ids = self.prompt_ids(prompt) if isinstance(prompt, str) else prompt
        return self.stream_ids(ids, params=sampling_params(**settings))

    def chat(self, messages: list[dict[str, str]], **settings: Unpack[SamplingSettings]) -> str:
        """Return the answer to a conversation: messages with a 'role' (system, user, assistant) and a 'content'."""
        return "".join(self.stream_chat(messages, **settings))

    def stream_chat(self, messages: list[dict[str, str]], **settings: Unpack[SamplingSettings]) -> TextStream:
        """Return the answer to a conversation in pieces as they are made.

        The conversation is written in the tokenizer's chat format. A base model (`is_base`) has never seen that
        format in training, and the log says so.
        """
        if self.is_base:
            log.warning("%s is a base model: it continues text and was not tuned to answer messages", self.source)
        return self.stream_ids(self.chat_ids(messages), params=sampling_params(**settings))

    def prompt_ids(self, text: str) -> list[int]:
        """Return the token ids of a text to be continued: the begin token, then the text."""
        return [self.config.bos_token_id, *self.tokenizer.encode(text)]

    def chat_ids(self, messages: list[dict[str, str]]) -> list[int]:
        """Return the token ids of a conversation up to where the answer begins."""
        if not messages:
            raise ConfigError("the conversation has no messages; give at least one with the role 'user'")
        return self.tokenizer.encode(render_chat(self.tokenizer, messages=messages, add_generation_prompt=True))

    def stream_ids(self, ids: list[int], *, params: SamplingParams) -> TextStream:
        """Return the continuation of token ids."""
        tokenizer = self.tokenizer
        tokens = self.streams.start(ids, params=params)
        return TextStream(tokens, tokenizer=tokenizer, stop=params.stop, prompt_tokens=len(ids))


def sampling_params(*, stop: str | Sequence[str] = (), **settings: Unpack[_PlainSettings]) -> SamplingParams:
    """Return sampling settings given as keywords, where one stop string may stand without its list."""
    return SamplingParams(**settings, stop=(stop,) if isinstance(stop, str) else tuple(stop))


def tokens_that_fit(runner: Runner, *, wanted: int, device: torch.device) -> int:
    """Return `wanted`, or as many tokens as the cache may hold of the memory that is free; never fewer than 64."""
    return max(64, min(wanted, int(SHARE_OF_MEMORY * available_memory(device) / runner.bytes_per_token)))


def load(
    folder: str | Path,
    *,
    weights: str = "auto",
    device: str = "auto",
    average: bool = False,
    plain: bool = False,
    cache_tokens: int | None = None,
    drafts: int = 0,
) -> LoadedModel:
    """Load a model to use it: from a training run, from an export, or in the published format.

    Of a run, the finished export is taken, else the newest snapshot; with `average` its moving average of the weights
    (report 3.2.3). `weights` is how they are kept in memory: 'auto' as they are stored, 'fp32', 'bf16', 'fp8', or, on a
    CPU, 'int8' or 'int4'; all but fp32 and what they are stored in round them. `device` is 'auto', 'cpu', 'cuda' or
    'cuda:N'. On a CPU with a C++ compiler they are laid out for the engine, and computing is in FP32, or with int8 and
    int4 in integers; with `plain`, or elsewhere, it is the model that trains, on CUDA in BF16 by default. `drafts` is
    how many tokens the MTP modules draft ahead at most: it changes the speed, not the text. `cache_tokens` is the room
    for all requests together.

    Raises:
        CheckpointError: the folder is none of these, or its weights do not fit its config.json.
        ConfigError: a format there is none of here, a device that is not here, an average where none was kept, or
            drafts of a model without MTP modules.
        TokenizerError: the tokenizer has more ids than the model has rows.
    """
    if weights not in WEIGHTS:
        raise ConfigError(f"weights = {weights!r}; choose one of {', '.join(repr(name) for name in WEIGHTS)}")
    found = find_model(folder, snapshot_only=average)
    if average and not found.is_snapshot:
        raise ConfigError(f"only a training run keeps an average of its weights; {found.weights} is no run folder")
    where = choose_device(device)
    run = None if found.run is None else read_config(found.run / "config.json")
    model: Transformer | None = None
    runner: Runner
    if where.type == "cpu" and not plain and native_engine.available():
        packed = _load_packed(found, run_model=None if run is None else run.model, weights=weights, average=average)
        runner = PackedRunner(packed)
        log.info("weights: %s, %.2f GB, laid out for the engine", packed.format_name, packed.num_bytes / 1e9)
    else:
        model = _load_transformer(
            found, run_model=None if run is None else run.model, weights=weights, average=average, device=where
        )
        runner = TorchRunner(model)
    tokenizer = _load_tokenizer(found, config=runner.config)
    if drafts and not runner.num_mtp_modules:
        raise ConfigError(f"drafts = {drafts}, but {found.weights} has no MTP module to draft with; use drafts = 0")
    return LoadedModel(
        runner,
        tokenizer=tokenizer,
        source=f"{found.weights}{' (average)' if average else ''}",
        is_base=_is_base(found, tokenizer=tokenizer),
        trained_length=runner.config.max_position_embeddings if run is None else run.batch.sequence_length,
        model=model,
        cache_tokens=cache_tokens,
        drafts=drafts,
    )


def _is_base(found: ModelFolder, *, tokenizer: Tokenizer | None) -> bool:
    """Whether a model only continues text: a run that was not taught, or a tokenizer without a chat format."""
    if found.run is not None:
        return not any((found.run / lesson).exists() for lesson in LESSONS)
    return tokenizer is None or not tokenizer.settings.get("chat_template")


def _load_packed(found: ModelFolder, *, run_model: ModelConfig | None, weights: str, average: bool) -> PackedModel:
    if not found.is_snapshot:
        return load_packed(found.weights, weights=weights)
    assert run_model is not None
    named = _snapshot_tensors(found, average=average)
    _check_fit(found, named=named, config=run_model)
    name = "fp32" if weights == "auto" else weights
    return pack_from_state(named, config=run_model, layout=published_layout(run_model), name=name)


def _load_transformer(
    found: ModelFolder, *, run_model: ModelConfig | None, weights: str, average: bool, device: torch.device
) -> Transformer:
    if weights not in (*_TYPE_OF_FORMAT, "fp8"):
        raise ConfigError(
            f"weights = {weights!r} are for the engine's own C++ on a CPU, which is not in use here; "
            "use 'fp8', 'bf16' or 'fp32'"
        )
    dtype = FP8 if weights == "fp8" else choose_dtype(_TYPE_OF_FORMAT[weights], device=device)
    if not found.is_snapshot:
        return load_published(found.weights, dtype=dtype, device=device).eval().requires_grad_(False)
    assert run_model is not None
    model = _load_snapshot(found, config=run_model, average=average, dtype=dtype, device=device)
    return model.eval().requires_grad_(False)


def _snapshot_tensors(found: ModelFolder, *, average: bool) -> dict[str, Tensor]:
    """Return the weights of a run's newest snapshot by our names, or their average where there is one."""
    tensors, _ = read_snapshot(found.weights)
    named = dict(tensors["model"])
    if average:
        if "average" not in tensors:
            raise ConfigError(f"{found.weights} has no average of the weights: the run had optim.ema_decay = 0")
        named |= tensors["average"]  # Router biases are not averaged and stay as they are.
    return named


def _check_fit(found: ModelFolder, *, named: dict[str, Tensor], config: ModelConfig) -> None:
    with torch.device("meta"):
        plain = Transformer(config)
    try:
        plain.load_state_dict(named, assign=True)
    except RuntimeError as error:
        raise CheckpointError(f"the snapshot {found.weights} does not fit {found.run}/config.json: {error}") from error


def _load_snapshot(
    found: ModelFolder, *, config: ModelConfig, average: bool, dtype: torch.dtype, device: torch.device
) -> Transformer:
    """Make the model of a run's newest snapshot; training keeps its weights in FP32, `dtype` is what we use them in."""
    named = _snapshot_tensors(found, average=average)
    _check_fit(found, named=named, config=config)
    layout = [tensor for tensor in published_layout(config) if not tensor.is_copy]
    return assemble(
        config, layout=layout, read=lambda tensor: tensor.part_of(named[tensor.source]), dtype=dtype, device=device
    )


def _load_tokenizer(found: ModelFolder, *, config: ModelConfig) -> Tokenizer | None:
    if found.tokenizer is None:
        log.warning("%s has no tokenizer.json; the model answers token ids only", found.weights)
        return None
    tokenizer = Tokenizer.from_file(found.tokenizer)
    if tokenizer.vocab_size > config.vocab_size:
        raise TokenizerError(
            f"{found.tokenizer} has ids up to {tokenizer.vocab_size - 1}, and the model has {config.vocab_size} rows; "
            "this is another model's tokenizer"
        )
    return tokenizer
