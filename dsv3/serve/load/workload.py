"""What is asked: stretches of real text, some of which begin alike, and how long the answers are to be."""

import random
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dsv3.config.check import require_choice, require_not_negative, require_positive
from dsv3.errors import ConfigError, DataError
from dsv3.serve.load.lengths import Lengths

ENDPOINTS = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}


@dataclass(frozen=True, kw_only=True)
class LoadConfig:
    """How a server is loaded. Either `clients` or `rate` is given."""

    clients: int = 0
    """Closed loop: so many users, each of whom asks again as soon as the answer is there."""
    rate: float = 0.0
    """Open loop: requests a second, by a Poisson process, whether or not earlier ones are answered."""
    num_requests: int = 100
    """Requests at most."""
    duration_seconds: float | None = None
    """No request begins later; those that have begun are waited for."""
    timeout_seconds: float = 300.0
    """An answer that is not whole by then counts as an error."""
    warmup_requests: int = 1
    """Sent one by one before the clock starts, and not counted."""
    prompt_tokens: Lengths = field(default_factory=lambda: Lengths(low=256, high=256))
    output_tokens: Lengths = field(default_factory=lambda: Lengths(low=128, high=128))
    shared_prefix_tokens: int = 0
    """Tokens that stand before a prompt and are the same for all of its group."""
    prefix_groups: int = 1
    endpoint: str = "completions"
    model: str = ""
    """Empty takes the first one that the server lists."""
    temperature: float = 0.0
    seed: int = 0
    """Of arrivals, lengths, texts and, counted up from here, of the sampling."""
    ignore_end: bool = False
    """Ask for answers that go on past the model's end token (`ignore_eos`), so that lengths are as wanted."""

    def __post_init__(self) -> None:
        require_positive(self, "num_requests", "timeout_seconds", "prefix_groups")
        require_not_negative(self, "clients", "rate", "warmup_requests", "shared_prefix_tokens", "temperature", "seed")
        if (self.clients > 0) == (self.rate > 0):
            raise ConfigError("a load is either --clients N (closed loop) or --rate R (open loop): give one of the two")
        if self.duration_seconds is not None and self.duration_seconds <= 0:
            raise ConfigError(f"duration_seconds = {self.duration_seconds}; it must be greater than 0")
        require_choice(self, "endpoint", choices=tuple(ENDPOINTS))


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One text to be continued."""

    text: str
    max_tokens: int
    seed: int

    def body(self, config: LoadConfig, *, model: str) -> dict[str, Any]:
        """Return the request as the server is to read it."""
        asked: dict[str, Any] = {"prompt": self.text}
        if config.endpoint == "chat":
            asked = {"messages": [{"role": "user", "content": self.text}]}
        if config.ignore_end:
            asked["ignore_eos"] = True
        return {
            "model": model,
            **asked,
            "max_tokens": self.max_tokens,
            "temperature": config.temperature,
            "seed": self.seed,
            "stream": True,
            "stream_options": {"include_usage": True},
        }


def read_text(path: Path | None) -> str:
    """Return the text that prompts are cut from: a file's, or the language reference that comes with every Python.

    Real text by default: a model of language, and most of all the modules that draft ahead of it, does nothing
    useful with random tokens.

    Raises:
        DataError: the file cannot be read.
    """
    if path is None:
        from pydoc_data.topics import topics  # 0.7 MB of English and code

        return "\n\n".join(topics.values())
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as text in UTF-8: {error}") from error


def make_prompts(config: LoadConfig, *, text: str, characters_per_token: float) -> list[Prompt]:
    """Return the prompts of a run; the same settings give the same ones.

    No two begin at the same place of the text, so that a cache of prefixes finds what is shared on purpose only.

    Raises:
        DataError: the text is too short for that.
    """
    rng = random.Random(config.seed)
    starts = [match.start() for match in re.finditer(r"\S+", text)]
    needed = config.num_requests + config.prefix_groups
    if len(starts) < needed:
        raise DataError(f"the text has {len(starts)} words, but {needed} prompts and prefixes begin at one each")
    rng.shuffle(starts)

    def cut(start: int, tokens: int) -> str:
        length = max(round(tokens * characters_per_token), 1)
        if length > len(text):
            raise DataError(f"the text has {len(text)} characters, but a prompt of {tokens} tokens needs {length}")
        return text[start : start + length] + text[: max(start + length - len(text), 0)]

    prefixes = [""] * config.prefix_groups
    if config.shared_prefix_tokens:
        prefixes = [cut(starts.pop(), config.shared_prefix_tokens) + "\n\n" for _ in prefixes]
    return [
        Prompt(
            text=rng.choice(prefixes) + cut(starts[number], config.prompt_tokens.draw(rng)),
            max_tokens=config.output_tokens.draw(rng),
            seed=config.seed + number,
        )
        for number in range(config.num_requests)
    ]
