import gc

import pytest

from dsv3.config import EngineConfig
from dsv3.errors import ConfigError, EngineError
from dsv3.infer.engine import Engine
from dsv3.infer.events import FinishReason
from dsv3.infer.params import SamplingParams
from dsv3.infer.runner import TorchRunner
from dsv3.infer.stream import TokenStreams
from dsv3.model.transformer import Transformer

EOS = 1
GREEDY = {"temperature": 0.0}


def streams_of(model, *, vocab_size=300, page_tokens=1):
    config = EngineConfig(page_tokens=page_tokens, num_pages=64 // page_tokens)
    return TokenStreams(Engine(TorchRunner(model), config=config, vocab_size=vocab_size, eos_id=EOS))


def start(model, *, prompt=(5, 6, 7), streams=None, vocab_size=300, **params):
    streams = streams or streams_of(model, vocab_size=vocab_size)
    return streams.start(list(prompt), params=SamplingParams(**params))


def test_the_end_token_ends_the_stream_and_is_not_part_of_it(scripted):
    tokens = start(scripted(40, 41, EOS, 42), **GREEDY)
    assert tokens.finish_reason is None
    assert list(tokens) == [40, 41]
    assert tokens.finish_reason is FinishReason.END_OF_TEXT
    assert next(tokens, None) is None


def test_generation_ends_after_max_tokens(scripted):
    tokens = start(scripted(40, 41, 42, 43), max_tokens=3, **GREEDY)
    assert list(tokens) == [40, 41, 42]
    assert tokens.finish_reason is FinishReason.MAX_TOKENS


def test_the_prompt_is_run_once_then_one_token_at_a_time_and_only_wanted_logits_are_made(scripted):
    model = scripted(40, 41, 42)
    list(start(model, prompt=range(3, 13), max_tokens=3, **GREEDY))
    assert model.tokens_run == [10, 1, 1]
    assert model.logits_made == [1, 1, 1]


def test_nothing_is_computed_before_the_first_token_is_asked_for(scripted):
    model = scripted(40)
    start(model, **GREEDY)
    assert model.tokens_run == []


def test_the_answer_ends_where_the_context_does(with_limit):
    tokens = start(with_limit(12), prompt=range(3, 11), max_tokens=None)
    assert len(list(tokens)) == 4
    assert tokens.finish_reason is FinishReason.CONTEXT_LIMIT


def test_a_prompt_that_leaves_no_room_is_refused_with_both_numbers(with_limit):
    with pytest.raises(ConfigError, match=r"12 tokens, and the model's context is 12 .* at most 11"):
        start(with_limit(12), prompt=range(3, 15))


def test_a_second_turn_computes_only_what_is_new(scripted):
    model = scripted(40, 41, 42, EOS, 50, EOS)
    streams = streams_of(model)
    list(start(model, streams=streams, **GREEDY))
    again = start(model, prompt=[5, 6, 7, 40, 41, 42, 8, 9], streams=streams, **GREEDY)
    list(again)
    # First turn: 3 of the prompt, then 40, 41, 42. Second turn: 8 and 9, then 50. Pages are of one token here.
    assert model.tokens_run == [3, 1, 1, 1, 2, 1]
    assert again.num_cached_tokens == 6


def test_a_repeated_prompt_still_computes_its_last_token(scripted):
    model = scripted(EOS, EOS)
    streams = streams_of(model)
    for _ in range(2):
        list(start(model, streams=streams, **GREEDY))
    assert model.tokens_run == [3, 1]


def test_streams_of_one_engine_are_read_side_by_side(model):
    streams = streams_of(model)
    alone = [list(start(model, prompt=prompt, max_tokens=9, seed=3)) for prompt in ([5, 6], [7, 8, 9])]
    first, second = (start(model, prompt=p, max_tokens=9, seed=3, streams=streams) for p in ([5, 6], [7, 8, 9]))
    together = [list(pair) for pair in zip(*zip(first, second, strict=True), strict=True)]
    assert together == alone


def test_a_stream_that_is_dropped_frees_its_pages(model):
    streams = streams_of(model)
    stream = start(model, max_tokens=9, streams=streams, ignore_end=True)
    next(stream)
    assert streams.engine.stats().num_pages_in_use > 0
    del stream
    gc.collect()
    assert streams.engine.stats().num_pages_in_use == 0
    streams.engine.check()


def test_ids_the_tokenizer_does_not_have_never_appear(model):
    tokens = list(start(model, vocab_size=30, temperature=5.0, top_p=1.0, max_tokens=60, seed=1))
    assert len(set(tokens)) > 5
    assert max(tokens) < 30


@pytest.mark.parametrize(
    ("prompt", "message"),
    [([], "the prompt has no tokens"), ([3, 400], "token id 400 at place 1"), ([-1], "token id -1 at place 0")],
)
def test_a_prompt_that_is_no_prompt_is_refused(model, prompt, message):
    with pytest.raises(ConfigError, match=message):
        start(model, prompt=prompt)


def test_damaged_weights_are_reported_instead_of_sampled(model, model_config):
    broken = Transformer(model_config)
    broken.load_state_dict(model.state_dict())
    broken.requires_grad_(False).norm.weight[0] = float("nan")
    tokens = start(broken)
    with pytest.raises(EngineError, match="not numbers"):
        list(tokens)
    assert tokens.finish_reason is FinishReason.FAILED
