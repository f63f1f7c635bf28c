"""A context filled by one request, then gone on with: `python -m long_context_parts.serving TOKENS`.

A model of random weights with as many positions reads a prompt of that length, decodes after some shorter prompts and
after it, and then gets another request with the same prompt and a new end, of which only the end is to be read.
"""

import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from dsv3.checkpoint.published import save_published
from dsv3.config import EngineConfig, ModelConfig, YarnConfig
from dsv3.infer.engine import Engine
from dsv3.infer.loaded import load
from dsv3.infer.params import SamplingParams
from dsv3.infer.request import Request
from dsv3.model.transformer import Transformer
from dsv3.recipes import tiny

DECODED = 33
"""Tokens of each answer; the first comes with the end of the prompt."""
END = 48
"""Tokens by which the second request differs."""


def model_of(positions: int) -> ModelConfig:
    """Return recipe `tiny`'s model with YaRN to so many positions."""
    yarn = YarnConfig(factor=positions / 256, original_max_position_embeddings=256)
    return replace(tiny().model, max_position_embeddings=positions, rope_scaling=yarn, num_nextn_predict_layers=0)


def measured(tokens: int, *, folder: Path) -> dict[str, Any]:
    """Fill contexts of growing lengths, the longest twice."""
    config = model_of(tokens + 4 * END)
    model = Transformer(config)
    model.init_weights(generator=torch.Generator().manual_seed(0))
    save_published(model, folder=folder, tokenizer_folder=None, dtype=torch.float32)
    loaded = load(folder, weights="fp32", device="cpu")
    engine = loaded.new_engine(EngineConfig(max_sequences=4), cache_tokens=tokens + 8 * END)
    prompt = torch.randint(4, config.vocab_size, (tokens,), generator=torch.Generator().manual_seed(1)).tolist()
    found: dict[str, Any] = {"cache_bytes_per_token": loaded.runner.bytes_per_token, "after": {}}
    length = 1024
    while length <= tokens:
        wanted = length - END
        first, rest = answer(engine, prompt=prompt[:wanted], name=f"{length}")
        found["after"][length] = {"first_token_seconds": first, "token_seconds": median(rest)}
        if length < tokens:
            engine = loaded.new_engine(EngineConfig(max_sequences=4), cache_tokens=tokens + 8 * END)
        length *= 2
    end = torch.randint(4, config.vocab_size, (END,), generator=torch.Generator().manual_seed(2)).tolist()
    again, rest = answer(engine, prompt=[*prompt[: tokens - END], *end], name="again")
    found["again_first_token_seconds"] = again
    found["cached_tokens"] = engine.stats().num_cached_tokens
    return found


def answer(engine: Engine, *, prompt: list[int], name: str) -> tuple[float, list[float]]:
    """Return the seconds until the first token, and between each and the next."""
    params = SamplingParams(temperature=0.0, max_tokens=DECODED, ignore_end=True)
    engine.add(Request(id=name, prompt_ids=prompt, params=params))
    times, before = [], time.perf_counter()
    while engine.has_work:
        if any(event.tokens for event in engine.step()):
            now = time.perf_counter()
            times.append(now - before)
            before = now
    return times[0], times[1:]


if __name__ == "__main__":
    print(json.dumps(measured(int(sys.argv[1]), folder=Path(sys.argv[2]))))
