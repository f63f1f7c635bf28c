import pytest

from dsv3.config import EngineConfig
from dsv3.infer.engine import Engine
from dsv3.infer.events import FinishReason
from dsv3.infer.params import SamplingParams
from dsv3.infer.runner import TorchRunner
from dsv3.infer.stream import TokenStreams
from dsv3.infer.text import TextStream

EOS = 1


@pytest.fixture
def say(tokenizer, scripted):
    """A text stream of a model that says just this text, token by token, and then ends."""

    def build(text, *, stop=(), max_tokens=None):
        ids = text if isinstance(text, list) else tokenizer.encode(text)
        config = EngineConfig(page_tokens=4, num_pages=16)
        engine = Engine(TorchRunner(scripted(*ids, EOS)), config=config, vocab_size=tokenizer.vocab_size, eos_id=EOS)
        params = SamplingParams(temperature=0.0, max_tokens=max_tokens)
        tokens = TokenStreams(engine).start([0, 5], params=params)
        return TextStream(tokens, tokenizer=tokenizer, stop=stop, prompt_tokens=2)

    return build


def test_the_pieces_make_the_text_and_none_is_empty(say):
    stream = say("a word 你好 ✓")
    pieces = list(stream)
    assert "".join(pieces) == "a word 你好 ✓"
    assert all(pieces)
    assert stream.finish_reason is FinishReason.END_OF_TEXT


def test_a_character_spread_over_tokens_is_shown_whole(say, tokenizer):
    assert len(tokenizer.encode("✓")) == 3  # its bytes, since the vocabulary has not learnt it
    assert list(say("✓")) == ["✓"]


def test_a_character_that_never_becomes_whole_is_shown_as_unknown(say, tokenizer):
    assert "".join(say(tokenizer.encode("a✓")[:-1])) == "a\N{REPLACEMENT CHARACTER}"


def test_a_stop_string_over_several_tokens_ends_the_text_and_is_not_shown(say, tokenizer):
    assert len(tokenizer.encode("STOP")) > 1
    stream = say("go on STOP not this", stop=("STOP",))
    assert "".join(stream) == "go on "
    assert stream.finish_reason is FinishReason.STOP_STRING
    assert stream.completion_tokens < len(tokenizer.encode("go on STOP not this"))


def test_the_beginning_of_a_stop_string_is_shown_when_the_text_ends_there(say):
    stream = say("go on STO", stop=("STOP",))
    assert "".join(stream) == "go on STO"
    assert stream.finish_reason is FinishReason.END_OF_TEXT


def test_what_was_held_back_is_shown_when_max_tokens_ends_the_text(say, tokenizer):
    stream = say("xSTOP", stop=("STOP",), max_tokens=len(tokenizer.encode("xSTO")))
    assert "".join(stream) == "xSTO"
    assert stream.finish_reason is FinishReason.MAX_TOKENS


def test_an_answer_cut_by_the_context_is_said_in_the_log(say, log):
    stream = say("a" * 62)
    "".join(stream)
    assert stream.finish_reason is FinishReason.CONTEXT_LIMIT
    assert f"stopped after {stream.completion_tokens} tokens: prompt and answer fill the model's context" in log.text


def test_speed_counts_the_tokens_after_the_first(say):
    stream = say("in the beginning")
    assert (stream.tokens_per_second, stream.prompt_seconds) == (0.0, 0.0)
    list(stream)
    assert stream.tokens_per_second > 0
    assert stream.prompt_seconds > 0
