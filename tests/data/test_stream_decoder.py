from hypothesis import given
from hypothesis import strategies as st


def streamed(tokenizer, ids):
    decoder = tokenizer.stream_decoder()
    return [decoder.add(token) for token in ids], decoder.finish()


def test_a_character_appears_when_its_last_byte_arrives(small_tokenizer):
    ids = small_tokenizer.encode("a🐢")  # Not in the training text: four tokens of a byte each.
    assert len(ids) == 5
    assert streamed(small_tokenizer, ids) == (["a", "", "", "", "🐢"], "")


def test_an_unfinished_character_shows_as_a_replacement_at_the_end(small_tokenizer):
    ids = small_tokenizer.encode("🐢")[:2]
    assert streamed(small_tokenizer, ids) == (["", ""], "\ufffd")


def test_special_tokens_are_spelled_out(small_tokenizer):
    pieces, _ = streamed(small_tokenizer, [0, small_tokenizer.user_id])
    assert pieces == ["<｜begin▁of▁sentence｜>", "<｜User｜>"]


@given(st.lists(st.integers(min_value=0, max_value=700)))
def test_streamed_pieces_join_to_what_decoding_at_once_gives(small_tokenizer, ids):
    pieces, rest = streamed(small_tokenizer, ids)
    assert "".join(pieces) + rest == small_tokenizer.decode(ids)
