"""A model that is ready to use: `dsv3.load(folder)` and what it returns."""

from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict, Unpack

import torch
from jaxtyping import Float
from torch import Tensor

from dsv3.batch import TokenBatch
from dsv3.checkpoint.names import published_layout
from dsv3.checkpoint.published import assemble, load_published
from dsv3.checkpoint.snapshot import read_snapshot
from dsv3.checkpoint.writer import FP8
from dsv3.config import ModelConfig
from dsv3.config.files import read_config
from dsv3.data.chat_template import render_chat
from dsv3.data.tokenizer import Tokenizer
from dsv3.errors import CheckpointError, ConfigError, TokenizerError
from dsv3.infer.generate import CachedTokens, check_ids, stream
from dsv3.infer.model_folder import ModelFolder, find_model
from dsv3.infer.sampler import SamplingParams
from dsv3.infer.text import TextStream
from dsv3.model.transformer import Transformer
from dsv3.runtime.device import DTYPES, choose_device, choose_dtype
from dsv3.runtime.log import get_logger

log = get_logger(__name__)

TYPES = ("auto", *DTYPES, "fp8")
"""The types of weights that can be asked for."""
WEIGHTS = ("trained", "average")
"""The weights of a run that can be asked for: those of the last step, or their moving average."""


class _PlainSettings(TypedDict, total=False):
    max_tokens: int | None
    temperature: float
    top_p: float
    top_k: int
    seed: int | None


class SamplingSettings(_PlainSettings, total=False):
    """The settings of `SamplingParams` as keyword arguments; what is left out keeps its default there."""

    stop: str | Sequence[str]


class LoadedModel:
    """A model with its tokenizer. It keeps nothing between calls, so one may serve many conversations.

    Sampling settings of `generate`, `stream`, `chat` and `stream_chat` (see `SamplingParams` for each):
    max_tokens=256, temperature=0.8, top_p=0.95, top_k=0, seed=None, stop=(). Prompts that leave no room in the
    context are refused; an answer that meets its end stops there, with a warning in the log.
    """

    def __init__(
        self, model: Transformer, *, tokenizer: Tokenizer | None, source: str, is_base: bool, trained_length: int
    ) -> None:
        self.model = model
        self.source = source
        """Where the weights came from."""
        self.is_base = is_base
        """True of the weights of a pre-training run, and of a tokenizer without a chat format: they continue text."""
        self.trained_length = trained_length
        """Longest text, in tokens, that training has shown the model: a run's rows; `max_position_embeddings` where no
        run is at hand."""
        self._tokenizer = tokenizer

    @property
    def config(self) -> ModelConfig:
        """The architecture."""
        return self.model.config

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
        batch = TokenBatch.from_sequences([ids]).to(self.model.embed_tokens.weight.device)
        return self.model.logits(self.model(batch).hidden).float().cpu()

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

    def stream_ids(self, ids: list[int], *, params: SamplingParams, cached: CachedTokens | None = None) -> TextStream:
        """Return the continuation of token ids; with `cached`, without computing again what it already holds."""
        tokens = stream(
            self.model,
            prompt_ids=ids,
            params=params,
            vocab_size=self.tokenizer.vocab_size,
            eos_id=self.config.eos_token_id,
            cached=cached,
        )
        return TextStream(tokens, tokenizer=self.tokenizer, stop=params.stop, prompt_tokens=len(ids))


def sampling_params(*, stop: str | Sequence[str] = (), **settings: Unpack[_PlainSettings]) -> SamplingParams:
    """Return sampling settings given as keywords, where one stop string may stand without its list."""
    return SamplingParams(**settings, stop=(stop,) if isinstance(stop, str) else tuple(stop))


def load(folder: str | Path, *, dtype: str = "auto", device: str = "auto", weights: str = "trained") -> LoadedModel:
    """Load a model to use it: from a training run, from an export, or in the published format.

    Of a run, the finished export is taken, else the newest snapshot. `dtype` is 'auto' (BF16 on CUDA, FP32 on CPU),
    'float32', 'bfloat16', or 'fp8', which keeps the matrices of layers at one byte a weight, rounding them to FP8 if
    they are not, and all else as 'auto' does. `device` is 'auto', 'cpu', 'cuda' or 'cuda:N'. `weights` 'average' takes
    a run's moving average of the weights (report 3.2.3) from its newest snapshot instead of the weights themselves.

    Raises:
        CheckpointError: the folder is none of these, or its weights do not fit its config.json.
        ConfigError: a type there is none of, a device that is not here, or an average where none was kept.
        TokenizerError: the tokenizer has more ids than the model has rows.
    """
    if weights not in WEIGHTS:
        raise ConfigError(f"weights = {weights!r}; choose one of {', '.join(repr(name) for name in WEIGHTS)}")
    if dtype not in TYPES:
        raise ConfigError(f"dtype = {dtype!r}; choose one of {', '.join(repr(name) for name in TYPES)}")
    found = find_model(folder, snapshot_only=weights == "average")
    if weights == "average" and not found.is_snapshot:
        raise ConfigError(f"only a training run keeps an average of its weights; {found.weights} is no run folder")
    where = choose_device(device)
    stored = FP8 if dtype == "fp8" else choose_dtype(dtype, device=where)
    run = None if found.run is None else read_config(found.run / "config.json")
    if found.is_snapshot:
        assert run is not None
        model = _load_snapshot(found, config=run.model, weights=weights, dtype=stored, device=where)
    else:
        model = load_published(found.weights, dtype=stored, device=where)
    tokenizer = _load_tokenizer(found, config=model.config)
    return LoadedModel(
        model.eval().requires_grad_(False),
        tokenizer=tokenizer,
        source=f"{found.weights}{' (average)' if weights == 'average' else ''}",
        is_base=run is not None or tokenizer is None or not tokenizer.settings.get("chat_template"),
        trained_length=model.config.max_position_embeddings if run is None else run.batch.sequence_length,
    )


def _load_snapshot(
    found: ModelFolder, *, config: ModelConfig, weights: str, dtype: torch.dtype, device: torch.device
) -> Transformer:
    """Make the model of a run's newest snapshot; training keeps its weights in FP32, `dtype` is what we use them in."""
    tensors, _ = read_snapshot(found.weights)
    named = dict(tensors["model"])
    if weights == "average":
        if "average" not in tensors:
            raise ConfigError(f"{found.weights} has no average of the weights: the run had optim.ema_decay = 0")
        named |= tensors["average"]  # Router biases are not averaged and stay as they are.
    with torch.device("meta"):
        plain = Transformer(config)
    try:
        plain.load_state_dict(named, assign=True)
    except RuntimeError as error:
        raise CheckpointError(f"the snapshot {found.weights} does not fit {found.run}/config.json: {error}") from error
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
