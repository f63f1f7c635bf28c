import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3.data.boundary import BoundarySplitter, combined_tokens

CODE = "f(x).\n\ng(y);\nh();\n(7 miles).\n\nsea!\n" * 40


def test_published_combined_tokens_are_punctuation_and_line_breaks(published):
    combined = combined_tokens(published)
    for text in (".\n", ".\n\n", ");\n", ' "\n'):
        [token] = published.encode(text)
        left, right = (published.decode([part]) for part in combined[token])
        assert (left + right, left.rstrip("\n")) == (text, left)
    for text in (".", "\n", "\n\n", "hello", " .", "\t\n"):
        ids = published.encode(text)
        assert not combined.keys() & set(ids)


def test_every_combined_token_keeps_its_bytes(published):
    for token, parts in combined_tokens(published).items():
        assert b"".join(map(published.token_bytes, parts)) == published.token_bytes(token)
        assert len(parts) >= 2


def test_all_are_split_at_rate_one_and_none_at_rate_zero(small_tokenizer):
    ids = small_tokenizer.encode(CODE)
    combined = combined_tokens(small_tokenizer)
    assert combined.keys() & set(ids)
    all_split = BoundarySplitter(small_tokenizer, rate=1.0, seed=0).split(ids, document="d")
    assert not combined.keys() & set(all_split)
    assert BoundarySplitter(small_tokenizer, rate=0.0, seed=0).split(ids, document="d") == ids


def test_the_rate_is_the_share_that_is_split(small_tokenizer):
    combined = combined_tokens(small_tokenizer)
    ids = small_tokenizer.encode(CODE)
    splitter = BoundarySplitter(small_tokenizer, rate=0.1, seed=0)
    before = sum(token in combined for token in ids) * 100
    after = sum(token in combined for number in range(100) for token in splitter.split(ids, document=str(number)))
    assert 1 - after / before == pytest.approx(0.1, abs=0.02)


def test_splitting_depends_on_seed_and_document(small_tokenizer):
    ids = small_tokenizer.encode(CODE)

    def split(seed, document):
        return BoundarySplitter(small_tokenizer, rate=0.3, seed=seed).split(ids, document=document)

    assert split(0, "a") == split(0, "a")
    assert split(0, "a") != split(0, "b")
    assert split(0, "a") != split(1, "a")


@given(st.text(alphabet=".;)!\n\r ax,"), st.floats(0, 1))
def test_the_text_stays_the_same(small_tokenizer, text, rate):
    ids = small_tokenizer.encode(text)
    split = BoundarySplitter(small_tokenizer, rate=rate, seed=1).split(ids, document="d")
    assert small_tokenizer.decode(split) == text
