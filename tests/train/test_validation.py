import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from dsv3.batch import TokenBatch
from dsv3.config import PretrainConfig
from dsv3.data.prepare import prepare_corpus
from dsv3.data.prepared import PreparedCorpus
from dsv3.model.transformer import Transformer
from dsv3.train.validation import read_held_out, validate

WINDOW = 16


@pytest.fixture
def corpus(small_run: PretrainConfig, tmp_path: Path) -> PreparedCorpus:
    corpus = prepare_corpus(small_run, folder=tmp_path / "corpus")
    # Text that byte pairs do not cover and tokens may cut within a character.
    file = corpus.source_folder(corpus.sources[0]) / "held_out.jsonl"
    with file.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps({"name": "odd", "text": "日本 ß ✓ 🙂 \x00\n"}) + "\n")
    return corpus


@pytest.fixture
def model(small_run: PretrainConfig) -> Transformer:
    model = Transformer(small_run.model)
    model.init_weights(generator=torch.Generator().manual_seed(1))
    return model


def test_every_byte_of_the_held_out_text_is_counted_once(corpus: PreparedCorpus):
    held_out = read_held_out(corpus, max_tokens=1_000_000, window=WINDOW)
    assert held_out is not None
    assert held_out.sources == ("prose", "notes")
    for name, size, tokens in zip(held_out.sources, held_out.bytes, held_out.tokens, strict=True):
        texts = corpus.held_out(name)
        assert size == sum(len(text.encode()) for text in texts)
        assert tokens == sum(len(corpus.tokenizer().encode(text)) for text in texts)
    targets = torch.cat([piece.batch.targets for piece in held_out.batches if piece.batch.targets is not None])
    assert len(targets) == sum(held_out.tokens)
    assert max(max(piece.batch.lengths) for piece in held_out.batches) == WINDOW


def test_bits_per_byte_is_the_probability_of_the_text_given_a_begin_token(corpus: PreparedCorpus, model: Transformer):
    held_out = read_held_out(corpus, max_tokens=1_000_000, window=WINDOW)
    assert held_out is not None
    result = validate(model, held_out=held_out, mtp=True)
    tokenizer = corpus.tokenizer()
    bits_of, bytes_of, nats, tokens = {}, {}, 0.0, 0
    for name in ("prose", "notes"):
        bits = 0.0
        for text in corpus.held_out(name):
            ids = tokenizer.encode(text, add_bos=True)
            for start in range(0, len(ids) - 1, WINDOW):
                piece = ids[start : start + WINDOW + 1]
                hidden = model(TokenBatch.from_sequences([piece[:-1]])).hidden
                logits = (hidden @ model.lm_head.weight.T).double()
                found = F.cross_entropy(logits, torch.tensor(piece[1:]), reduction="sum").item()
                bits += found / math.log(2)
                nats, tokens = nats + found, tokens + len(piece) - 1
        bits_of[name] = bits
        bytes_of[name] = sum(len(text.encode()) for text in corpus.held_out(name))
    assert result.by_source == pytest.approx({name: bits_of[name] / bytes_of[name] for name in bits_of}, rel=1e-5)
    assert result.bits_per_byte == pytest.approx(sum(bits_of.values()) / sum(bytes_of.values()), rel=1e-5)
    assert result.loss == pytest.approx(nats / tokens, rel=1e-5)


def test_a_model_that_knows_nothing_needs_the_bits_of_a_uniform_guess(corpus: PreparedCorpus, model: Transformer):
    held_out = read_held_out(corpus, max_tokens=1_000_000, window=WINDOW)
    assert held_out is not None
    with torch.no_grad():
        model.lm_head.weight.zero_()
    result = validate(model, held_out=held_out, mtp=True)
    guess = math.log2(model.config.vocab_size) * sum(held_out.tokens) / sum(held_out.bytes)
    assert result.bits_per_byte == pytest.approx(guess, rel=1e-6)
    assert result.mtp_loss == pytest.approx((math.log(model.config.vocab_size),), rel=1e-6)


@pytest.mark.parametrize("limit", [1, 7, 90, 301])
def test_the_budget_is_shared_between_sources_and_used_up(corpus: PreparedCorpus, limit: int):
    held_out = read_held_out(corpus, max_tokens=limit, window=WINDOW)
    assert held_out is not None
    assert sum(held_out.tokens) == limit
    if limit > 1:
        assert held_out.sources == ("prose", "notes")
        assert abs(held_out.tokens[0] - held_out.tokens[1]) <= 1


def test_the_tokens_are_the_same_every_time(corpus: PreparedCorpus):
    one, other = (read_held_out(corpus, max_tokens=200, window=WINDOW) for _ in range(2))
    assert one is not None
    assert other is not None
    for ours, theirs in zip(one.batches, other.batches, strict=True):
        assert torch.equal(ours.batch.tokens, theirs.batch.tokens)


def test_no_held_out_text_means_no_validation(corpus: PreparedCorpus):
    for source in corpus.sources:
        (corpus.source_folder(source) / "held_out.jsonl").write_text("")
    assert read_held_out(corpus, max_tokens=100, window=WINDOW) is None


def test_the_load_is_that_of_all_held_out_tokens(corpus: PreparedCorpus, model: Transformer):
    held_out = read_held_out(corpus, max_tokens=200, window=WINDOW)
    assert held_out is not None
    model.train()
    result = validate(model, held_out=held_out, mtp=False)
    assert model.training
    assert result.mtp_loss == ()
    assert [int(load.sum()) for load in result.load] == [200 * model.config.num_experts_per_tok]
    with_mtp = validate(model, held_out=held_out, mtp=True)
    assert len(with_mtp.load) == len(with_mtp.max_violation) == 2
