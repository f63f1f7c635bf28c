"""A base model of a few thousand weights, trained for a moment, and conversations for it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from dsv3.config.files import read_config
from dsv3.config.teaching import SftConfig
from dsv3.posttrain.sft import sft, sft_settings
from dsv3.train.loop import pretrain

from ..conftest import small_config


@pytest.fixture(scope="session")
def base(texts, tmp_path_factory) -> Path:
    """A finished run of two steps: its folder."""
    folder = tmp_path_factory.mktemp("base") / "run"
    pretrain(replace(small_config(texts), total_tokens=2 * 4 * 32), folder=folder)
    return folder


def conversations(count: int) -> list[dict]:
    """Sums of two small numbers, asked in words."""
    return [
        {"messages": [{"role": "user", "content": f"{a} and {b}"}, {"role": "assistant", "content": f"{a + b}"}]}
        for a, b in ((number % 9, number // 9) for number in range(count))
    ]


@pytest.fixture(scope="session")
def sums(tmp_path_factory) -> Path:
    """A file of them."""
    file = tmp_path_factory.mktemp("sums") / "sums.jsonl"
    file.write_text("".join(json.dumps(one) + "\n" for one in conversations(40)))
    return file


@pytest.fixture(scope="session")
def taught(base, sums, tmp_path_factory) -> Path:
    """The base, fine-tuned on them for a moment: its answers are numbers, and end."""
    lesson = SftConfig(data=(str(sums),), epochs=20, rows_per_step=2)
    config = sft_settings(read_config(base / "config.json"), lesson=lesson, start_from=base, peak=1e-2, floor=1e-3)
    return sft(config, lesson=lesson, folder=tmp_path_factory.mktemp("taught") / "run").folder
