import math
import re

import pytest

from dsv3.errors import ConfigError, DataError
from dsv3.serve.load.lengths import Lengths
from dsv3.serve.load.workload import LoadConfig, make_prompts, read_text

TEXT = read_text(None)


def fixed(length: int) -> Lengths:
    return Lengths(low=length, high=length)


def test_the_text_that_comes_along_is_long_and_english():
    assert len(TEXT) > 300_000
    assert len(re.findall(r"\bthe\b", TEXT)) > 1000


def test_the_same_settings_give_the_same_prompts_and_another_seed_gives_others():
    def texts(seed: int) -> list[str]:
        config = LoadConfig(clients=1, num_requests=20, seed=seed)
        return [prompt.text for prompt in make_prompts(config, text=TEXT, characters_per_token=4.0)]

    assert texts(1) == texts(1)
    assert not set(texts(1)) & set(texts(2))


def test_prompts_are_as_long_as_asked_and_none_begins_as_another_does():
    config = LoadConfig(clients=1, num_requests=300, prompt_tokens=fixed(100), output_tokens=Lengths(low=5, high=9))
    prompts = make_prompts(config, text=TEXT, characters_per_token=3.5)
    assert len(prompts) == 300
    assert {len(prompt.text) for prompt in prompts} == {350}
    assert len({prompt.text[:100] for prompt in prompts}) == 300
    assert {prompt.max_tokens for prompt in prompts} == {5, 6, 7, 8, 9}
    assert [prompt.seed for prompt in prompts[:3]] == [0, 1, 2]


def test_prompts_of_a_group_begin_alike_and_groups_do_not():
    config = LoadConfig(clients=1, num_requests=90, prompt_tokens=fixed(10), shared_prefix_tokens=50, prefix_groups=3)
    prompts = make_prompts(config, text=TEXT, characters_per_token=4.0)
    sizes = [sum(prompt.text.startswith(start) for prompt in prompts) for start in {p.text[:150] for p in prompts}]
    assert len(sizes) == 3
    assert sum(sizes) == 90
    assert min(sizes) > 15


def test_a_text_that_is_too_short_is_refused():
    with pytest.raises(DataError, match="has 2 words, but 4"):
        make_prompts(LoadConfig(clients=1, num_requests=3), text="two words", characters_per_token=4.0)
    with pytest.raises(DataError, match="has 9 characters, but a prompt of 256 tokens needs 1024"):
        make_prompts(LoadConfig(clients=1, num_requests=1), text="two words", characters_per_token=4.0)


def test_a_file_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "x").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(DataError, match="cannot be read as text"):
        read_text(tmp_path / "x")
    with pytest.raises(DataError, match="cannot be read as text"):
        read_text(tmp_path / "missing")


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"clients": 1, "rate": 1.0},
        {"clients": 1, "num_requests": 0},
        {"clients": 1, "duration_seconds": 0.0},
        {"clients": 1, "temperature": -1.0},
        {"clients": 1, "endpoint": "embeddings"},
        {"rate": math.nan},
    ],
)
def test_settings_that_make_no_load_are_refused(settings):
    with pytest.raises(ConfigError):
        LoadConfig(**settings)


def test_a_request_says_what_was_set_in_the_words_of_its_endpoint():
    text = {"num_requests": 1, "prompt_tokens": fixed(5), "temperature": 0.5, "seed": 3}
    config = LoadConfig(clients=1, endpoint="chat", ignore_end=True, **text)
    (prompt,) = make_prompts(config, text=TEXT, characters_per_token=4.0)
    assert prompt.body(config, model="m") == {
        "model": "m",
        "messages": [{"role": "user", "content": prompt.text}],
        "ignore_eos": True,
        "max_tokens": 128,
        "temperature": 0.5,
        "seed": 3,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    body = prompt.body(LoadConfig(clients=1, **text), model="m")
    assert body["prompt"] == prompt.text
    assert "ignore_eos" not in body
