import math
import random

import numpy as np
import pytest

from dsv3.data.tokenizer import Tokenizer
from dsv3.errors import DataError
from dsv3.evals.comparison import encode_texts, score_baselines

WORDS = ("sea", "boat", "wind", "night", "rain", "wide", "west", "small")


def story(seed, *, length=60):
    rng = random.Random(seed)
    return " ".join(rng.choice(WORDS) for _ in range(length))


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train([story(seed) for seed in range(50)], vocab_size=330)


@pytest.fixture(scope="module")
def rows(tokenizer):
    return [np.array([tokenizer.bos_id, *tokenizer.encode(story(seed))]) for seed in range(100, 140)]


def test_texts_are_shared_evenly_and_what_one_leaves_goes_to_the_next(tokenizer):
    texts = {"short": ["sea"], "long": [story(1), story(2)], "also": [story(3), story(4)]}
    text = encode_texts(texts, tokenizer=tokenizer, max_tokens=61)
    predicted = {name: sum(len(document) - 1 for document in found) for name, found in text.documents.items()}
    assert predicted == {"short": len(tokenizer.encode("sea")), "long": 30, "also": 61 - 30 - predicted["short"]}
    assert all(document[0] == tokenizer.bos_id for found in text.documents.values() for document in found)


def test_content_is_the_bytes_of_what_is_predicted(tokenizer):
    text = encode_texts({"a": ["sea wind", "boat ß 海"], "b": [""]}, tokenizer=tokenizer, max_tokens=None)
    assert text.content == {"a": "sea windboat ß 海".encode()}


def test_no_text_at_all_is_refused(tokenizer):
    with pytest.raises(DataError, match="no text to score"):
        encode_texts({"a": [""], "b": []}, tokenizer=tokenizer, max_tokens=None)


def test_bits_per_byte_of_the_whole_weighs_sources_by_their_bytes(tokenizer, rows):
    text = encode_texts({"a": [story(1)], "b": [story(2, length=200)]}, tokenizer=tokenizer, max_tokens=None)
    for score in score_baselines(text, rows=rows, tokenizer=tokenizer):
        if not score.by_source:
            continue
        sizes = {name: len(content) for name, content in text.content.items()}
        mean = sum(score.by_source[name] * sizes[name] for name in sizes) / sum(sizes.values())
        assert score.bits_per_byte == pytest.approx(mean)


def test_baselines_come_near_the_entropy_of_words_drawn_at_random(tokenizer, rows):
    text = encode_texts({"a": [story(seed) for seed in range(20)]}, tokenizer=tokenizer, max_tokens=None)
    scores = {score.name: score for score in score_baselines(text, rows=rows, tokenizer=tokenizer)}
    words = sum(len(story(seed).split()) for seed in range(20))
    entropy = words * math.log2(len(WORDS)) / len(text.content["a"])
    assert list(scores) == ["unigram", "3-gram", "xz-alone", "xz"]
    for name in ("unigram", "3-gram"):
        assert entropy * 0.98 < scores[name].bits_per_byte < entropy * 1.25
    assert entropy < scores["xz"].bits_per_byte < scores["xz-alone"].bits_per_byte
    assert scores["xz-alone"].training_tokens is None
    assert scores["3-gram"].training_tokens == sum(len(row) for row in rows)


def test_without_training_rows_only_xz_is_left(tokenizer):
    text = encode_texts({"a": [story(1)]}, tokenizer=tokenizer, max_tokens=None)
    assert [score.name for score in score_baselines(text, rows=[], tokenizer=tokenizer)] == ["xz-alone"]
